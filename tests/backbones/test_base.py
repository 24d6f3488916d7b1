"""The base class: what backbones declare, and freezing, checkpoints and stages in general."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.backbones.base import BACKBONES, Block, stochastic_depth
from acmix_mm.backbones.token_mixers import MIXERS

SMALL = {
    'ResNet': dict(depth=26, base_channels=8, strides=(1, 2, 2, 1)),
    'SAN': dict(depth=10, base_channels=32),
    'PVT': dict(embed_dims=4, num_layers=(1, 1, 2, 1)),
    'Swin': dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6)),
}
each_host = pytest.mark.parametrize('host', SMALL)


def test_backbones_are_in_the_order_of_the_paper():
    assert list(BACKBONES) == list(SMALL)
    assert all(MODELS.get(backbone.__name__) is backbone for backbone in BACKBONES.values())


@each_host
def test_declarations(host):
    backbone = BACKBONES[host]
    arguments = backbone.arguments(SMALL[host])
    assert {backbone.width_argument, backbone.blocks_argument} <= set(arguments)
    assert SMALL[host][backbone.width_argument] % backbone.width_step(arguments) == 0
    assert set(backbone.mixers) <= set(MIXERS)
    model = backbone(**SMALL[host])
    assert len(model.stage_info) == len(backbone.stage_blocks_of(arguments))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == sum(backbone.stage_blocks_of(arguments))
    # The plain network has none of ACmix's own parameters.
    plain = backbone(**SMALL[host], **backbone.plain_arguments)
    assert backbone.checkpoints.is_acmix(model.state_dict())
    assert not backbone.checkpoints.is_acmix(plain.state_dict())


@pytest.mark.parametrize(('variant', 'host', 'fixed'), [
    ('ACmixResNetV1c', 'ResNet', dict(deep_stem=True, avg_down=False)),
    ('ACmixResNetV1d', 'ResNet', dict(deep_stem=True, avg_down=True)),
    ('ACmixPyramidVisionTransformerV2', 'PVT', dict(
        patch_sizes=(7, 3, 3, 3), paddings=(3, 1, 1, 1), use_abs_pos_embed=False,
        norm_after_stage=True, use_conv_ffn=True)),
])
def test_a_variant_has_the_arguments_of_its_host(variant, host, fixed):
    arguments = MODELS.get(variant).arguments(SMALL[host])
    assert arguments == {**BACKBONES[host].arguments(SMALL[host]), **fixed}
    model = MODELS.build(dict(SMALL[host], type=variant))
    expected = BACKBONES[host](**SMALL[host], **fixed)
    assert repr(model).partition('(')[2] == repr(expected).partition('(')[2]


@each_host
def test_stages_have_the_declared_maps(host):
    model = BACKBONES[host](**SMALL[host]).eval()
    indices = range(len(model.stage_info))
    with torch.no_grad():
        maps = model.forward_stages(torch.randn(1, 3, 64, 96), indices)
    for stage, out in zip(model.stage_info, maps):
        assert out.shape == (1, stage.channels, 64 // stage.reduction, 96 // stage.reduction)
        assert isinstance(model.get_submodule(stage.module), nn.Module)


@each_host
def test_replaced_convolutions(host):
    model = BACKBONES[host](**SMALL[host])
    replaced = model.replaced_convolutions()
    assert len(replaced) == (8 if host == 'ResNet' else 0)
    for name, (mixer, norm) in replaced.items():
        block = model.get_submodule(name)
        assert (mixer, norm) == (block.conv2, block.bn2)


def test_stochastic_depth_rises_linearly():
    assert stochastic_depth(0.4, (2, 3)) == [
        pytest.approx(rates) for rates in ([0, 0.1], [0.2, 0.3, 0.4])]
