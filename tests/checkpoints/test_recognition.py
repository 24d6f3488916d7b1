"""Namings of all hosts: they are recognised and converted to the keys of the backbones."""

import mmdet.models.backbones.resnet as mmdet_resnet
import mmdet.models.backbones.swin as mmdet_swin
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers import relative_error
from helpers.checkpoints import PVT, SWIN, load_pretrained, stage_outputs
from helpers.weights import randomised

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.checkpoints import read_pretrained
from acmix_mm.layers import WindowACmix
from acmix_mm.utils.errors import CheckpointError


def to_microsoft_keys(state_dict):
    """Convert a Swin state dict with MMDetection's keys to what Microsoft's code would save."""
    converted = {}
    for key, value in state_dict.items():
        if key.startswith('norm'):
            continue
        if '.downsample.' in key:
            # From channels, rows, columns to columns, rows, channels.
            value = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -2)
            value = value.movedim(-3, -1).flatten(-3)
        for new, old in (('stages.', 'layers.'), ('.attn.w_msa.', '.attn.'),
                         ('.ffn.layers.0.0.', '.mlp.fc1.'), ('.ffn.layers.1.', '.mlp.fc2.'),
                         ('patch_embed.projection.', 'patch_embed.proj.')):
            key = key.replace(new, old)
        converted[key] = value
    return {
        **converted,
        'norm.weight': torch.zeros(24),
        'norm.bias': torch.zeros(24),
        'head.weight': torch.zeros(10, 24),
        'head.bias': torch.zeros(10),
        'layers.0.blocks.1.attn_mask': torch.zeros(4, 49, 49),
    }


def plain_swin():
    """A random Swin whose output norms are at their initial values."""
    plain = mmdet_swin.SwinTransformer(**SWIN)
    plain.eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
        for name, parameter in plain.named_parameters():
            if name.startswith('norm'):
                parameter.fill_(1.0 if name.endswith('weight') else 0.0)
    return plain


def wrap(plain):
    """Checkpoints of a plain Swin, by source."""
    own = plain.state_dict()
    return {
        'Microsoft': dict(model=to_microsoft_keys(own)),
        'MMDetection': dict(state_dict=own),
        'bare': own,
        'detector': dict(state_dict={
            **{f'module.backbone.{key}': value for key, value in own.items()},
            'module.neck.weight': torch.zeros(3)}),
    }


