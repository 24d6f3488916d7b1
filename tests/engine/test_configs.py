"""Tests of the configs: each trains and predicts, and differs little from its baseline."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, ROOT
from helpers.samples import image_sample
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.engine.config import check_data, load_config, set_classes, set_data_root
from acmix_mm.utils.errors import UsageError

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
    'configs/mask2former_acmix_swin_t_coco.py':
        'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    'configs/mask2former_acmix_swin_t_ade20k.py':
        'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
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
    'CSPDarknet': dict(),
    'CSPNeXt': dict(),
}


NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm)
# Baselines that train the backbone at a tenth of the learning rate.
LOW_BACKBONE_RATE = re.compile('mask2former|dino')
# The keys of what a plain Swin lacks in configs with such a baseline.
FULL_RATE = {'attn.w_msa.fc': dict(lr_mult=1.), 'attn.w_msa.dep_conv': dict(lr_mult=1.),
             'attn.w_msa.rate': dict(lr_mult=1., decay_mult=0.)}


def is_exempt_from_decay(path, name, is_norm):
    """Whether a parameter has no weight decay: the rates, and what the baseline exempts."""
    if name.endswith(('rate1', 'rate2')):
        return True
    if 'yolox' in path or 'rtmdet' in path:
        return is_norm or name.endswith('bias')
    position_table = name.endswith('relative_position_bias_table')
    if 'mask2former' in path:
        embedding = re.search('query_embed|query_feat|level_embed', name)
        return is_norm or position_table or embedding is not None
    # The configs for generated shapes use Swin's recipe for all hosts.
    if 'shapes/' in path or ('swin' in path and not re.search('retinanet|dino', path)):
        return position_table or 'norm' in name
    return False


# Options for one small image outside a runner.
SINGLE_IMAGE = {
    'configs/dino_acmix_swin_t.py': {'model.num_queries': 10,
                                     'model.test_cfg.max_per_img': 10},
    'configs/mask2former_acmix_swin_t_coco.py': {'model.data_preprocessor.batch_augments': None},
    'configs/rtmdet_acmix_s.py': {'model.data_preprocessor.pad_size_divisor': 32},
    'configs/yolox_acmix_s.py': {'model.data_preprocessor.batch_augments': None},
}


def with_fewer_boxes(cfg):
    """Make a two-stage detector propose, sample and return few boxes, to save time."""
    if 'roi_head' not in cfg.model:
        return
    train_cfg, test_cfg = cfg.model.train_cfg, cfg.model.test_cfg
    train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    for stage in train_cfg.rcnn if isinstance(train_cfg.rcnn, list) else [train_cfg.rcnn]:
        stage.sampler.num = 16
    test_cfg.rpn.update(nms_pre=100, max_per_img=50)
    test_cfg.rcnn.max_per_img = 4


def read_baseline(name, tmp_path):
    path = tmp_path / 'baseline.py'
    path.write_text(f'_base_ = {name!r}\n')
    return Config.fromfile(str(path)).to_dict()


@pytest.mark.parametrize(('path', 'baseline'), BASELINES.items(), ids=Path)
def test_differs_from_its_baseline_only_in_the_backbone(path, baseline, tmp_path):
    ours, plain = load_config(path).to_dict(), read_baseline(baseline, tmp_path)
    # MMSegmentation's Mask2Former imports modules of MMDetection.
    imports = plain.pop('custom_imports', dict(imports=[]))
    if imports['imports'] == 'mmdet.models':
        imports['imports'] = ['mmdet.models']
    assert ours.pop('custom_imports') == dict(imports, imports=[*imports['imports'], 'acmix_mm'])
    plain_type = plain['model']['backbone'].pop('type')
    assert ours['model']['backbone'].pop('type') == f'ACmix{plain_type}'
    plain['optim_wrapper'].setdefault('paramwise_cfg', dict(custom_keys=dict()))
    added = new_custom_keys(ours, plain)
    if LOW_BACKBONE_RATE.search(path):
        assert added == FULL_RATE
    else:
        assert added == dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))
    assert ours == plain


@pytest.mark.parametrize(('path', 'baseline'), [
    ('configs/yolox_acmix_s.py', 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'),
    ('configs/rtmdet_acmix_s.py', 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py')])
def test_differs_from_its_baseline_only_in_conv_cfg(path, baseline, tmp_path):
    ours, plain = load_config(path).to_dict(), read_baseline(baseline, tmp_path)
    assert ours.pop('custom_imports') == dict(imports=['acmix_mm'])
    conv_cfg = ours.pop('conv_cfg')
    assert conv_cfg == dict(type='ACmix', num_heads=4)
    assert ours['model']['neck'].pop('conv_cfg') == conv_cfg
    assert ours['model']['bbox_head'].pop('conv_cfg') == conv_cfg
    plain['optim_wrapper']['paramwise_cfg']['custom_keys'] = dict()
    assert new_custom_keys(ours, plain) == dict(rate1=dict(decay_mult=0.),
                                                rate2=dict(decay_mult=0.))
    # The baseline of RTMDet inherits that of another schedule.
    batch_sizes = [each['auto_scale_lr'].pop('base_batch_size') for each in (ours, plain)]
    assert batch_sizes == ([256, 16] if 'rtmdet' in path else [64, 64])
    assert ours == plain


def new_custom_keys(ours, plain):
    """Remove the keys from a config that its baseline does not have, and return them."""
    keys, theirs = (each['optim_wrapper']['paramwise_cfg']['custom_keys'] for each in (ours, plain))
    return {key: keys.pop(key) for key in list(keys) if key not in theirs}


@pytest.mark.parametrize('path', CONFIGS)
def test_trains_a_step_and_predicts(path):
    cfg = load_config(path, SINGLE_IMAGE.get(path))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.update(ALL_BRANCHES_ACTIVE[cfg.model.backbone.type])
    with_fewer_boxes(cfg)
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

    norms = {id(parameter) for module in model.modules() if isinstance(module, NORMS)
             for parameter in module.parameters(recurse=False)}
    groups = {id(group['params'][0]): group for group in optimizer.param_groups}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group, is_norm = groups[id(parameter)], id(parameter) in norms
            assert (group['weight_decay'] == 0) == is_exempt_from_decay(path, name, is_norm), name
            is_slow = (LOW_BACKBONE_RATE.search(path) and name.startswith('backbone.')
                       and not re.search(r'\.w_msa\.(fc|dep_conv|rate)', name))
            rate = (0.1 if is_slow else 1) * cfg.optim_wrapper.optimizer.lr
            assert group['lr'] == pytest.approx(rate), name

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


def test_mask_head_without_positive_rois():
    """An image without objects gives the mask head, which has ACmix, an empty batch."""
    cfg = load_config('configs/maskrcnn_r50_acmix_fpn_mask.py', {
        'model.backbone.init_cfg': None, 'model.backbone.base_channels': 8,
        'model.neck.in_channels': [32, 64, 128, 256],
        'model.roi_head.bbox_head.fc_out_channels': 16})
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).train()
    image, sample = image_sample(cfg, 64, 64)
    sample.gt_instances = sample.gt_instances[:0]
    batch = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), training=True)
    losses = model(**batch, mode='loss')
    assert losses['loss_mask'] == 0
    model.parse_losses(losses)[0].backward()
    for parameter in model.roi_head.mask_head.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


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


def test_classes_are_set_for_query_based_heads():
    for name, head in (('mask2former_acmix_swin_t_coco', 'panoptic_head'),
                       ('mask2former_acmix_swin_t_ade20k', 'decode_head')):
        cfg = load_config(f'configs/{name}.py')
        set_data_root(cfg, 'nowhere')
        set_classes(cfg, ['date', 'fig'])
        # The last weight is that of queries without an object.
        assert cfg.model[head].loss_cls.class_weight == [1., 1., 0.1]
        if head == 'decode_head':
            assert cfg.model[head].num_classes == 2
        for part in ('panoptic_head', 'panoptic_fusion_head') if head == 'panoptic_head' else ():
            assert (cfg.model[part].num_things_classes, cfg.model[part].num_stuff_classes) == (2, 0)
    cfg = load_config('configs/dino_acmix_swin_t.py')
    set_data_root(cfg, 'nowhere')
    set_classes(cfg, ['date', 'fig'])
    assert cfg.model.bbox_head.num_classes == 2


def test_class_weights_of_other_classes_are_rejected(tmp_path):
    given = {'model.decode_head.num_classes': 3}
    for key, weights in (('loss_decode.class_weight', [1., 2., 2.]),
                         ('loss_decode.class_weight', [1., 1., 1., 1., 0.1])):
        cfg = load_config('configs/upernet_acmix_swin_t.py',
                          {**given, f'model.decode_head.{key}': weights})
        with pytest.raises(UsageError, match='is not for the 5 classes .* set it with '
                           if len(weights) == 3 else 'is not for the 2 classes'):
            set_classes(cfg, ['a', 'b', 'c', 'd', 'e'] if len(weights) == 3 else ['a', 'b'])
    # Weights that are given for the new classes stay.
    cfg = load_config('configs/upernet_acmix_swin_t.py', {
        'model.decode_head.loss_decode.class_weight': [2., 1.]})
    set_classes(cfg, ['a', 'b'])
    assert cfg.model.decode_head.loss_decode.class_weight == [2., 1.]
    panoptic = tmp_path / 'panoptic.py'
    panoptic.write_text(
        "_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'")
    with pytest.raises(UsageError, match="config's Mask2FormerHead is for panoptic segmentation"):
        set_classes(load_config(str(panoptic)), ['a', 'b'])


def test_label_maps_are_required_only_where_they_are_loaded(shapes):
    """The baseline of Mask2Former for instances inherits a folder of label maps."""
    cfg = load_config('configs/mask2former_acmix_swin_t_coco.py')
    set_data_root(cfg, str(shapes))
    set_classes(cfg, ('circle', 'square', 'triangle'))
    assert cfg.train_dataloader.dataset.data_prefix.seg
    check_data(cfg, ('train', 'val'))
    cfg.train_dataloader.dataset.pipeline[1].with_seg = True
    with pytest.raises(UsageError, match='panoptic_train2017/ does not exist'):
        check_data(cfg, ('train', 'val'))


def test_acmix_r50_trains_at_detection_size():
    """Train on an image of 800×1344, in a separate process."""
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
cfg.model.backbone.update(init_cfg=None, zero_init_residual=False)
model = revert_sync_batchnorm(MODELS.build(cfg.model))
model.init_weights()
model.train()
before = model.backbone.layer1[0].conv2.fc.weight.clone()
optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
image, sample = image_sample(cfg, 800, 1344)
loss = model.train_step(dict(inputs=[image], data_samples=[sample]), optimizer)['loss']
moved = not torch.equal(before, model.backbone.layer1[0].conv2.fc.weight)
with open('/proc/self/status') as status:
    peak = int(re.search(r'VmHWM:\\s+(\\d+) kB', status.read()).group(1)) / 2**20
print('measured', loss.isfinite().item(), moved, peak)
'''], cwd=ROOT, env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests')])},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    finite, moved, peak = done.stdout.splitlines()[-1].split()[1:]
    assert (finite, moved) == ('True', 'True')
    assert 2 < float(peak) < 7
