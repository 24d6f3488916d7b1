"""Inputs of the operators, and comparison of a backend with the reference."""

import functools
import itertools

import torch
from helpers import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from acmix_mm.gpu_check import checks
from acmix_mm.gpu_check.checks import TOLERANCE
from acmix_mm.gpu_check.inputs import (  # noqa: F401
    aggregation_tensors,
    conv_tensors,
    encoding_tensors,
    features_tensors,
    involution_tensors,
    padded_window_tensors,
    sliding_tensors,
    sum_tensors,
    weights_tensors,
    window_tensors,
)
from acmix_mm.ops import (
    projected_window_attention,
    sliding_window_attention,
    window_attention,
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def compare(run, tensors, backend, dtype):
    """Compare a backend in ``dtype`` with the reference in float64: output and all gradients."""
    error = checks.relative_error(functools.partial(run, backend=backend),
                              functools.partial(run, backend='reference'), tensors, dtype)
    assert error <= TOLERANCE[dtype]


def attend_padded(window_size, shift_size, is_rolled=False):
    """Window attention as a function of the tensors that padded_window_tensors returns."""
    def run(qkv, bias, padding, backend=None):
        return window_attention(qkv, bias, window_size, shift_size=shift_size, padding=padding,
                                is_rolled=is_rolled, backend=backend)
    return run


def attend_projections(x, weight, bias, product, position_bias, backend=None):
    """Window attention of projections, beside a product of the same map."""
    out, x = projected_window_attention(x, weight, bias, position_bias, (2, 3), shift_size=1,
                                        backend=backend)
    return torch.cat([out, x.matmul(product)], 3)


def projected_window_tensors(batch):
    """Arguments of attend_projections: a map that windows do not divide, weights, a bias."""
    return [torch.randn(batch, 3, 5, 3), torch.randn(12, 3), torch.randn(12), torch.randn(3, 2),
            torch.randn(2, 6, 6)]


def slide(kernel_size, stride=1, dilation=1):
    return functools.partial(sliding_window_attention, kernel_size=kernel_size, stride=stride,
                             dilation=dilation)


def involution_loop(x, kernels, stride, dilation):
    """Equation 4 of the paper, as loops over positions, channels and neighbours."""
    batch, channels, height, width = x.shape
    groups, kernel_size, out_height, out_width = kernels.shape[1], *kernels.shape[3:]
    out = torch.zeros(batch, channels, out_height, out_width, dtype=x.dtype)
    for image, channel, row, column in itertools.product(*map(range, out.shape)):
        group = channel // (channels // groups)
        for u, v in itertools.product(range(kernel_size), repeat=2):
            down = stride * row + dilation * (u - kernel_size // 2)
            across = stride * column + dilation * (v - kernel_size // 2)
            if 0 <= down < height and 0 <= across < width:
                out[image, channel, row, column] += (
                    kernels[image, group, u, v, row, column] * x[image, channel, down, across])
    return out


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation allocates."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in tree_flatten(out)[0]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                self.elements = max(self.elements, storage.nbytes() // each.element_size())
        return out


def largest_tensor(run):
    """Number of elements of the largest tensor that a computation stores."""
    with LargestTensor() as mode:
        run()
    return mode.elements


def results(run, module, x):
    """Outputs and all gradients for one cotangent."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    outs = run(leaf)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    generator = torch.Generator().manual_seed(1)
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs).backward()
    return [*outs, leaf.grad, *(parameter.grad for parameter in module.parameters())]


def assert_compiled_is_equal(module, x, backend):
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    actuals, expecteds = results(compiled, module, x), results(module, module, x)
    # Some gradients are zero by algebra; their rounding errors scale with the other tensors.
    floor = max(1e-5, 1e-6 * max(expected.abs().max() for expected in expecteds))
    for actual, expected in zip(actuals, expecteds):
        assert relative_error(actual, expected) < 1e-3 or (actual - expected).abs().max() < floor
