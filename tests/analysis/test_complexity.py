"""Counts of whole models from their configs, and the tool that prints them."""

import re

import pytest

from acmix_mm.analysis.complexity import (
    build_to_count,
    complexity_report,
    count_on_shapes,
    padded_image_size,
)
from acmix_mm.analysis.flops import total
from acmix_mm.engine.config import enter_scope, load_config
from acmix_mm.environment import stack
from acmix_mm.utils.errors import UsageError


def row(report, name):
    columns = next(line for line in report.splitlines() if line.startswith(f'| {name} |'))
    return [float(number) for number in re.findall(r'([\d.]+)[MG]', columns)]


def test_tool_on_a_detector(run_tool):
    done = run_tool('tools/get_flops.py', 'configs/shapes/maskrcnn_acmix_swin.py', '--shape', 224,
                    448)
    assert done.returncode == 0, done.stderr
    assert 'one image of 224×448' in done.stdout
    assert re.search(r'RPN, box heads \(\d+ proposals each\) and mask heads', done.stdout)
    for part in ('backbone, parameters', 'backbone, multiply-adds', 'model, parameters'):
        columns = row(done.stdout, part)
        assert columns[-1] == pytest.approx(sum(columns[:-1]), abs=0.03)
    # Only the backbone has ACmix layers.
    assert row(done.stdout, 'backbone, multiply-adds')[:3] == row(
        done.stdout, 'model, multiply-adds')[:3]


def test_tool_on_a_segmentor(get_flops):
    report = get_flops('configs/upernet_acmix_r50.py')
    assert 'one image of 512×512' in report
    assert 'without auxiliary training heads' in report
    assert row(report, 'model, multiply-adds')[-1] > row(report, 'backbone, multiply-adds')[-1]


def test_cascade_heads_count_in_every_stage():
    """Three box heads of 1000 proposals and three mask heads of 100 boxes."""
    cfg = load_config('configs/cascade_maskrcnn_acmix_swin_t_3x.py')
    report = complexity_report(cfg, (64, 64))
    one = load_config('configs/cascade_maskrcnn_acmix_swin_t_3x.py')
    one.model.roi_head.bbox_head = one.model.roi_head.bbox_head[:1]
    one.model.roi_head.num_stages = 1
    one.model.roi_head.stage_loss_weights = [1]
    one.model.train_cfg.rcnn = one.model.train_cfg.rcnn[:1]
    without = complexity_report(one, (64, 64))
    name = 'model, multiply-adds'
    # Four 3×3 convolutions of 256 channels on 7×7, a linear layer, and the predictors.
    box = 1000 * (49 * 4 * 9 * 256**2 + 49 * 256 * 1024 + 1024 * (81 + 4 * 80))
    # Four 3×3 convolutions on 14×14, a transposed one that doubles the size, and the predictor.
    mask = 100 * (196 * (4 * 9 * 256**2 + 4 * 256**2) + 784 * 256 * 80)
    assert row(report, name)[-1] - row(without, name)[-1] == pytest.approx(
        2 * (box + mask) / 1e9, abs=0.02)


def test_acmix_in_neck_and_heads_counts():
    report = complexity_report(load_config('configs/maskrcnn_r50_acmix_fpn_mask.py'), (64, 64))
    assert row(report, 'backbone, multiply-adds')[:3] == [0, 0, 0]
    assert all(row(report, 'model, multiply-adds'))


@pytest.mark.parametrize(('name', 'size'), [
    ('yolox_acmix_s', (640, 640)), ('rtmdet_acmix_s', (640, 640)),
    ('dino_acmix_swin_t', (800, 1344)), ('mask2former_acmix_swin_t_ade20k', (512, 512))])
def test_default_size(name, size):
    """That of the data preprocessor or, if images are padded in the pipeline, of the pipeline."""
    assert padded_image_size(load_config(f'configs/{name}.py')) == size


def test_width_and_height_are_not_exchanged():
    cfg = load_config('configs/rtmdet_acmix_s.py',
                      {'test_dataloader.dataset.pipeline.2.size': (640, 320)})
    assert padded_image_size(cfg) == (320, 640)


SHALLOW = {'model.backbone.depths': [1, 1, 1, 1]}


def multiply_adds(config, options):
    """Multiply-adds of a config's model with a shallow backbone, for one image of 128×128."""
    cfg = load_config(f'configs/{config}.py', {**SHALLOW, **options})
    enter_scope(cfg)
    return total(count_on_shapes(build_to_count(cfg.model), (128, 128))).multiply_adds


