"""One training step of OpenMMLab's modules with this package's convolution types as conv_cfg."""

from typing import Any, NamedTuple

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils._pytree import tree_flatten

from acmix_mm.layers.padded_conv import PaddedConvolution

ACMIX = dict(type='ACmix', num_heads=2, attn_kernel_size=3)
BN = dict(type='BN')
GN = dict(type='GN', num_groups=2)
IMAGE = (2, 3, 64, 64)
# Maps of a pyramid with the same number of channels.
EQUAL = [(2, 8, size, size) for size in (16, 8, 4, 4, 2)]
# Maps of a backbone, whose channels rise.
RISING = [(2, channels, size, size) for channels, size in ((8, 16), (16, 8), (32, 4))]


class Case(NamedTuple):
    """A module.

    Attributes:
        name: its type, with the scope.
        arguments: its arguments, without ``conv_cfg``.
        inputs: shape of its input, or shapes if it reads a pyramid.
        replaced: number of convolutions that are replaced.
        grouped: number of grouped convolutions, which stay plain.
    """

    name: str
    arguments: dict[str, Any]
    inputs: Any
    replaced: int
    grouped: int = 0


def stage(blocks, channels, block='BASIC'):
    """A stage of HRNet with one module and the given number of blocks in each branch."""
    return dict(num_modules=1, num_branches=len(channels), block=block,
                num_blocks=(blocks,) * len(channels), num_channels=channels)


HRNET = dict(stage1=stage(1, (4,), 'BOTTLENECK'), stage2=stage(1, (4, 8)),
             stage3=stage(1, (4, 8, 16)), stage4=stage(1, (4, 8, 16, 32)))
RESNET = dict(depth=50, base_channels=8, norm_eval=False, zero_init_residual=False)
NECK = dict(in_channels=[8, 16, 32], out_channels=8)
DENSE_HEAD = dict(num_classes=3, in_channels=8, feat_channels=8)

CASES = [
    Case('mmdet.FPN', dict(NECK, num_outs=5, add_extra_convs='on_output'), RISING, 3 + 2),
    Case('mmdet.PAFPN', dict(NECK, num_outs=3), RISING, 3 + 2 + 2),
    Case('mmdet.YOLOXPAFPN', dict(NECK, num_csp_blocks=1), RISING, 4 + 2),
    Case('mmdet.CSPNeXtPAFPN', dict(NECK, num_csp_blocks=1), RISING, 2 + 3, 4),
    Case('mmdet.ChannelMapper', dict(NECK, num_outs=4, norm_cfg=BN), RISING, 4),
    Case('mmdet.NASFCOS_FPN', dict(in_channels=[8, 8, 16, 32], out_channels=8, num_outs=5,
                                   norm_cfg=BN), [(2, 8, 32, 32), *RISING], 12, 7),
    Case('mmdet.BFP', dict(in_channels=8, num_levels=3, refine_level=1, refine_type='conv',
                           norm_cfg=BN), EQUAL[:3], 1),
    Case('mmdet.RetinaHead', DENSE_HEAD, EQUAL, 8),
    Case('mmdet.FCOSHead', dict(DENSE_HEAD, norm_cfg=GN), EQUAL, 8),
    Case('mmdet.ATSSHead', dict(DENSE_HEAD, norm_cfg=GN), EQUAL, 8),
    Case('mmdet.RTMDetHead', dict(DENSE_HEAD, norm_cfg=BN), EQUAL, 8),
    Case('mmdet.YOLOXHead', DENSE_HEAD, EQUAL[:3], 3 * (2 + 2)),
    Case('mmdet.FCNMaskHead', dict(in_channels=8, conv_out_channels=8, num_classes=3),
         (5, 8, 14, 14), 4),
    Case('mmdet.CSPDarknet', dict(deepen_factor=0.33, widen_factor=0.125), IMAGE, 1 + 4 + 8),
    Case('mmdet.CSPNeXt', dict(deepen_factor=0.33, widen_factor=0.125), IMAGE, 4, 6),
    Case('mmdet.ResNet', RESNET, IMAGE, 1 + 16),
    Case('mmdet.ResNeXt', dict(RESNET, groups=2), IMAGE, 1, 16),
    Case('mmdet.HRNet', dict(extra=HRNET, norm_eval=False), IMAGE, 40),
    Case('mmseg.FCNHead', dict(in_channels=8, channels=8, num_classes=3, in_index=0,
                               norm_cfg=BN), EQUAL[:1], 3),
    Case('mmseg.FPNHead', dict(in_channels=[8, 16, 32], in_index=[0, 1, 2], channels=8,
                               num_classes=3, feature_strides=[4, 8, 16], norm_cfg=BN),
         RISING, 1 + 1 + 2),
]


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
def test_training_step(case):
    train_one_step(case, ACMIX)


@pytest.mark.parametrize('conv_cfg', [
    dict(ACMIX, type='SlidingAttention'), dict(ACMIX, type='ACmixConvolution'),
    dict(type='Involution', group_channels=4)], ids=lambda cfg: cfg['type'])
def test_training_step_of_the_other_types_with_grouped_convolutions(conv_cfg):
    arguments = dict(in_channels=[8, 8, 8], out_channels=8, num_csp_blocks=1)
    train_one_step(Case('mmdet.CSPNeXtPAFPN', arguments, EQUAL[:3], 2 + 3, 4), conv_cfg)


def train_one_step(case, conv_cfg):
    """Train for one step; check the layers that were built, and their gradients."""
    init_default_scope(case.name.split('.')[0])
    model = MODELS.build(dict(case.arguments, type=case.name, conv_cfg=conv_cfg))
    model.init_weights()
    model.train()
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, PaddedConvolution)}
    grouped = [module for module in model.modules()
               if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert (len(layers), len(grouped)) == (case.replaced, case.grouped)

    x = ([torch.randn(shape) for shape in case.inputs] if isinstance(case.inputs, list) else
         torch.randn(case.inputs))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = sum(out.square().mean() for out in tree_flatten(model(x))[0])
    loss.backward()
    for layer_name, layer in layers.items():
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        for name, gradient in gradients.items():
            assert gradient is not None, f'{layer_name}.{name}'
            assert gradient.isfinite().all(), f'{layer_name}.{name}'
        assert any(gradient.abs().max() > 0 for gradient in gradients.values()), layer_name
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
