"""Print how often training at five image sizes compiles each kernel.

Nothing is compiled or run: launches are recorded, and Triton's own JIT computes their keys. Run by
test_kernels.py without the interpreter.
"""

import functools

import torch
from launches import specialize

from acmix_mm.ops.shift_conv import triton_kernels as convolution
from acmix_mm.ops.sliding_attention import strip_kernels
from acmix_mm.ops.sliding_attention import triton_kernels as sliding
from acmix_mm.ops.window_attention import triton_kernels as windows

# Windows of 7 and 12 divide the last one.
SIZES = ((200, 336), (201, 333), (160, 256), (17, 16), (16, 1), (168, 252))


class Recorder:
    """Stands for a kernel; collects the keys that its launches are compiled by."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.keys = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants):
        source, options, _ = specialize(self.kernel, arguments, constants)
        self.keys.add((source.hash(), str(options)))


def count(description, modules, run):
    """Record the launches of all kernels of some modules, and print how many keys each has."""
    kernels = [(module, name) for module in modules for name in vars(module)
               if name.endswith('_kernel')]
    recorders = {}
    for module, name in kernels:
        recorders[module, name] = getattr(module, name), Recorder(getattr(module, name))
        setattr(module, name, recorders[module, name][1])
    for size in SIZES:
        run(*size)
    for (module, name), (kernel, recorder) in recorders.items():
        setattr(module, name, kernel)
        if recorder.keys:
            print(f'{module.__name__}.{name}', description, len(recorder.keys))


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
        geometry = (side, side), shift, False, 0.25
        windows.attend(qkv, bias, padding, out, *geometry)
        windows.attend_backward(out, qkv, bias, padding, *geometry)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device='meta')


if __name__ == '__main__':
    for each in (1, 2):
        count(f'dilation={each}', (strip_kernels, sliding), functools.partial(slide, each))
    count('', (convolution,), convolve)
    for side in (7, 12):
        count(f'side={side}', (windows,), functools.partial(attend_windows, side))
