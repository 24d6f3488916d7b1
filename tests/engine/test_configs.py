"""Tests of the configs: each trains and predicts, and differs little from its baseline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.samples import image_sample
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.engine.config import load_config, set_classes, set_data_root

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('configs/**/*.py')
                 if path.parent.name != '_base_')
# MMDetection's and MMSegmentation's configs of the plain hosts with the same schedule.
BASELINES = {
    'configs/maskrcnn_acmix_swin_t.py': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'configs/maskrcnn_acmix_swin_t_3x.py':
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'configs/maskrcnn_acmix_swin_s_3x.py':
        'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'configs/retinanet_acmix_swin_t.py': 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py',
    'configs/upernet_acmix_swin_t.py':
        'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'configs/upernet_acmix_swin_s.py':
        'mmseg::swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    'configs/retinanet_acmix_pvt_t.py': 'mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py',
    'configs/retinanet_acmix_pvt_s.py': 'mmdet::pvt/retinanet_pvt-s_fpn_1x_coco.py',
}


# Arguments with which every parameter gets a gradient in the first step.
ALL_BRANCHES_ACTIVE = {
    'ACmixSwinTransformer': dict(drop_path_rate=0.),
    'ACmixPyramidVisionTransformer': dict(drop_path_rate=0.),
    'ACmixResNet': dict(zero_init_residual=False),
    'ResNet': dict(zero_init_residual=False),
    'ACmixSAN': dict(),
}


def read_baseline(name, tmp_path):
    path = tmp_path / 'baseline.py'
    path.write_text(f'_base_ = {name!r}\n')
    return Config.fromfile(str(path)).to_dict()


@pytest.mark.parametrize(('path', 'baseline'), BASELINES.items(), ids=Path)
def test_differs_from_its_baseline_only_in_the_backbone(path, baseline, tmp_path):
    ours, plain = load_config(path).to_dict(), read_baseline(baseline, tmp_path)
    assert ours.pop('custom_imports') == dict(imports=['acmix_mm'])
    plain_type = plain['model']['backbone'].pop('type')
    assert ours['model']['backbone'].pop('type') == f'ACmix{plain_type}'
    keys = ours['optim_wrapper']['paramwise_cfg']['custom_keys']
    assert keys.pop('rate1') == keys.pop('rate2') == dict(decay_mult=0.)
    plain['optim_wrapper'].setdefault('paramwise_cfg', dict(custom_keys=dict()))
    assert ours == plain


@pytest.mark.parametrize('path', CONFIGS)
def test_trains_a_step_and_predicts(path):
    cfg = load_config(path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.update(ALL_BRANCHES_ACTIVE[cfg.model.backbone.type])
    if 'size' in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = (96, 96)
    # The demo may have left annotations in data/, against which the classes would be checked.
    set_data_root(cfg, 'nowhere')
    set_classes(cfg, ['a', 'b', 'c'])
    from mmengine.model import revert_sync_batchnorm
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    model.train()
    cfg.optim_wrapper.type = 'OptimWrapper'
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)

    decay = {id(group['params'][0]): group['weight_decay'] for group in optimizer.param_groups}
    # Of MMDetection's configs with Swin, only RetinaNet's decays norms and position tables.
    # The configs for generated shapes use Swin's recipe for all hosts.
    is_swin = 'shapes/' in path or (
        'Swin' in cfg.model.backbone.type and 'retinanet' not in path)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = name.endswith(('rate1', 'rate2')) or (is_swin and (
                name.endswith('relative_position_bias_table') or 'norm' in name))
            assert (decay[id(parameter)] == 0) == exempt, name

    # Not whether the parameter changes: the step of a rate may be less than the spacing of float32.
    largest = {}
    for name, parameter in model.backbone.named_parameters():
        if parameter.requires_grad:
            largest[name] = 0
            parameter.register_hook(
                lambda grad, name=name: largest.update({name: grad.abs().max().item()}))
    image, sample = image_sample(cfg)
    losses = model.train_step(dict(inputs=[image, image.flip(2)], data_samples=[
        sample, sample.clone()]), optimizer)
    assert torch.isfinite(losses['loss'])
    # Softmax cancels the bias of the position encoding.
    assert [name for name, gradient in largest.items()
            if gradient == 0 and not name.endswith('conv_p.bias')] == []

    model.eval()
    prediction = model.test_step(dict(inputs=[image], data_samples=[sample]))[0]
    if cfg.default_scope == 'mmseg':
        assert prediction.pred_sem_seg.shape == (96, 72)
        assert prediction.pred_sem_seg.data.max() < 3
    else:
        instances = prediction.pred_instances
        assert len(instances.bboxes) == len(instances.scores)
        if 'roi_head' in cfg.model:
            assert instances.masks.shape == (len(instances.bboxes), 96, 72)


def test_mmseg_bases_follow_the_import_of_this_package():
    """With MMSegmentation's fork, MMEngine does not find them before."""
    found = [path for path in CONFIGS if re.search(r"^[^#]*'mmseg::", (ROOT / path).read_text(),
                                                   re.MULTILINE)]
    assert found
    for path in found:
        assert "_base_ = ['./_base_/acmix_mm.py'," in (ROOT / path).read_text(), path


