"""The paper's ablations, by option: how the paths combine, and how maps are shifted."""

import pytest
import torch
from torch.nn import functional as F

from acmix_mm.analysis.paths import path_energies
from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.layers.base import COMBINATIONS
from acmix_mm.layers.shift_path import SHIFTS
from acmix_mm.ops import shift_conv, shift_sum

LAYERS = {
    'Swin': (lambda **options: WindowACmix(12, 3, 7, **options), (2, 9, 15, 12)),
    'ResNet': (lambda **options: ACmixConv2d(8, 12, num_heads=3, stride=2, **options),
               (2, 8, 9, 15)),
    'PVT': (lambda **options: ReducedACmix(12, 3, 2, **options), (2, 9, 15, 12)),
    'SAN': (lambda **options: PatchwiseACmix(16, 4, 16, 3, **options), (2, 16, 9, 15)),
}
BACKBONES = {
    'Swin': (ACmixSwinTransformer, dict(embed_dims=12, depths=(2, 2), num_heads=(3, 6),
                                        strides=(4, 2), out_indices=(0, 1))),
    'ResNet': (ACmixResNet, dict(depth=26, base_channels=8, stage_blocks=(1, 1, 1, 1))),
    'PVT': (ACmixPyramidVisionTransformer, dict(embed_dims=4, num_layers=[1, 1, 1, 1])),
    'SAN': (ACmixSAN, dict(depth=10, base_channels=32)),
}


def twins(host, *options):
    """Layers of one host with the same weights where they have the same, in double."""
    build, size = LAYERS[host]
    layers = []
    for each in options:
        torch.manual_seed(1)
        layer = build(**each).double().eval()
        if layers:
            own = layer.state_dict()
            layer.load_state_dict({key: value for key, value in layers[0].state_dict().items()
                                   if key in own and own[key].shape == value.shape}, strict=False)
        layers.append(layer)
    return layers, torch.randn(size, dtype=torch.double)


@pytest.mark.parametrize('host', LAYERS)
def test_shifts_agree_at_the_start(host):
    """Moved maps, fixed kernels, and learned ones before they learn, in one or N groups."""
    layers, x = twins(host, dict(), dict(shift='tensor'), dict(shift='fixed'),
                      dict(shift_groups=1), dict(shift='fixed', shift_groups=1))
    expected, *others = (layer(x) for layer in layers)
    for actual in others:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('host', LAYERS)