@pytest.mark.parametrize('source', ['Microsoft', 'MMDetection', 'bare', 'detector'])
def test_plain_swin(source, tmp_path, log_text):
    plain = plain_swin()
    torch.save(wrap(plain)[source], tmp_path / 'swin.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'swin.pth', **SWIN)
    x = torch.randn(2, 3, 84, 68)
    for expected, actual in zip(plain(x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    for module in model.modules():
        if isinstance(module, WindowACmix):
            assert (module.rate1.item(), module.rate2.item()) == (1, 0)
    naming = "Microsoft's" if source == 'Microsoft' else "MMDetection's"
    assert f'recognised as plain Swin, {naming} naming' in log_text()
    assert 'rate1 = 1 and rate2 = 0' in log_text()
    assert 'stages.*.blocks.*.attn.w_msa.dep_conv.weight (4×)' in log_text()
    dropped = log_text().split('dropped: ')[1].split('\n')[0]
    assert dropped == ('norm.weight, norm.bias, head.weight, head.bias, '
                       'stages.0.blocks.1.attn_mask' if source == 'Microsoft' else 'none')


@torch.no_grad()
def test_timm_swin(tmp_path, log_text):
    plain = randomised(timm.create_model(
        'swin_tiny_patch4_window7_224', img_size=112, embed_dim=12, depths=(2, 2),
        num_heads=(3, 6), num_classes=3))
    torch.save(plain.state_dict(), tmp_path / 'swin.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'swin.pth', **SWIN)
    x = torch.randn(2, 3, 112, 112)
    maps = plain.forward_intermediates(x, intermediates_only=True, norm=False)
    for expected, actual in zip(maps, model(x)):
        # timm has no output norms.
        normed = F.layer_norm(expected.movedim(1, 3), expected.shape[1:2]).movedim(3, 1)
        assert relative_error(actual, normed) < 1e-5
    assert "recognised as plain Swin, timm's naming" in log_text()
    dropped = log_text().split('dropped: ')[1].split('\n')[0]
    assert dropped == 'norm.weight, norm.bias, head.fc.weight, head.fc.bias'


def plain_resnet(kind):
    """A small ResNet of another project, and the arguments of the equivalent ACmixResNet."""
    if kind == 'torchvision':
        plain = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 4, 1])
        return plain, dict(depth=26)
    if kind == 'timm, deep stem':
        plain = timm.create_model('resnet26d', layers=(1, 2, 4, 1))
        return plain, dict(depth=26, deep_stem=True, avg_down=True)
    return mmdet_resnet.ResNet(50, base_channels=8), dict(depth=50, base_channels=8)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['torchvision', 'timm, deep stem', 'MMDetection'])
def test_plain_resnets(kind, tmp_path, log_text):
    """Without ACmix stages the features are those of the plain network."""
    plain, arguments = plain_resnet(kind)
    randomised(plain)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = load_pretrained(ACmixResNet, tmp_path / 'resnet.pth', **arguments, acmix_stages=())
    x = torch.randn(1, 3, 64, 80)
    for expected, actual in zip(stage_outputs(plain, x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    naming = "timm's" if kind == 'timm, deep stem' else "torchvision's"
    assert f'recognised as plain ResNet, {naming} naming' in log_text()


@pytest.mark.parametrize('naming', ['authors', 'own'])
def test_acmix_round_trip(naming, tmp_path, log_text):
    saved = ACmixSwinTransformer(**SWIN).eval()
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if not name.startswith('norm'):
                parameter.normal_(std=0.3)
    own = saved.state_dict()
    torch.save(dict(model=to_microsoft_keys(own)) if naming == 'authors' else own,
               tmp_path / 'acmix.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'acmix.pth', **SWIN)
    x = torch.randn(1, 3, 75, 40)
    for expected, actual in zip(saved(x), model(x)):
        torch.testing.assert_close(actual, expected)
    assert 'recognised as ACmix-Swin' in log_text()
    assert 'rate1 = 1' not in log_text()


RESNET = dict(depth=26, base_channels=8)
SAN = dict(depth=10, base_channels=32)


@pytest.mark.parametrize(('network', 'arguments', 'recognised'), [
    (ACmixResNet, dict(acmix_stages=()), 'plain ResNet'),
    (ACmixResNet, dict(acmix_stages=(2,)), 'ACmix-ResNet'),
    (ACmixResNet, dict(acmix_cfg=dict(combine='sum', shift='fixed')), 'ACmix-ResNet'),
    (ACmixResNet, dict(mix='attn'), 'ResNet with attention only'),
    (ACmixResNet, dict(mix='conv'), 'ResNet with the convolution path only'),
    (ACmixResNet, dict(mixer=dict(type='SlidingAttention')), 'ResNet with attention only'),
    (ACmixResNet, dict(mixer=dict(type='Involution')), 'ResNet with involution'),
    (ACmixResNet, dict(mixer=dict(type='GlobalAttention')), 'ResNet with attention only'),
    (ACmixResNet, dict(mixer=dict(type='Conv2d', kernel_size=7)),
     'ResNet with convolutions larger than 3×3'),
    (ACmixSwinTransformer, {}, 'ACmix-Swin'),
    (ACmixSwinTransformer, dict(acmix_cfg=dict(combine='sum')), 'ACmix-Swin'),
    # Nothing tells it from a plain Swin.
    (ACmixSwinTransformer, dict(mix='attn'), 'plain Swin'),
    (ACmixSwinTransformer, dict(mix='conv'), 'Swin with the convolution path only'),
    (ACmixSwinTransformer, dict(mixer=dict(type='ACmix', num_heads=3)), 'ACmix-Swin'),
    (ACmixSwinTransformer, dict(mixer=dict(type='SlidingAttention', num_heads=3)),
     'Swin with attention only'),
    (ACmixSwinTransformer, dict(mixer=dict(type='Involution')), 'Swin with involution'),
    (ACmixSwinTransformer, dict(mixer=dict(type='GlobalAttention')), 'Swin with attention only'),
    (ACmixSwinTransformer, dict(last_mixer=dict(type='GlobalACmix')), 'ACmix-Swin'),
    (ACmixSwinTransformer, dict(mixer=dict(type='Conv2d')),
     'Swin with convolution in place of attention'),
    (ACmixPyramidVisionTransformer, dict(acmix_cfg=dict(combine='sum')), 'ACmix-PVT'),
    (ACmixPyramidVisionTransformer, dict(mix='attn'), 'plain PVT'),
    (ACmixPyramidVisionTransformer, dict(mix='conv'), 'PVT with the convolution path only'),
    (ACmixSAN, dict(acmix_cfg=dict(combine='sum')), 'ACmix-SAN'),
    (ACmixSAN, dict(mix='attn'), 'plain SAN'),
    (ACmixSAN, dict(mix='conv'), 'SAN with the convolution path only'),
], ids=lambda value: value.__name__ if isinstance(value, type) else str(value))
def test_log_names_the_kind_of_checkpoint(network, arguments, recognised, tmp_path, log_text):
    sizes = {'ResNet': RESNET, 'Swin': SWIN, 'PVT': PVT, 'SAN': SAN}[network.checkpoints.host]
    saved = network(**sizes, **arguments)
    torch.save(saved.state_dict(), tmp_path / 'saved.pth')
    load_pretrained(network, tmp_path / 'saved.pth', **sizes, **arguments)
    assert f'recognised as {recognised}, ' in log_text()
    found = read_pretrained(str(tmp_path / 'saved.pth'))
    assert found.is_acmix == ('ACmix' in recognised or 'convolution path' in recognised)


def test_error_names_the_kind_of_checkpoint(tmp_path):
    saved = ACmixResNet(**RESNET, mix='attn')
    torch.save(saved.state_dict(), tmp_path / 'saved.pth')
    with pytest.raises(CheckpointError, match=r'\(ResNet with attention only, .* does not fit'):
        load_pretrained(ACmixResNet, tmp_path / 'saved.pth', **RESNET)


def test_names_the_network_of_another_host(tmp_path):
    torch.save(randomised(ACmixPyramidVisionTransformer(**PVT)).state_dict(), tmp_path / 'pvt.pth')
    with pytest.raises(CheckpointError, match=r"another network \(ACmix-PVT, MMDetection's naming"
                                              r'\).* one of a Swin, plain or ACmix'):
        load_pretrained(ACmixSwinTransformer, tmp_path / 'pvt.pth', **SWIN)
    assert read_pretrained(str(tmp_path / 'pvt.pth')).host == 'PVT'
