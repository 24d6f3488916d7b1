"""Approximation of plain convolutions, alone and in plain ResNet checkpoints."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import relative_error
from helpers.checkpoints import load_pretrained, stage_outputs
from helpers.weights import randomised

from acmix_mm.backbones import ACmixResNet
from acmix_mm.checkpoints.convolution import (
    NEIGHBOUR_CORRELATION,
    approximate_convolution,
    relu_statistics,
)
from acmix_mm.layers import ACmixConv2d


@torch.no_grad()
@pytest.mark.parametrize('mix', ['acmix', 'conv'])
def test_resnet_is_exact_for_representable_kernels(mix, tmp_path, log_text):
    plain = randomised(torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 4, 1]))
    for name, parameter in plain.named_parameters():
        if re.search(r'layer.*conv2\.weight$', name):
            parameter.copy_(approximate_convolution(parameter, 4).kernel)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = load_pretrained(ACmixResNet, tmp_path / 'resnet.pth', depth=26, mix=mix)
    x = torch.randn(1, 3, 70, 64)
    for expected, actual in zip(stage_outputs(plain, x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    assert 'layer3.3 0%' in log_text()


def correlated(*shape, factor):
    """Standard normal maps with correlation ``factor`` between neighbours along either axis."""
    maps = torch.randn(shape)
    for axis in (2, 3):
        columns = list(maps.unbind(axis))
        for index in range(1, len(columns)):
            columns[index] = factor * columns[index - 1] + (1 - factor**2)**0.5 * columns[index]
        maps = torch.stack(columns, axis)
    return maps


@torch.no_grad()
def test_log_gives_the_error_of_resnet_convolutions(tmp_path, log_text):
    """On inputs with the statistics of the previous norm and the assumed correlation."""
    plain = randomised(torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 4, 1]), scale=0.3)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = load_pretrained(ACmixResNet, tmp_path / 'resnet.pth', depth=26)
    plain_block, block = plain.layer3[1], model.layer3[1]
    mean, deviation = relu_statistics(plain_block.bn1.weight, plain_block.bn1.bias)
    x = correlated(4, 256, 48, 48, factor=NEIGHBOUR_CORRELATION)
    x = x * deviation[:, None, None] + mean[:, None, None]
    expected = plain_block.bn2(plain_block.conv2(x))[..., 1:-1, 1:-1]
    difference = block.bn2(block.conv2(x))[..., 1:-1, 1:-1] - expected
    logged = float(re.search(r'layer3\.1 (\d+)%', log_text())[1]) / 100
    variance = expected.var((0, 2, 3)).sum()
    assert abs((difference.var((0, 2, 3)).sum() / variance).sqrt() - logged) < 0.02
    # The running mean of the next norm absorbs the shift of the mean.
    assert difference.mean((0, 2, 3)).square().sum() < 2e-3 * variance


def test_approximation_is_stationary():
    """The gradient of the weighted error is zero for all parameters."""
    kernel = torch.randn(12, 20, 3, 3, dtype=torch.double)
    scales = torch.rand(20, dtype=torch.double) + 0.1, torch.rand(12, dtype=torch.double) + 0.1
    approximation = approximate_convolution(kernel, 4, *scales)
    layer = ACmixConv2d(20, 12, num_heads=4, mix='conv', bias=False).double()
    layer.load_state_dict(approximation.parameters)
    # The response to an impulse in each input channel is the flipped kernel.
    impulses = torch.zeros(20, 20, 5, 5, dtype=torch.double)
    impulses[range(20), range(20), 2, 2] = scales[0]
    made = layer(impulses)
    wanted = F.conv2d(impulses, kernel, padding=1)
    error = ((made - wanted) * scales[1][:, None, None]).square().sum()
    total = (wanted * scales[1][:, None, None]).square().sum()
    assert approximation.error == pytest.approx((error / total).sqrt().item())
    assert 0.1 < approximation.error < 0.9
    error.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() < 1e-9 * total, name


@pytest.mark.parametrize('num_heads', [1, 2, 4])
def test_is_exact_for_few_channels(num_heads):
    kernel = torch.randn(8, 3, 3, 3)
    approximation = approximate_convolution(kernel, num_heads)
    assert approximation.error < 1e-6
    layer = ACmixConv2d(3, 8, num_heads=num_heads, mix='conv', bias=False)
    layer.load_state_dict(approximation.parameters)
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, padding=1))


def test_zero_kernel():
    approximation = approximate_convolution(torch.zeros(8, 16, 3, 3), 4)
    assert approximation.error == 0
    assert all(value.isfinite().all() for value in approximation.parameters.values())


def test_statistics_after_a_relu():
    weight, bias = torch.tensor([0.5, 2., -1., 0.]), torch.tensor([0.3, -1., 0., 0.7])
    mean, deviation = relu_statistics(weight, bias)
    drawn = (torch.randn(1_000_000, 4) * weight + bias).relu()
    torch.testing.assert_close(mean, drawn.mean(0), rtol=0.01, atol=0.003)
    torch.testing.assert_close(deviation, drawn.std(0), rtol=0.01, atol=0.003)
