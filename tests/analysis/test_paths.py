"""Contributions of the two paths to the output of a layer."""

import pytest
import torch
from helpers import relative_error
from helpers.analysis import BACKBONES, CASES
from helpers.weights import randomised
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.analysis.paths import inputs_of, last_layers, path_energies, stride
from acmix_mm.layers import ACmixConv2d, WindowACmix


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_energies_are_those_of_the_two_paths(case, monkeypatch):
    layer, shape = CASES[case]
    randomised(layer, 0.5)
    layer.rate1.fill_(0.75)
    layer.rate2.fill_(-1.5)
    x = torch.randn(shape)
    attention, convolution = path_energies(layer, x)
    assert layer.rate1 == 0.75
    assert layer.rate2 == -1.5

    # Compare with what the methods of both paths return inside the layer's forward pass.
    given = {}
    for name in ('attend', 'convolve'):
        method = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *rest, name=name, method=method: given.setdefault(
            name, method(*rest)).clone())
    out = layer(x)
    if isinstance(layer, ACmixConv2d):
        given['attend'] = 0.75 * given['attend']
    axis = 3 if layer.channels_last else 1
    if isinstance(layer, WindowACmix) and case != 'one window':
        # Rolled and padded: the contribution of attention is the output minus the convolution.
        shift = layer.shift_size
        rolled = given['convolve'].roll((shift, shift), (1, 2))
        expected = dict(attend=out - rolled, convolve=rolled)
    else:
        expected = given
    for energy, name in ((attention, 'attend'), (convolution, 'convolve')):
        assert relative_error(energy, expected[name].pow(2).mean(axis).sqrt()[0]) < 1e-4


def test_the_last_layer_of_each_stage_and_its_input():
    model = MODELS.build(BACKBONES['ResNet'])
    assert last_layers(model) == {'stage 0': 'layer1.0.conv2', 'stage 1': 'layer2.1.conv2',
                                  'stage 2': 'layer3.10.conv2', 'stage 3': 'layer4.0.conv2'}
    assert not last_layers(nn.Conv2d(3, 3, 1))
    layer = model.get_submodule('layer2.1.conv2')
    inputs = inputs_of(model, dict(layer=layer), lambda: model(torch.randn(1, 3, 64, 64)))['layer']
    assert inputs.shape == (1, 16, 8, 8)
    assert not layer._forward_pre_hooks
    assert stride((64, 64), inputs.shape[2:]) == 8
    # The network rounds the size of the map.
    assert stride((50, 70), (2, 3)) == 32
