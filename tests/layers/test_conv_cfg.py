"""The registered convolution types, as ``conv_cfg`` of OpenMMLab modules."""

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.model import kaiming_init
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils._pytree import tree_flatten

from acmix_mm.engine.config import load_config
from acmix_mm.layers import ACmixConv2d
from acmix_mm.layers.padded_conv import PaddedConvolution

ACMIX = dict(type='ACmix', num_heads=2, attn_kernel_size=5)
TYPES = [ACMIX, dict(ACMIX, type='SlidingAttention'), dict(ACMIX, type='ACmixConvolution'),
         dict(type='Involution', group_channels=4), dict(type='GlobalAttention', num_heads=2),
         dict(type='GlobalACmix', num_heads=2),
         dict(type='RandomAttention', num_heads=2, random_blocks=1, seed=3),
         dict(type='BigBirdAttention', num_heads=2, block_size=2, global_tokens=4)]


def test_conv_cfg_builds_acmix_and_plain_pointwise_convolutions():
    conv_cfg = dict(type='ACmix', num_heads=2, attn_kernel_size=5, mix='acmix')
    assert type(build_conv_layer(conv_cfg, 8, 16, 1, bias=False)) is nn.Conv2d
    assert type(build_conv_layer(conv_cfg, 8, 16, kernel_size=(1, 1), stride=2)) is nn.Conv2d
    layer = build_conv_layer(conv_cfg, 8, 16, 3, stride=2, padding=1, bias=False)
    assert isinstance(layer, ACmixConv2d)
    assert (layer.num_heads, layer.attn_kernel_size, layer.conv1.bias) == (2, 5, None)
    module = ConvModule(8, 16, 3, padding=2, dilation=2, conv_cfg=conv_cfg,
                        norm_cfg=dict(type='BN'))
    assert module(torch.randn(2, 8, 9, 5)).shape == (2, 16, 9, 5)
    assert (module.kernel_size, module.padding, module.dilation) == ((3, 3), 2, (2, 2))
    assert_initial_values(module.conv)


@pytest.mark.parametrize('conv_cfg', TYPES, ids=lambda cfg: cfg['type'])
def test_grouped_convolutions_stay_plain(conv_cfg):
    arguments = dict(stride=2, padding=2, dilation=2, groups=4, bias=False)
    layer = build_conv_layer(conv_cfg, 8, 8, 3, **arguments)
    assert type(layer) is nn.Conv2d
    assert repr(layer) == repr(nn.Conv2d(8, 8, 3, **arguments))
    assert repr(build_conv_layer(conv_cfg, 8, 8, 3, *arguments.values())) == repr(layer)
    # An option of nn.Conv2d that the layers do not have, and kernels that they do not have.
    layer = build_conv_layer(conv_cfg, 8, 16, (4, 3), groups=8, padding_mode='circular')
    assert repr(layer) == repr(nn.Conv2d(8, 16, (4, 3), groups=8, padding_mode='circular'))
    # One group is the default of a convolution.
    for layer in (build_conv_layer(conv_cfg, 8, 8, 3, groups=1),
                  build_conv_layer(conv_cfg, 8, 8, 3, 1, 1, 1, 1)):
        assert isinstance(layer, PaddedConvolution)


def assert_initial_values(layer):
    one_hot = torch.eye(9).view(9, 3, 3)
    assert all(torch.equal(kernels, one_hot) for kernels in layer.dep_conv.weight)
    assert layer.rate1.item() == layer.rate2.item() == 0.5


def test_initial_values_survive_the_initialisation_of_a_detector():
    cfg = load_config('configs/shapes/maskrcnn_acmix_r50.py')
    conv_cfg = dict(type='ACmix', num_heads=4)
    cfg.model.neck.conv_cfg = cfg.model.roi_head.mask_head.conv_cfg = conv_cfg
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            kaiming_init(module)
    layers = [module for module in detector.modules() if isinstance(module, ACmixConv2d)]
    assert len(layers) == 16 + 4 + 4
    for layer in layers:
        assert_initial_values(layer)


