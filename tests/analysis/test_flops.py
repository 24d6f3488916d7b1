"""Counts against formulas made by hand, against the published ones, and from the tool."""

import functools
import re
import runpy
import sys

import pytest
import torch
import yaml
from helpers import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import acmix_mm.layers.acmix_conv as conv_module
import acmix_mm.layers.base as conv_path
import acmix_mm.layers.patchwise_acmix as patchwise_module
import acmix_mm.layers.window_acmix as window_module
from acmix_mm.analysis.complexity import complexity_report
from acmix_mm.analysis.flops import count, total
from acmix_mm.analysis.published import NETWORKS, count_network
from acmix_mm.engine.config import load_config
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.layers.base import ATTENTION, CONVOLUTION, OPERATOR_CLASSES, PROJECTIONS, REST
from acmix_mm.ops.shift_conv import convolved_bias
from acmix_mm.utils.errors import UsageError


def numbers(counts):
    return {name: each.multiply_adds for name, each in counts.items()}


@pytest.mark.parametrize('attention', ['reference', 'sdpa', 'chunked'])
@pytest.mark.parametrize('convolution', ['reference', 'two_step', 'folded', 'triton'])
def test_window_acmix_counts_alike_in_every_form(attention, convolution, monkeypatch):
    """Two pictures of 5×6, windows of 4: attention's map is padded to 8×8."""
    monkeypatch.setattr(window_module, 'window_attention', functools.partial(
        window_module.window_attention, backend=attention))
    monkeypatch.setattr(conv_path, 'shift_conv', functools.partial(
        conv_path.shift_conv, backend=convolution))
    layer = WindowACmix(12, 3, window_size=4, shift_size=2)
    counts = count(layer, lambda: layer(torch.zeros(2, 5, 6, 12)))
    assert numbers(counts) == {
        PROJECTIONS: 2 * 64 * 4 * 12 * 12,
        ATTENTION: 2 * 64 * 2 * 16 * 12,
        CONVOLUTION: 2 * 30 * (3 * 12 * 9 + 12 * 81),
        REST: 0,
    }
    assert {name: each.parameters for name, each in counts.items()} == {
        PROJECTIONS: 36 * 12 + 36 + 12 * 12 + 12, ATTENTION: 49 * 3,
        CONVOLUTION: 9 * 9 + 9 + 12 * 9 * 9, REST: 2}
    assert total(counts).parameters == sum(each.numel() for each in layer.parameters())


@pytest.mark.parametrize('attention', ['reference', 'tiled', 'triton'])
@pytest.mark.parametrize('convolution', ['reference', 'two_step', 'folded', 'triton'])
def test_acmix_conv_counts_alike_in_every_form(attention, convolution, monkeypatch):
    """Stride 2 on 7×5: q, k, v and the fc are of all 35 positions, the outputs 4×3."""
    monkeypatch.setattr(conv_module, 'sliding_window_attention', functools.partial(
        conv_module.sliding_window_attention, backend=attention))
    monkeypatch.setattr(conv_path, 'shift_conv', functools.partial(
        conv_path.shift_conv, backend=convolution))
    layer = ACmixConv2d(6, 8, stride=2, num_heads=2, attn_kernel_size=5)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer)
    assert numbers(count(model, lambda: model(torch.zeros(2, 3, 7, 5)))) == {
        PROJECTIONS: 2 * 35 * 3 * 6 * 8,
        ATTENTION: 2 * 12 * 2 * 25 * 8 + 35 * 2 * 4,
        CONVOLUTION: 2 * (35 * 3 * 8 * 9 + 12 * 8 * 81),
        REST: 2 * 35 * 3 * 6,
    }


def test_reduced_acmix_counts_what_is_reduced_once():
    """6×5 by cells of 2: 3×2 keys and values, which the fc mixes before they are spread."""
    layer = ReducedACmix(12, 3, sr_ratio=2)
    assert numbers(count(layer, lambda: layer(torch.zeros(2, 6, 5, 12)))) == {
        PROJECTIONS: 2 * 12 * 12 * (30 + 2 * 6 + 6 * 4 + 30),
        ATTENTION: 2 * 30 * 2 * 6 * 12,
        CONVOLUTION: 2 * ((30 + 2 * 6) * 12 * 9 + 30 * 12 * 81),
        REST: 0,
    }


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_patchwise_acmix_counts_alike_in_every_form(backend, monkeypatch):
    for name in ('patch_features', 'patch_aggregation'):
        monkeypatch.setattr(patchwise_module, name, functools.partial(
            getattr(patchwise_module, name), backend=backend))
    layer = PatchwiseACmix(32, 2, 8, 3).eval()
    assert numbers(count(layer, lambda: layer(torch.zeros(2, 32, 4, 5)))) == {
        PROJECTIONS: 40 * 32 * (2 + 2 + 8),
        ATTENTION: 40 * (2 * 10 * 1 + 1 * 9 + 9 * 8),
        CONVOLUTION: 40 * ((2 + 2 + 8) * 9 + 8 * 81),
        REST: 0,
    }