def test_which_shifts_are_learned(host):
    for shift in SHIFTS:
        for groups in (None, 1):
            (layer,), x = twins(host, dict(shift=shift, shift_groups=groups))
            layer.train()(x).square().sum().backward()
            learned = [name for name, _ in layer.dep_conv.named_parameters()]
            assert learned == (['weight'] if shift in ('learned', 'random') else [])
            assert all(parameter.grad is not None for parameter in layer.parameters())
            assert layer.fc.weight.grad.abs().max() > 0
            if learned:
                heads = layer.dep_conv.num_heads if groups is None else 1
                assert len(layer.dep_conv.weight) % heads == 0
                assert len(layer.dep_conv.kernels) == len(
                    layer.dep_conv.weight) * (layer.dep_conv.num_heads // heads)
    (random,), _ = twins(host, dict(shift='random'))
    assert 0.05 < random.dep_conv.weight.std() * 9 < 1
    assert not torch.equal(random.dep_conv.weight, twins(host, dict())[0][0].dep_conv.weight)


@pytest.mark.parametrize('host', LAYERS)
@pytest.mark.parametrize('shift', ['learned', 'tensor'])
def test_paths_combine_as_said(host, shift):
    """Against the two paths alone."""
    paths, x = twins(host, *(dict(mix=mix, shift=shift) for mix in ('attn', 'conv')))
    attention, convolution = (layer(x) for layer in paths)
    weights = {**paths[0].state_dict(), **paths[1].state_dict()}
    for combine, expected in (('rates', 0.3 * attention + 0.9 * convolution),
                              ('convex', 0.3 * attention + 0.7 * convolution),
                              ('sum', attention + convolution)):
        layer = LAYERS[host][0](combine=combine, shift=shift).double().eval()
        layer.load_state_dict(weights, strict=False)
        with torch.no_grad():
            for name, value in (('rate1', 0.3), ('rate2', 0.9)):
                if hasattr(layer, name):
                    getattr(layer, name).fill_(value)
        torch.testing.assert_close(layer(x), expected)
        energies = path_energies(layer, x[:1])
        channels = 1 if host in ('ResNet', 'SAN') else 3
        rate = {'rates': 0.9, 'convex': 0.7, 'sum': 1}[combine]
        for energy, path in zip(energies, (expected - rate * convolution, rate * convolution)):
            torch.testing.assert_close(energy, path[:1].square().mean(channels)[0].sqrt())
        rates = [name for name, _ in layer.named_parameters() if name.startswith('rate')]
        assert rates == {'rates': ['rate1', 'rate2'], 'convex': ['rate1'], 'sum': []}[combine]


@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize('size', [(7, 10), (1, 1), (2, 5)], ids=str)
def test_moved_maps_are_convolved_ones(size, stride, dilation):
    maps = torch.randn(2, 6, 4, *size, dtype=torch.double)
    matrix, bias = torch.randn(9, 6, dtype=torch.double), torch.randn(9, dtype=torch.double)
    shifts = torch.eye(9, dtype=torch.double).view(9, 3, 3).expand(4, -1, -1, -1)
    for each in (bias, None):
        moved = shift_sum(maps, matrix, each, stride=stride, dilation=dilation)
        mixed = torch.einsum('jm,bmdhw->bdjhw', matrix, maps)
        if each is not None:
            mixed = mixed + bias[:, None, None]
        convolved = F.conv2d(mixed.flatten(1, 2), shifts, groups=4, stride=stride,
                             padding=dilation, dilation=dilation)
        torch.testing.assert_close(moved, convolved)
        torch.testing.assert_close(moved, shift_conv(maps, matrix, shifts, each, stride=stride,
                                                     dilation=dilation, backend='reference'))


@pytest.mark.parametrize('host', BACKBONES)
def test_backbones_take_them(host, tmp_path):
    network, arguments = BACKBONES[host]
    options = dict(combine='convex', shift='fixed', shift_groups=1)
    model = network(**arguments, acmix_cfg=options)
    outs = model(torch.randn(2, 3, 64, 64))
    sum(out.square().mean() for out in outs).backward()
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith('.rate1') for name in names)
    assert not any(name.endswith(('.rate2', '.dep_conv.weight')) for name in names)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    loaded = network(**arguments, acmix_cfg=options,
                     init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')))
    loaded.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize('combine', COMBINATIONS)
@pytest.mark.parametrize('host', ['Swin', 'ResNet'])
def test_plain_weights_start_them(combine, host, tmp_path, said):
    """As the host where a rate can leave the new path out, and said so where it cannot."""
    network, arguments = BACKBONES[host]
    plain = network(**arguments, **(dict(acmix_stages=()) if host == 'ResNet' else
                                    dict(mix='attn')))
    if host == 'ResNet':
        # Of few channels, so that the path has them exactly.
        torch.nn.init.zeros_(plain.layer1[0].conv2.weight[:, 2:].data)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = network(**arguments, acmix_cfg=dict(combine=combine), init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'plain.pth')))
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    expected, actual = plain.eval()(x)[0], model.eval()(x)[0]
    is_same = torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert is_same == (combine != 'sum')
    if combine == 'sum':
        expected = 'There are no rates' if host == 'Swin' else 'dropped: layer1.0.conv2.weight'
        assert expected in said()


@pytest.mark.parametrize('mix', ['attn', 'conv'])
def test_one_path_keeps_the_one_rate(mix, tmp_path):
    network, arguments = BACKBONES['Swin']
    saved = network(**arguments, acmix_cfg=dict(combine='convex')).eval()
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if name.endswith('.rate1'):
                parameter.fill_(1 if mix == 'attn' else 0)
    torch.save(saved.state_dict(), tmp_path / 'convex.pth')
    model = network(**arguments, mix=mix, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'convex.pth')))
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    for expected, actual in zip(saved(x), model.eval()(x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(combine='mean'), 'combine must be one of rates, convex, sum'),
    (dict(shift='roll'), 'shift must be one of learned, random, fixed, tensor'),
    (dict(shift_groups=2), 'shift_groups must be 1, or None for one group for each of the 3 heads'),
])
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ACmixConv2d(8, 12, num_heads=3, **options)
