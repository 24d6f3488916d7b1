"""Inputs of the operators, and comparison of a backend with the reference."""

import functools
import itertools

import torch
from helpers import relative_error

from acmix_mm.ops import sliding_window_attention, window_attention

# Relative error allowed for rounding of inputs and intermediate sums.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def compare(run, tensors, backend, dtype):
    """Compare a backend in ``dtype`` with the reference in float64: output and all gradients."""
    results = {}
    for name, precision in (('reference', torch.float64), (backend, dtype)):
        leaves = [None if tensor is None else tensor.to(dtype).to(precision).requires_grad_()
                  for tensor in tensors]
        out = run(*leaves, backend=name)
        assert out.dtype == precision
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
        out.backward(cotangent.to(dtype).to(precision))
        results[name] = [out, *(leaf.grad for leaf in leaves if leaf is not None)]
    # Some gradients are zero by algebra; their rounding errors scale with the other tensors.
    floor = 0.1 * max(expected.abs().max() for expected in results['reference'])
    for expected, actual in zip(results['reference'], results[backend]):
        assert actual.shape == expected.shape
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCE[dtype] * max(expected.abs().max(), floor)


def conv_tensors(batch, heads, head_dims, height, width, kernel_size, bias, channels_last):
    shifts = kernel_size**2
    if channels_last:
        maps = torch.randn(batch, height, width, 3 * heads, head_dims).permute(0, 3, 4, 1, 2)
    else:
        maps = torch.randn(batch, 3 * heads, head_dims, height, width)
    return [maps, torch.randn(shifts, 3 * heads) / (3 * heads)**0.5,
            torch.randn(heads * head_dims, shifts, kernel_size, kernel_size) / shifts,
            torch.randn(shifts) if bias else None]


def window_tensors(batch, grid, window_size, heads, head_dims):
    height, width = grid[0] * window_size[0], grid[1] * window_size[1]
    area = window_size[0] * window_size[1]
    return [torch.randn(batch, height, width, 3, heads, head_dims), torch.randn(heads, area, area)]


def padded_window_tensors(batch, size, window_size, heads, head_dims):
    """As window_tensors, for a map of any size, and the values of its padding."""
    area = window_size[0] * window_size[1]
    return [torch.randn(batch, *size, 3, heads, head_dims), torch.randn(heads, area, area),
            torch.randn(3, heads, head_dims)]


def attend_padded(window_size, shift_size):
    """Window attention as a function of the tensors that padded_window_tensors returns."""
    def run(qkv, bias, padding, backend=None):
        return window_attention(qkv, bias, window_size, shift_size=shift_size, padding=padding,
                                backend=backend)
    return run


def sliding_tensors(batch, heads, head_dims, height, width, heads_last=False):
    qkv = torch.randn(batch, height, width, 3, heads, head_dims)
    if heads_last:
        qkv = qkv.permute(0, 1, 2, 5, 3, 4).contiguous().permute(0, 1, 2, 4, 5, 3)
    return [qkv, torch.randn(height, width, head_dims)]


def slide(kernel_size, stride=1, dilation=1):
    return functools.partial(sliding_window_attention, kernel_size=kernel_size, stride=stride,
                             dilation=dilation)


def features_tensors(batch, channels, height, width, kernel_size):
    around = channels * (kernel_size**2 + 1)
    q, k = torch.randn(2, batch, channels, height, width)
    return [q, k, torch.randn(around), torch.randn(around), torch.randn(3, around) / around**0.5]


def aggregation_tensors(batch, channels, height, width, kernel_size, groups=2):
    area = kernel_size**2
    return [torch.randn(batch, channels, height, width), torch.randn(batch, 3, height, width),
            torch.randn(groups * area, 3) / area, torch.randn(groups * area) / area]


def involution_tensors(batch, groups, per_group, height, width, kernel_size, stride=1):
    size = [-(-extent // stride) for extent in (height, width)]
    return [torch.randn(batch, groups * per_group, height, width),
            torch.randn(batch, groups, kernel_size, kernel_size, *size)]


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