@pytest.mark.parametrize(('layer', 'x'), [
    (WindowACmix(12, 3, 4, 2), torch.empty(2, 8, 12, 12)),
    (WindowACmix(12, 3, 7, 3), torch.empty(1, 5, 3, 12)),
    (ReducedACmix(12, 3, 1), torch.empty(2, 6, 5, 12)),
], ids=['windows', 'one window', 'reduced'])
def test_formula_is_what_a_form_without_detours_computes(layer, x, monkeypatch):
    """Attention by matrix products and the convolution in two steps, counted by torch."""
    monkeypatch.setattr(conv_path, 'shift_conv', functools.partial(
        conv_path.shift_conv, backend='two_step'))
    layer, x = layer.to('meta'), x.to('meta')
    with FlopCounterMode(display=False) as counter:
        layer(x)
    # What the bias of the fc comes to does not grow with the map, and is not counted.
    with FlopCounterMode(display=False) as bias_counter:
        convolved_bias(layer.fc.bias, layer.dep_conv.weight, x.shape[1:3], dilation=1)
    counted = counter.get_total_flops() - bias_counter.get_total_flops()
    assert total(count(layer, lambda: layer(x))).multiply_adds * 2 == counted


@pytest.mark.parametrize('mix', ['attn', 'conv'])
@pytest.mark.parametrize(('kind', 'arguments', 'shape'), [
    (ACmixConv2d, (6, 8), (1, 6, 4, 5)), (WindowACmix, (12, 3, 4), (1, 4, 8, 12)),
    (ReducedACmix, (12, 3, 2), (1, 4, 6, 12)), (PatchwiseACmix, (32, 2, 8, 3), (1, 32, 4, 5)),
], ids=lambda value: getattr(value, '__name__', ''))
def test_path_that_is_left_out_counts_nothing(mix, kind, arguments, shape):
    counts = {}
    for each in ('acmix', mix):
        layer = kind(*arguments, mix=each).eval()
        counts[each] = count(layer, functools.partial(layer, torch.zeros(shape)))
    kept, dropped = {'attn': (ATTENTION, CONVOLUTION), 'conv': (CONVOLUTION, ATTENTION)}[mix]
    assert counts[mix][dropped] == (0, 0)
    assert counts[mix][kept] == counts['acmix'][kept]


def test_layer_that_is_called_twice_counts_twice():
    layer = ACmixConv2d(6, 8)
    x = torch.zeros(1, 6, 4, 5)
    once = count(layer, lambda: layer(x))
    twice = count(layer, lambda: (layer(x), layer(x)))
    for name in OPERATOR_CLASSES:
        assert twice[name].multiply_adds == 2 * once[name].multiply_adds
        assert twice[name].parameters == once[name].parameters
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


EACH_NETWORK = pytest.mark.parametrize(
    ('backbone', 'network'), NETWORKS, ids=[network.name for _, network in NETWORKS])


# Millions of parameters, billions of multiply-adds, and of elementwise work beside them.
COUNTED = {
    'ACmix-ResNet-26': (10.488, 2.217, 0.027), 'ACmix-ResNet-38': (14.411, 2.859, 0.036),
    'ACmix-ResNet-50': (18.334, 3.502, 0.045), 'ACmix-SAN-10': (11.995, 1.888, 0.074),
    'ACmix-SAN-15': (16.414, 2.630, 0.104), 'ACmix-SAN-19': (20.829, 3.317, 0.129),
    'ACmix-PVT-T': (13.395, 1.998, None), 'ACmix-PVT-S': (24.824, 3.941, None),
    'ACmix-Swin-T': (28.650, 4.645, None), 'ACmix-Swin-S': (50.345, 8.993, None),
}


