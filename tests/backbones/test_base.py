"""The base class: what backbones declare, and freezing, checkpoints and stages in general."""

import pytest
import torch
from helpers.checkpoints import load_pretrained
from helpers.weights import randomised
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.backbones import base
from acmix_mm.backbones.base import BACKBONES, Block, stochastic_depth
from acmix_mm.backbones.token_mixers import MIXERS, PATHS
from acmix_mm.utils.errors import CheckpointError

SMALL = {
    'ResNet': dict(depth=26, base_channels=8, strides=(1, 2, 2, 1)),
    'SAN': dict(depth=10, base_channels=32),
    'PVT': dict(embed_dims=4, num_layers=(1, 1, 2, 1)),
    'Swin': dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6)),
}
each_host = pytest.mark.parametrize('host', SMALL)
each_path = pytest.mark.parametrize('path', PATHS)
# Arguments with two frozen stages, and the names of what they freeze.
FROZEN = {
    'ResNet': (dict(norm_eval=False), ('conv1', 'bn1', 'layer1', 'layer2')),
    'SAN': ({}, ('conv_in', 'bn_in', 'conv0', 'layer0', 'bn0', 'conv1', 'layer1', 'bn1')),
    'Swin': (dict(use_abs_pos_embed=True, drop_rate=0.1),
             ('patch_embed', 'absolute_pos_embed', 'drop_after_pos', 'stages.0', 'stages.1',
              'norm0', 'norm1')),
}


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


@each_path
@each_host
def test_any_size(host, path):
    """All hosts round the size of a map up, but PVT, which drops what is left of its patches."""
    # In training, SAN's norms scale the weights of its attention, which have no softmax.
    model = randomised(BACKBONES[host](**SMALL[host], **PATHS[path])).train()
    for height, width in ((1, 1), (1, 150), (3, 5), (28, 29), (33, 47), (120, 17)):
        with torch.no_grad():
            outs = model(torch.randn(2, 3, height, width))
        for index, out in zip(model.out_indices, outs):
            stage = model.stage_info[index]
            size = [max(extent // stage.reduction, 1) if host == 'PVT'
                    else -(-extent // stage.reduction) for extent in (height, width)]
            assert out.shape == (2, stage.channels, *size)
            assert out.isfinite().all()


@each_path
@each_host
def test_every_parameter_gets_a_gradient(host, path):
    options = dict(zero_init_residual=False) if host == 'ResNet' else {}
    model = BACKBONES[host](**SMALL[host], **PATHS[path], **options, drop_path_rate=0.)
    model.init_weights()
    sum(out.square().sum() for out in model(torch.randn(2, 3, 64, 96))).backward()
    still = [name for name, parameter in model.named_parameters()
             if parameter.grad is None or not parameter.grad.any()]
    assert not still


@each_host
def test_recomputation_does_not_change_gradients(host, monkeypatch):
    recomputed, checkpoint = [], base.checkpoint

    def count(compute, *inputs, **options):
        recomputed.append(compute)
        return checkpoint(compute, *inputs, **options)

    monkeypatch.setattr(base, 'checkpoint', count)
    x = torch.randn(2, 3, 40, 36, requires_grad=True)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = BACKBONES[host](**SMALL[host], with_cp=with_cp, drop_path_rate=0.5).train()
        loss = sum(out.square().sum() for out in model(x))
        # If all paths of a block are dropped, its parameters get no gradients.
        gradients.append(torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True))
    for expected, actual in zip(*gradients):
        torch.testing.assert_close(actual, expected)
    assert len(recomputed) == sum(isinstance(module, Block) for module in model.modules())


@pytest.mark.parametrize('host', FROZEN)
def test_frozen_stages_stay_frozen(host):
    options, frozen = FROZEN[host]
    model = BACKBONES[host](**SMALL[host], **options, frozen_stages=2)
    assert model.train() is model
    for name, module in model.named_modules():
        assert module.training != name.startswith(frozen), name
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sum(out.square().sum() for out in model(torch.randn(2, 3, 64, 96))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
        assert (parameter.grad is None) == name.startswith(frozen), name
    for name, buffer in model.named_buffers():
        if 'running' in name:
            assert torch.equal(buffer, before[name]) == name.startswith(frozen), name


@each_host
def test_own_checkpoint_round_trip(host, tmp_path):
    model = randomised(BACKBONES[host](**SMALL[host]))
    torch.save(dict(state_dict={f'backbone.{key}': value
                                for key, value in model.state_dict().items()}),
               tmp_path / 'own.pth')
    loaded = load_pretrained(BACKBONES[host], tmp_path / 'own.pth', **SMALL[host]).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], value), key


@each_host
def test_checkpoints_that_do_not_fit_raise(host, tmp_path):
    backbone = BACKBONES[host]
    torch.save({'conv1.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='of no known network'):
        load_pretrained(backbone, tmp_path / 'other.pth', **SMALL[host])
    blocks = backbone.stage_blocks_of(backbone.arguments(SMALL[host]))
    deeper = {**SMALL[host], backbone.blocks_argument: [count + 1 for count in blocks]}
    for saved, loaded, message in ((deeper, SMALL[host], 'not in the model'),
                                   (SMALL[host], deeper, 'missing')):
        torch.save(backbone(**saved).state_dict(), tmp_path / 'saved.pth')
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(backbone, tmp_path / 'saved.pth', **loaded)


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