@pytest.mark.parametrize(('cfg', 'inputs', 'layers'), [
    (dict(type='mmdet.ResNet', depth=50, base_channels=8), (1, 3, 40, 56), 17),
    (dict(type='mmdet.ResNet', depth=18, base_channels=8), (1, 3, 33, 47), 17),
    (dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=3),
     [(1, 8, 20, 13), (1, 16, 10, 7)], 2),
    (dict(type='mmdet.RetinaHead', num_classes=3, in_channels=8, feat_channels=8),
     [(1, 8, size, size) for size in (16, 8, 4, 2, 1)], 8),
    (dict(type='mmdet.FCNMaskHead', in_channels=8, conv_out_channels=8, num_classes=3),
     (5, 8, 14, 14), 4),
    (dict(type='mmdet.Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8,
          fc_out_channels=16, num_classes=3), (5, 8, 7, 7), 4),
    (dict(type='mmseg.UPerHead', in_channels=[8, 16], in_index=[0, 1], channels=8, num_classes=3,
          norm_cfg=dict(type='BN')), [(2, 8, 20, 13), (2, 16, 10, 7)], 3),
    (dict(type='mmseg.FCNHead', in_channels=8, channels=8, num_classes=3, in_index=0,
          dilation=2), [(2, 8, 9, 13)], 3),
], ids=lambda value: value['type'] if isinstance(value, dict) else None)
def test_acmix_in_openmmlab_modules(cfg, inputs, layers):
    """Each module builds with ACmix, has the output shapes of the plain module, and trains."""
    x = ([torch.randn(size) for size in inputs] if isinstance(inputs, list) else
         torch.randn(inputs))
    plain, ours = MODELS.build(dict(cfg)), MODELS.build(dict(cfg, conv_cfg=ACMIX))
    assert len([module for module in ours.modules() if isinstance(module, ACmixConv2d)]) == layers
    ours.init_weights()
    expected, actual = (tree_flatten(module(x))[0] for module in (plain, ours))
    assert [each.shape for each in actual] == [each.shape for each in expected]
    sum(each.square().sum() for each in actual).backward()
    for module in ours.modules():
        if isinstance(module, ACmixConv2d):
            assert module.rate1.grad is not None


@pytest.mark.parametrize(('type_', 'mix'), [
    ('SlidingAttention', 'attn'), ('ACmixConvolution', 'conv')])
def test_conv_cfg_builds_one_path_and_plain_pointwise_convolutions(type_, mix):
    conv_cfg = dict(type=type_, num_heads=2, attn_kernel_size=5)
    assert type(build_conv_layer(conv_cfg, 8, 16, 1, bias=False)) is nn.Conv2d
    module = ConvModule(8, 16, 3, stride=2, padding=2, dilation=2, conv_cfg=conv_cfg,
                        norm_cfg=dict(type='BN'))
    assert isinstance(module.conv, ACmixConv2d)
    assert (module.conv.mix, module.conv.attn_kernel_size) == (mix, 5)
    assert module(torch.randn(2, 8, 9, 5)).shape == (2, 16, 5, 3)


@pytest.mark.parametrize('type_', ['SlidingAttention', 'ACmixConvolution'])
@pytest.mark.parametrize(('cfg', 'sizes', 'layers'), [
    (dict(type='mmdet.ResNet', depth=50, base_channels=8), (1, 3, 40, 56), 17),
    (dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=3),
     [(1, 8, 20, 13), (1, 16, 10, 7)], 2),
    (dict(type='mmseg.UPerHead', in_channels=[8, 16], in_index=[0, 1], channels=8, num_classes=3,
          norm_cfg=dict(type='BN')), [(2, 8, 20, 13), (2, 16, 10, 7)], 3),
], ids=lambda value: value['type'] if isinstance(value, dict) else None)
def test_single_path_in_openmmlab_modules(type_, cfg, sizes, layers):
    init_default_scope(cfg['type'].split('.')[0])
    x = [torch.randn(size) for size in sizes] if isinstance(sizes, list) else torch.randn(sizes)
    conv_cfg = dict(type=type_, num_heads=2, attn_kernel_size=5)
    plain, ours = MODELS.build(dict(cfg)), MODELS.build(dict(cfg, conv_cfg=conv_cfg))
    built = [module for module in ours.modules() if isinstance(module, ACmixConv2d)]
    assert len(built) == layers
    ours.init_weights()
    expected, actual = (tree_flatten(module(x))[0] for module in (plain, ours))
    assert [each.shape for each in actual] == [each.shape for each in expected]
    sum(each.square().sum() for each in actual).backward()
    assert all(module.conv3.weight.grad is not None for module in built)