@EACH_NETWORK
def test_paper_networks(backbone, network):
    (parameters, multiply_adds), elementwise = count_network(backbone, network)
    pinned = COUNTED[network.name]
    assert parameters / 1e6 == pytest.approx(pinned[0], abs=0.0005)
    assert multiply_adds / 1e9 == pytest.approx(pinned[1], abs=0.0005)
    assert elementwise is None if pinned[2] is None else (
        elementwise / 1e9 == pytest.approx(pinned[2], abs=0.0005))
    if network.code_parameters:
        assert parameters / 1e6 == pytest.approx(network.code_parameters, abs=0.006)
    # What is published is rounded to one digit; three are off, as the notes of the table say.
    if network.name not in ('ACmix-ResNet-26', 'ACmix-ResNet-50', 'ACmix-SAN-10'):
        everything = (multiply_adds + (elementwise or 0)) / 1e9
        assert everything == pytest.approx(network.multiply_adds, abs=0.0505)


@pytest.fixture
def get_flops(monkeypatch, capsys):
    """Run the tool in this process, which has imported already what it needs; return its output."""
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['get_flops.py', *arguments])
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(ROOT / 'tools/get_flops.py'), run_name='__main__')
        return capsys.readouterr().out
    return run


def test_documentation_has_the_table_that_the_tool_prints(get_flops):
    assert get_flops('--zoo') in (ROOT / 'docs/config-zoo.md').read_text()


def row(report, name):
    columns = next(line for line in report.splitlines() if line.startswith(f'| {name} |'))
    return [float(number) for number in re.findall(r'([\d.]+)[MG]', columns)]


def test_tool_counts_a_detector(run_tool):
    done = run_tool('tools/get_flops.py', 'configs/shapes/maskrcnn_acmix_swin.py', '--shape', 224,
                    448)
    assert done.returncode == 0, done.stderr
    assert 'one image of 224×448' in done.stdout
    assert re.search(r'RPN, box heads \(\d+ proposals each\) and mask heads', done.stdout)
    for part in ('backbone, parameters', 'backbone, multiply-adds', 'model, parameters'):
        columns = row(done.stdout, part)
        assert columns[-1] == pytest.approx(sum(columns[:-1]), abs=0.03)
    # ACmix is in the backbone alone.
    assert row(done.stdout, 'backbone, multiply-adds')[:3] == row(
        done.stdout, 'model, multiply-adds')[:3]


def test_tool_counts_a_segmentor(get_flops):
    report = get_flops('configs/upernet_acmix_r50.py')
    assert 'one image of 512×512' in report
    assert 'without auxiliary training heads' in report
    assert row(report, 'model, multiply-adds')[-1] > row(report, 'backbone, multiply-adds')[-1]


def test_heads_of_a_cascade_count_in_every_stage():
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
    # Four 3×3 convolutions of 256 channels on 7×7 and two linear layers, and what predicts.
    box = 1000 * (49 * 4 * 9 * 256**2 + 49 * 256 * 1024 + 1024 * (81 + 4 * 80))
    # Four 3×3 convolutions on 14×14, one that doubles the size, and what predicts.
    mask = 100 * (196 * (4 * 9 * 256**2 + 4 * 256**2) + 784 * 256 * 80)
    assert row(report, name)[-1] - row(without, name)[-1] == pytest.approx(
        2 * (box + mask) / 1e9, abs=0.02)


def test_acmix_in_neck_and_heads_counts():
    report = complexity_report(load_config('configs/maskrcnn_r50_acmix_fpn_mask.py'), (64, 64))
    assert row(report, 'backbone, multiply-adds')[:3] == [0, 0, 0]
    assert all(row(report, 'model, multiply-adds'))


@pytest.mark.parametrize(('text', 'added'), [
    ("_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'", 'maskrcnn_acmix_swin_t'),
    ("_base_ = 'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py'", 'retinanet_acmix_pvt_t'),
], ids=['swin', 'pvt'])
def test_a_twin_differs_by_the_convolution_path(text, added, tmp_path):
    """The attention of a plain network is not ACmix's, and counts as rest."""
    (tmp_path / 'plain.py').write_text(text)
    plain = complexity_report(load_config(str(tmp_path / 'plain.py')), (448, 448))
    ours = complexity_report(load_config(f'configs/{added}.py'), (448, 448))
    for name in ('model, multiply-adds', 'model, parameters'):
        *_, convolution, _, everything = row(ours, name)
        assert row(plain, name)[-1] == pytest.approx(everything - convolution, abs=0.011)
        assert row(plain, name)[:3] == [0, 0, 0]


