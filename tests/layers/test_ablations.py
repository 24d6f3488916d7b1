"""The paper's ablations: how the paths are combined and how maps are shifted."""

import pytest
import torch

from acmix_mm.analysis.paths import path_energies
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.layers.shift_path import SHIFTS

LAYERS = {
    'Swin': (lambda **options: WindowACmix(12, 3, 7, **options), (2, 9, 15, 12)),
    'ResNet': (lambda **options: ACmixConv2d(8, 12, num_heads=3, stride=2, **options),
               (2, 8, 9, 15)),
    'PVT': (lambda **options: ReducedACmix(12, 3, 2, **options), (2, 9, 15, 12)),
    'SAN': (lambda **options: PatchwiseACmix(16, 4, 16, 3, **options), (2, 16, 9, 15)),
}


def layers_of(host, *options):
    """Build a layer with each set of options, in double, sharing weights where shapes agree."""
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
def test_shifts_agree_at_initialisation(host):
    """Moved maps, fixed kernels and untrained learned kernels, in one group or one per head."""
    layers, x = layers_of(host, dict(), dict(shift='tensor'), dict(shift='fixed'),
                          dict(shift_groups=1), dict(shift='fixed', shift_groups=1))
    expected, *others = (layer(x) for layer in layers)
    for actual in others:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('host', LAYERS)
def test_learned_shifts(host):
    for shift in SHIFTS:
        for groups in (None, 1):
            (layer,), x = layers_of(host, dict(shift=shift, shift_groups=groups))
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
    (random,), _ = layers_of(host, dict(shift='random'))
    assert 0.05 < random.dep_conv.weight.std() * 9 < 1
    assert not torch.equal(random.dep_conv.weight, layers_of(host, dict())[0][0].dep_conv.weight)


@pytest.mark.parametrize('host', LAYERS)
@pytest.mark.parametrize('shift', ['learned', 'tensor'])
def test_combinations(host, shift):
    """Against layers with a single path."""
    paths, x = layers_of(host, *(dict(mix=mix, shift=shift) for mix in ('attn', 'conv')))
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
