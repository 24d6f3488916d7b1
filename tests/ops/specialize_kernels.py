"""Print how often training at five image sizes compiles each kernel of the attentions.

Nothing is compiled or run: launches are recorded, and Triton's own JIT computes their keys. Run by
test_kernels.py without the interpreter.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from acmix_mm.ops.sliding_attention import strip_kernels, triton_kernels
from acmix_mm.ops.window_attention import triton_kernels as window_kernels

BACKEND = make_backend(GPUTarget('cuda', 90, 32))
SIZES = ((200, 336), (201, 333), (160, 256), (17, 16), (16, 1))


class Recorder:
    """Stands for a kernel; collects the keys that its launches are compiled by."""

    def __init__(self, kernel):
        self.keys = set()
        self.bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants):
        _, specialization, options = self.bind(*arguments, **constants)
        self.keys.add(str((specialization, options)))


def slide(dilation):
    for height, width in SIZES:
        qkv = torch.empty(2, height, width, 3, 4, 16, dtype=torch.bfloat16, device='meta')
        positions = torch.empty(height, width, 16, device='meta')
        out, log_sum = qkv[:, :, :, 0].contiguous(), torch.empty(2, height, width, 4, device='meta')
        triton_kernels.attend(qkv, positions, out, log_sum, 7, 1, dilation, 0.25)
        triton_kernels.attend_backward(out, qkv, positions, out, log_sum, torch.empty_like(qkv), 7,
                                       1, dilation, 0.25)


def attend_windows(side):
    """In plain and in shifted blocks; windows divide some of the maps."""
    for height, width in (*SIZES, (2 * side, 3 * side)):
        qkv = torch.empty(2, height, width, 3, 4, 16, dtype=torch.bfloat16, device='meta')
        bias = torch.empty(4, side**2, side**2, device='meta')
        padding, out = qkv[0, 0, 0], qkv[:, :, :, 0].flatten(3)
        for shift in (0, side // 2):
            geometry = (side, side), shift, False, 0.25
            window_kernels.attend(qkv, bias, padding, out, *geometry)
            window_kernels.attend_backward(out, qkv, bias, padding, *geometry)


def count(run, argument):
    """Print the kernels that a run launches, its argument, and how often each is compiled."""
    recorders = {}
    for module in (strip_kernels, triton_kernels, window_kernels):
        for name in ('attend_kernel', 'grad_queries_kernel', 'grad_keys_kernel'):
            recorder = Recorder(getattr(module, name))
            recorders[f'{module.__name__}.{name}'] = module, name, getattr(module, name), recorder
            setattr(module, name, recorder)
    run(argument)
    for path, (module, name, kernel, recorder) in recorders.items():
        setattr(module, name, kernel)
        if recorder.keys:
            print(path, argument, len(recorder.keys))


if __name__ == '__main__':
    count(slide, 1)
    count(slide, 2)
    count(attend_windows, 7)
    count(attend_windows, 12)