@pytest.mark.parametrize(('text', 'message'), [
    ('optimizer = 1', 'has no model'),
    ("_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'",
     'DETR does not run on an image of 64×64 on the meta device'),
], ids=['no model', 'other model'])
def test_refuses_what_it_cannot_count(text, message, tmp_path):
    (tmp_path / 'other.py').write_text(text)
    with pytest.raises(UsageError, match=message):
        complexity_report(load_config(str(tmp_path / 'other.py')), (64, 64))


@pytest.mark.parametrize(('arguments', 'message'), [
    ([], 'Pass either a config or --zoo.'),
    (['configs/maskrcnn_acmix_r50.py', '--zoo'], 'either a config or --zoo'),
    (['--zoo', '--shape', '8', '8'], 'omit --shape'),
    (['configs/absent.py'], 'The config configs/absent.py does not exist'),
])
def test_tool_refuses_bad_arguments(arguments, message, get_flops):
    with pytest.raises(SystemExit) as stopped:
        get_flops(*arguments)
    assert str(stopped.value).startswith('error: ')
    assert message in str(stopped.value)


@pytest.mark.parametrize(('shape', 'message'), [
    (['800'], 'expected 2 arguments'),
    (['0', '8'], "must be a positive integer, got '0'"),
    (['a', '8'], "must be a positive integer, got 'a'"),
])
def test_tool_refuses_bad_shapes(shape, message, get_flops, capsys):
    with pytest.raises(SystemExit):
        get_flops('configs/maskrcnn_acmix_r50.py', '--shape', *shape)
    assert f'error: argument --shape: {message}' in capsys.readouterr().err


def read_models():
    """The models and collections that model-index.yml imports."""
    models, collections = [], []
    for path in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        metafile = yaml.safe_load((ROOT / path).read_text())
        models += metafile['Models']
        collections += [collection['Name'] for collection in metafile['Collections']]
    return models, collections


def test_model_index_names_every_config_and_no_other():
    models, collections = read_models()
    named = [model['Config'] for model in models if model['Config'] is not None]
    assert sorted(named) == sorted(f'configs/{path.name}' for path in ROOT.glob('configs/*.py'))
    names = [model['Name'] for model in models]
    assert len(set(names)) == len(names)
    assert {model['In Collection'] for model in models} == set(collections)
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    assert sorted(index) == sorted(f'configs/{path.name}' for path in ROOT.glob('configs/*.yml'))


# Of the authors' table, on ImageNet.
TOP1 = {
    'acmix-resnet-26': 76.1, 'acmix-resnet-38': 77.4, 'acmix-resnet-50': 77.8,
    'acmix-san-10': 77.6, 'acmix-san-15': 78.4, 'acmix-san-19': 78.7,
    'acmix-pvt-t': 78.0, 'acmix-pvt-s': 81.7, 'acmix-swin-t': 81.9, 'acmix-swin-s': 83.5,
}


def test_model_index_quotes_the_authors_and_nobody_else():
    quoted = {}
    for model in read_models()[0]:
        if 'Results' in model:
            result, = model['Results']
            assert (result['Task'], result['Dataset']) == ('Image Classification', 'ImageNet-1k')
            assert model['Results From'].startswith('the authors of ACmix')
            quoted[model['Name'].removesuffix('_3rdparty_in1k')] = result['Metrics']
    assert quoted == {name: {'Top 1 Accuracy': accuracy} for name, accuracy in TOP1.items()}


@EACH_NETWORK
def test_model_index_has_the_counts_of_the_paper_networks(backbone, network):
    model, = (model for model in read_models()[0] if model['Config'] is None
              and model['Name'] == f'{network.name.lower()}_3rdparty_in1k')
    counted = count_network(backbone, network).count
    assert (model['Metadata']['Parameters'], model['Metadata']['FLOPs']) == counted


@pytest.mark.parametrize('name', ['maskrcnn_acmix_r50', 'retinanet_acmix_san19',
                                  'semfpn_acmix_pvt_t', 'upernet_acmix_swin_t'])
def test_model_index_has_the_counts_of_the_tool(name):
    model, = (model for model in read_models()[0] if model['Name'] == name)
    report = complexity_report(load_config(model['Config']), None)
    assert f"{model['Metadata']['Parameters'] / 1e6:.2f}M |" in report
    assert f"{model['Metadata']['FLOPs'] / 1e9:.2f}G |" in report


def test_every_config_names_its_plain_twin():
    for path in ROOT.glob('configs/*.py'):
        assert '# Plain twin: ' in path.read_text(), path
