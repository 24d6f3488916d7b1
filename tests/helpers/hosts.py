"""Comparison of a backbone without ACmix with the host of another library."""

import functools
from copy import deepcopy

import pytest
import torch
from helpers import relative_error
from torch import nn


def build_on_meta(network, arguments, on_cpu=('linspace',)):
    """Build a network on the meta device, in evaluation mode.

    Args:
        network: its class.
        arguments: arguments of its constructor.
        on_cpu: functions of torch that compute values all the same: hosts read drop path rates from
            ``linspace``.
    """
    with pytest.MonkeyPatch.context() as patch, torch.device('meta'):
        for name in on_cpu:
            patch.setattr(torch, name, functools.partial(getattr(torch, name), device='cpu'))
        model = network(**deepcopy(arguments))
    # MMDetection's train() does not return the model.
    model.eval()
    return model


def assert_equal_features(plain, ours, arguments, size):
    """Check the features of networks of full size, whose weights share memory.

    Args:
        plain: class of the host.
        ours: class of the backbone.
        arguments: arguments of the host.
        size: (height, width) of the image.
    """
    # Swin computes the indices of its position tables from arange.
    build = functools.partial(build_on_meta, on_cpu=('linspace', 'arange'))
    expected, actual = build(plain, arguments), build(ours, {**arguments, **ours.plain_arguments})
    weights = {name: parameter.shape for name, parameter in expected.named_parameters()}
    assert {name: parameter.shape for name, parameter in actual.named_parameters()} == weights
    noise, start = random_values(), 0
    for name, shape in weights.items():
        start = start if start + shape.numel() <= len(noise) else 0
        values = noise[start:start + shape.numel()].view(shape)
        start += shape.numel()
        # Scales of norms, and biases.
        weights[name] = values if len(shape) > 1 else 4 * values + name.endswith('weight')
    x = torch.randn(1, arguments.get('in_channels', 3), *size)
    features = []
    for model in (expected, actual):
        model.load_state_dict(weights, strict=False, assign=True)
        with torch.no_grad():
            features.append(model(x))
    assert len(features[0]) == len(features[1])
    for theirs, own in zip(*features):
        assert relative_error(own, theirs) < 1e-5


@functools.cache
def random_values():
    """As many normally distributed values as a large parameter has, with a deviation of 0.05."""
    return 0.05 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))


def assert_equal_networks(plain, ours, size=(65, 50)):
    """Check the features, and which parameters and statistics are frozen in training."""
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    ours.load_state_dict(plain.state_dict())
    # In double precision: with random weights, rounding errors grow with the depth.
    plain.double().train()
    ours.double().train()
    x = torch.randn(2, 3, *size, dtype=torch.double)
    expected, actual = plain(x), ours(x)
    assert len(actual) == len(expected)
    for theirs, own in zip(expected, actual):
        torch.testing.assert_close(own, theirs)
    for (name, own), (_, theirs) in zip(ours.named_parameters(), plain.named_parameters()):
        assert own.requires_grad == theirs.requires_grad, name
    theirs = dict(plain.named_modules())
    for name, own in ours.named_modules():
        if isinstance(own, nn.BatchNorm2d):
            assert own.training == theirs[name].training, name
