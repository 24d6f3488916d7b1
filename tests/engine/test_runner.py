"""The runner of the tools."""

import pytest
from helpers.checkpoints import SWIN
from mmengine.registry import init_default_scope
from torch import nn

from acmix_mm.engine.runner import DataOnlyRunner

ACMIX = dict(type='ACmix', num_heads=2)
INVOLUTION = dict(type='Involution', group_channels=4)
NECK = dict(type='CSPNeXtPAFPN', in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1)
BACKBONE = dict(SWIN, type='ACmixSwinTransformer')


@pytest.mark.parametrize(('model', 'expected'), [
    (dict(NECK, conv_cfg=ACMIX), '5 ACmixConv2d; convolutions left unchanged: 18 1×1, 4 grouped'),
    (dict(type='ResNeXt', depth=50, base_channels=8, groups=2, conv_cfg=ACMIX),
     '1 ACmixConv2d; convolutions left unchanged: 36 1×1, 16 grouped'),
    (dict(type='CSPNeXt', deepen_factor=0.33, widen_factor=0.125, conv_cfg=ACMIX),
     '4 ACmixConv2d; convolutions left unchanged: 20 1×1, 6 grouped'),
    (dict(type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8, conv_cfg=INVOLUTION),
     '8 Involution2d; convolutions left unchanged: none'),
    (dict(BACKBONE, mixer=INVOLUTION), '4 Involution2d; convolutions left unchanged: none'),
    (NECK, None),
    (BACKBONE, None),
], ids=lambda value: value['type'] if isinstance(value, dict) else None)
def test_build_model_logs_its_convolution_layers(model, expected, log_text):
    init_default_scope('mmdet')
    runner = DataOnlyRunner.__new__(DataOnlyRunner)
    assert isinstance(runner.build_model(model), nn.Module)
    lines = [line for line in log_text().splitlines() if 'onvolution' in line]
    assert lines == ([f'Convolution layers built: {expected}.'] if expected else [])
