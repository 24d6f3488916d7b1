"""ops.linear by oneDNN against torch's linear, and its choice; linear_and_map."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from acmix_mm.ops import linear, linear_and_map

module = importlib.import_module('acmix_mm.ops.linear')
has_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available()
    or torch.backends.cpu.get_cpu_capability() != 'AVX512', reason='needs a CPU with AVX-512')


def tensors(*shape, bias=True, dtype=torch.float32):
    x = torch.randn(*shape, 12, dtype=dtype, requires_grad=True)
    parameters = torch.randn(20, 12, dtype=dtype), torch.randn(20, dtype=dtype)
    return [x, *(each.requires_grad_() for each in parameters[:1 + bias])]


def calls_convolution(*arguments):
    with torch.profiler.profile() as profile:
        linear(*arguments)
    return any(event.name == 'aten::conv2d' for event in profile.events())


@has_onednn
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(5,), (2, 3, 4), (1, 1)])
def test_equals_torch(monkeypatch, shape, bias):
    """Output, gradients, and the gradients of gradients."""
    monkeypatch.setattr(module, 'MIN_MULTIPLY_ADDS', 1)
    arguments = tensors(*shape, bias=bias)
    assert calls_convolution(*arguments)
    results = []
    for run in (linear, F.linear):
        out = run(*arguments)
        grads = torch.autograd.grad(out.sin().sum(), arguments, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in grads), arguments)
        results.append([out, *grads, *second])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('bias', [True, False])
def test_map_that_another_product_reads(bias):
    """Gradients, those of some arguments only, and the gradients of gradients."""
    def run(both, *arguments):
        out, x = linear_and_map(*arguments) if both else (F.linear(*arguments), arguments[0])
        return torch.cat([out, x.matmul(other)], -1).sin().sum()

    arguments = tensors(2, 3, bias=bias, dtype=torch.float64)
    other = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for both in (True, False):
        leaves = [*arguments, other]
        plain = torch.autograd.grad(run(both, *arguments), leaves)
        grads = torch.autograd.grad(run(both, *arguments), leaves, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in grads), leaves)
        some = torch.autograd.grad(run(both, arguments[0].detach(), *arguments[1:]), leaves[1:])
        results.append([*plain, *grads, *second, *some])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_torch_multiplies_what_onednn_would_not_speed_up(monkeypatch):
    """Small products, other dtypes, transposed and empty maps."""
    assert not calls_convolution(*tensors(8))
    monkeypatch.setattr(module, 'MIN_MULTIPLY_ADDS', 1)
    assert not calls_convolution(*tensors(8, dtype=torch.float64))
    x, *parameters = tensors(4, 6)
    assert not calls_convolution(x.transpose(0, 1), *parameters)
    assert linear(*tensors(0, 3)).shape == (0, 3, 20)
