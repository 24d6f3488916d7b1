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
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_empty_batch(host, training):
    model = BACKBONES[host](**SMALL[host]).train(training)
    maps = model(torch.zeros(0, 3, 65, 50))
    expected = model.eval()(torch.zeros(1, 3, 65, 50))
    assert [each.shape[1:] for each in maps] == [each.shape[1:] for each in expected]
    sum(each.sum() for each in maps).backward()
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert all(each.isfinite().all() for each in model.buffers())


def test_gradient_penalty_with_checkpointing():
    """Recomputed blocks have the same second derivatives."""
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = BACKBONES['Swin'](**SMALL['Swin'], with_cp=with_cp).double().eval()
        image = torch.randn(1, 3, 32, 64, dtype=torch.float64, requires_grad=True)
        gradient, = torch.autograd.grad(model(image)[3].square().sum(), image, create_graph=True)
        gradient.square().sum().backward()
        results.append([image.grad, *(each.grad for each in model.parameters())])
    assert results[0][0].abs().max() > 0
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


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
