"""Print how often training at five image sizes compiles each kernel.

Nothing is compiled or run: launches are recorded, and Triton's own JIT computes their keys. Run by
test_kernels.py without the interpreter.
"""

import functools

import torch
from launches import recorded, specialize

from acmix_mm.ops.path_sum import triton_kernels as sums
from acmix_mm.ops.position_bias import triton_kernels as position_bias
from acmix_mm.ops.position_encoding import triton_kernels as encoding
from acmix_mm.ops.rolling import triton_kernels as rolling
from acmix_mm.ops.shift_conv import triton_kernels as convolution
from acmix_mm.ops.sliding_attention import strip_kernels
from acmix_mm.ops.sliding_attention import triton_kernels as sliding
from acmix_mm.ops.window_attention import triton_kernels as windows

# Windows of 7 and 12 divide the last one.
SIZES = ((200, 336), (201, 333), (160, 256), (17, 16), (16, 1), (168, 252))


def count(description, modules, run):
    """Record the launches of all kernels of some modules, and print how many keys each has."""
    keys = {}
    for size in SIZES:
        for name, kernel, arguments, constants in recorded(modules, functools.partial(run, *size)):
            source, options, _ = specialize(kernel, arguments, constants)
            keys.setdefault(name, set()).add((source.hash(), str(options)))
    for name, found in keys.items():
        print(name, description, len(found))


def slide(dilation, height, width):
    qkv = empty(2, height, width, 3, 4, 16)
    positions = empty(height, width, 16, dtype=torch.float32)
    out, log_sum = empty(2, height, width, 4, 16), empty(2, height, width, 4, dtype=torch.float32)
    sliding.attend(qkv, positions, out, log_sum, 7, 1, dilation, 0.25)
    sliding.attend_backward(out, qkv, positions, out, log_sum, torch.empty_like(qkv), 7, 1,
                            dilation, 0.25)


def convolve(height, width):
    groups, out, kernels = (empty(2, height, width, 16, 12), empty(2, height, width, 16, 4),
                            empty(64, 12, 3, 3))
    bias = empty(64, min(height, 3), min(width, 3))
    convolution.convolve(groups, kernels, bias, out, 1, 1)
    convolution.convolve_maps_backward(out, kernels, torch.empty_like(groups), 1, 1)
    convolution.convolve_kernels_backward(out, groups, 3, 1, 1)


def attend_windows(side, height, width):
    """In plain and in shifted blocks."""
    qkv, bias = empty(2, height, width, 3, 4, 16), empty(4, side**2, side**2, dtype=torch.float32)
    padding, out = qkv[0, 0, 0], qkv[:, :, :, 0].flatten(3)
    for shift in (0, side // 2):
        geometry = (side, side), shift, shift > 0, False, 0.25
        biases = empty(*windows.shape_of_biases(4, (side, side), shift), dtype=torch.float32)
        windows.fill_biases(bias, biases, (side, side), shift)
        windows.attend(qkv, biases, padding, out, *geometry)
        windows.attend_backward(out, qkv, biases, padding, *geometry)


def add(height, width):
    convolution, taps = empty(2, height, width, 64), empty(64, 9, dtype=torch.float32)
    for channels_first, shift in ((False, 3), (True, 0)):
        sums.add(convolution, convolution, taps, convolution, (height, width), 1, 1, shift,
                 channels_first)
        sums.add_backward(convolution, convolution, taps, (height, width), 1, 1, shift)


def encode(height, width):
    weight, bias = empty(16, 2), empty(16)
    out = empty(height, width, 16, dtype=torch.float32)
    encoding.encode(weight, bias, out)
    encoding.encode_backward(out, weight, bias)


def roll(height, width):
    x = empty(2, height, width, 96)
    for shift in (-3, 3):
        rolling.roll(x, x, shift)


def read_bias(height, width):
    """Windows shrink to small maps."""
    side = min(height, width, 7)
    grad = empty(side**2, side**2, 3, dtype=torch.float32).permute(2, 0, 1)
    position_bias.sum_offsets(grad, empty(169, 3), (side, side))


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device='meta')


if __name__ == '__main__':
    for each in (1, 2):
        count(f'dilation={each}', (strip_kernels, sliding), functools.partial(slide, each))
    count('', (convolution,), convolve)
    for side in (7, 12):
        count(f'side={side}', (windows,), functools.partial(attend_windows, side))
    for module, run in ((sums, add), (encoding, encode), (rolling, roll),
                        (position_bias, read_bias)):
        count('', (module,), run)