def test_decoder_of_dino_counts():
    """One more layer, with 10 queries on the 340 positions of maps at strides 8 to 64."""
    counts = [multiply_adds('dino_acmix_swin_t', {
        'model.num_queries': 10, 'model.encoder.num_layers': 1, 'model.decoder.num_layers': number})
        for number in (1, 2)]
    square = 256**2
    attention = 10 * 4 * square + 2 * 10**2 * 256
    # Values, the offsets of four points in four levels for eight heads, their weights, the output.
    deformable = 340 * square + 10 * (256 * 256 + 256 * 128 + square)
    ffn = 2 * 10 * 256 * 2048
    # MMDetection's fork encodes the reference points in twice as many channels.
    encoding = 512 if stack() == 'OpenMMLab' else 1024
    # The positional encoding of the reference points, the boxes (once for the next layer, and once
    # as an output), and the scores.
    heads = 10 * (encoding * 256 + square + 2 * (2 * square + 256 * 4) + 256 * 80)
    assert counts[1] - counts[0] == attention + deformable + ffn + heads


def test_decoder_of_mask2former_counts():
    """Three more layers, with 10 queries on the maps at strides 8 to 32, with 336 positions."""
    head = 'model.panoptic_head'
    counts = [multiply_adds('mask2former_acmix_swin_t_coco', {
        f'{head}.num_queries': 10, f'{head}.pixel_decoder.encoder.num_layers': 1,
        f'{head}.transformer_decoder.num_layers': number}) for number in (3, 6)]
    square = 256**2
    attention = 10 * 4 * square + 2 * 10**2 * 256
    cross_attention = 3 * 10 * 2 * square + 336 * 2 * square + 2 * 10 * 336 * 256
    ffn = 2 * 10 * 256 * 2048
    heads = 10 * (3 * square + 256 * 81 + 256 * 32 * 32)
    assert counts[1] - counts[0] == 3 * (attention + ffn + heads) + cross_attention


def test_label_map_of_mask2former_counts():
    """A class adds a score of each query, and a map at the size of the image."""
    head = 'model.decode_head'
    counts = [multiply_adds('mask2former_acmix_swin_t_ade20k', {
        f'{head}.num_queries': 10, f'{head}.pixel_decoder.encoder.num_layers': 1,
        f'{head}.transformer_decoder.num_layers': 1, f'{head}.num_classes': number})
        for number in (150, 151)]
    assert counts[1] - counts[0] == 2 * 10 * 256 + 10 * 128 * 128


@pytest.mark.parametrize(('text', 'added'), [
    ("_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'", 'maskrcnn_acmix_swin_t'),
    ("_base_ = 'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py'", 'retinanet_acmix_pvt_t'),
], ids=['swin', 'pvt'])
def test_baseline_lacks_the_convolution_path(text, added, tmp_path):
    """The attention of a baseline counts as rest."""
    (tmp_path / 'baseline.py').write_text(text)
    baseline = complexity_report(load_config(str(tmp_path / 'baseline.py')), (448, 448))
    acmix = complexity_report(load_config(f'configs/{added}.py'), (448, 448))
    for name in ('model, multiply-adds', 'model, parameters'):
        *_, convolution, _, everything = row(acmix, name)
        assert row(baseline, name)[-1] == pytest.approx(everything - convolution, abs=0.011)
        assert row(baseline, name)[:3] == [0, 0, 0]


@pytest.mark.parametrize(('text', 'message'), [
    ('optimizer = 1', 'has no model'),
    ("_base_ = 'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py'",
     'SparseRCNN does not run on an image of 64×64 on the meta device'),
    ("_base_ = 'mmdet::condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py'",
     "CondInst does not run .* no attribute 'gt_instances'"),
], ids=['no model', 'sparse', 'ground truth'])
def test_unsupported_models(text, message, tmp_path):
    (tmp_path / 'other.py').write_text(text)
    with pytest.raises(UsageError, match=message):
        complexity_report(load_config(str(tmp_path / 'other.py')), (64, 64))


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'Pass either a config or --zoo.'),
    (['configs/maskrcnn_acmix_r50.py', '--zoo'], 'either a config or --zoo'),
    (['--zoo', '--shape', '8', '8'], 'omit --shape'),
    (['configs/absent.py'], 'configs/absent.py is neither a file nor the name of'),
])
def test_tool_arguments(arguments, message, get_flops):
    with pytest.raises(SystemExit) as stopped:
        get_flops(*arguments)
    assert str(stopped.value).startswith('error: ')
    assert message in str(stopped.value)


@pytest.mark.parametrize(('shape', 'message'), [
    (['800'], 'expected 2 arguments'),
    (['0', '8'], "must be a positive integer, got '0'"),
    (['a', '8'], "must be a positive integer, got 'a'"),
])
def test_tool_shape(shape, message, get_flops, capsys):
    with pytest.raises(SystemExit):
        get_flops('configs/maskrcnn_acmix_r50.py', '--shape', *shape)
    assert f'error: argument --shape: {message}' in capsys.readouterr().err
