"""Print how often training at five image sizes compiles each kernel of sliding attention.

Nothing is compiled or run: launches are recorded, and Triton's own JIT computes their keys. Run by
test_kernels.py without the interpreter.
"""

import torch
from launches import specialize

from acmix_mm.ops.sliding_attention import strip_kernels, triton_kernels

SIZES = ((200, 336), (201, 333), (160, 256), (17, 16), (16, 1))


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


def count(dilation):
    recorders = {}
    for module in (strip_kernels, triton_kernels):
        for name in ('attend_kernel', 'grad_queries_kernel', 'grad_keys_kernel'):
            recorder = Recorder(getattr(module, name))
            recorders[f'{module.__name__}.{name}'] = module, name, getattr(module, name), recorder
            setattr(module, name, recorder)
    for height, width in SIZES:
        qkv = torch.empty(2, height, width, 3, 4, 16, dtype=torch.bfloat16, device='meta')
        positions = torch.empty(height, width, 16, device='meta')
        out, log_sum = qkv[:, :, :, 0].contiguous(), torch.empty(2, height, width, 4, device='meta')
        triton_kernels.attend(qkv, positions, out, log_sum, 7, 1, dilation, 0.25)
        triton_kernels.attend_backward(out, qkv, positions, out, log_sum, torch.empty_like(qkv), 7,
                                       1, dilation, 0.25)
    for path, (module, name, kernel, recorder) in recorders.items():
        setattr(module, name, kernel)
        if recorder.keys:
            print(path, dilation, len(recorder.keys))


if __name__ == '__main__':
    count(1)
    count(2)