def test_backbones_are_found_from_both_scopes():
    """In MMDetection's and MMSegmentation's configs only the type of the backbone must change."""
    import mmdet.registry
    import mmseg.registry
    for registry in (mmdet.registry.MODELS, mmseg.registry.MODELS):
        backbone = registry.build(dict(type='ACmixSwinTransformer', embed_dims=12, depths=(1, 1),
                                       num_heads=(3, 3), strides=(4, 2), out_indices=(1,)))
        assert backbone(torch.zeros(1, 3, 32, 32))[0].shape == (1, 24, 4, 4)


def test_data_root_changes_every_path():
    cfg = load_config('configs/maskrcnn_acmix_swin_t.py')
    set_data_root(cfg, 'elsewhere')
    text = cfg.pretty_text
    assert 'data/coco/annotations' not in text
    assert cfg.val_evaluator.ann_file == 'elsewhere/annotations/instances_val2017.json'
    assert cfg.test_dataloader.dataset.data_root == 'elsewhere'


def test_classes_are_set_for_every_head_and_dataset():
    cfg = load_config('configs/cascade_maskrcnn_acmix_swin_t_3x.py')
    set_classes(cfg, ['date', 'fig'])
    heads = [*cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head]
    if isinstance(heads[-1], list):
        heads = [*heads[:-1], *heads[-1]]
    assert [head.num_classes for head in heads] == [2] * len(heads)
    assert cfg.val_dataloader.dataset.metainfo.classes == ('date', 'fig')
    cfg = load_config('configs/upernet_acmix_swin_t.py')
    set_classes(cfg, ['sky', 'pavement'])
    dataset = cfg.train_dataloader.dataset
    assert (dataset.type, dataset.reduce_zero_label, dataset.img_suffix) == (
        'BaseSegDataset', True, '.jpg')
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 2


def test_acmix_r50_trains_at_detection_size():
    """Train on the config's batch, two images of 800×1344, in a separate process."""
    done = subprocess.run([sys.executable, '-c', '''
import re
import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from helpers.samples import image_sample
from acmix_mm.engine.config import load_config

cfg = load_config('configs/maskrcnn_acmix_r50.py')
init_default_scope('mmdet')
cfg.model.backbone.init_cfg = None
model = revert_sync_batchnorm(MODELS.build(cfg.model))
model.init_weights()
model.train()
before = model.backbone.layer1[0].conv2.fc.weight.clone()
optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
image, sample = image_sample(cfg, 800, 1344)
for _ in range(2):
    loss = model.train_step(dict(inputs=[image, image.flip(2)],
                                 data_samples=[sample, sample.clone()]), optimizer)['loss']
moved = not torch.equal(before, model.backbone.layer1[0].conv2.fc.weight)
with open('/proc/self/status') as status:
    peak = int(re.search(r'VmHWM:\\s+(\\d+) kB', status.read()).group(1)) / 2**20
print('measured', loss.isfinite().item(), moved, peak)
'''], cwd=ROOT, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    finite, moved, peak = done.stdout.splitlines()[-1].split()[1:]
    assert (finite, moved) == ('True', 'True')
    assert 2 < float(peak) < 12
