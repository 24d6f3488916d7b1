"""The Triton kernels against the reference, on a GPU or else in Triton's interpreter.

The interpreter cannot multiply bfloat16, which is tested on GPUs only.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.operators import DEVICE, compare, conv_tensors, slide, sliding_tensors

from acmix_mm.ops import backend, shift_conv, sliding_window_attention
from acmix_mm.ops.backend import has_triton

if not has_triton():
    pytest.skip('needs triton 3', allow_module_level=True)
from acmix_mm.ops.shift_conv import triton_kernels as conv_kernels
from acmix_mm.ops.sliding_attention import triton_kernels as sliding_kernels

DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE == 'cuda' else ()))


def compare_on_device(run, tensors, dtype):
    tensors = [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]
    compare(run, tensors, 'triton', dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    ('heads', 'head_dims', 'height', 'width', 'kernel_size', 'stride', 'dilation'), [
        (1, 4, 1, 1, 7, 1, 1),
        (2, 16, 3, 12, 7, 1, 1),
        (1, 16, 9, 4, 7, 2, 1),
        (1, 24, 3, 2, 5, 3, 1),
        (1, 8, 5, 11, 3, 1, 2),
        (1, 72, 6, 5, 3, 1, 1),
        (1, 128, 3, 4, 3, 1, 2),
        # The smallest map that strips cover, several programs, channels padded, kernels of 5 and 3.
        (1, 16, 4, 4, 7, 1, 1),
        (2, 8, 10, 18, 7, 1, 1),
        (1, 24, 9, 7, 5, 1, 1),
        (1, 16, 2, 9, 3, 1, 1),
    ])
def test_sliding_attention(dtype, heads, head_dims, height, width, kernel_size, stride, dilation):
    for heads_last in (True, False):
        tensors = sliding_tensors(2, heads, head_dims, height, width, heads_last)
        compare_on_device(slide(kernel_size, stride, dilation), tensors, dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(
    ('heads', 'head_dims', 'height', 'width', 'kernel_size', 'stride', 'dilation'), [
        (1, 4, 1, 1, 3, 1, 1),
        (3, 8, 5, 6, 3, 1, 1),
        (5, 4, 4, 3, 3, 1, 1),
        (4, 16, 6, 5, 3, 2, 1),
        (2, 40, 5, 4, 3, 1, 2),
        (1, 4, 7, 4, 5, 2, 3),
    ])
def test_shift_conv(dtype, heads, head_dims, height, width, kernel_size, stride, dilation):
    tensors = conv_tensors(2, heads, head_dims, height, width, kernel_size, heads % 2, heads != 4)
    compare_on_device(functools.partial(shift_conv, stride=stride, dilation=dilation), tensors,
                      dtype)


def test_shift_conv_on_several_programs():
    """More positions than one program has, and than one partial sum of the kernels' gradient."""
    compare_on_device(shift_conv, conv_tensors(1, 1, 32, 33, 34, 1, False, True), torch.float32)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(stride=2, dilation=2), 'takes stride or dilation, not both.*got stride=2, dilation=2'),
    (dict(dtype=torch.float64), 'takes float32, bfloat16 or float16 on an NVIDIA GPU.*float64'),
    (dict(head_dims=300), 'heads of 512 bytes at most.*300 channels of torch.float32'),
])
def test_invalid_arguments(change, message):
    given = {**dict(head_dims=4, stride=1, dilation=1, dtype=torch.float32), **change}
    tensors = [tensor.to(DEVICE, given['dtype'])
               for tensor in sliding_tensors(1, 1, given['head_dims'], 3, 3)]
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(*tensors, 3, stride=given['stride'], dilation=given['dilation'],
                                 backend='triton')


def test_cpu_without_the_interpreter_is_an_error(monkeypatch):
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    with pytest.raises(ValueError, match=r"backend 'triton'.*got torch.float32 on cpu"):
        shift_conv(*conv_tensors(1, 1, 4, 3, 3, 3, False, True), backend='triton')


@pytest.mark.skipif(DEVICE == 'cuda', reason='only the interpreter refuses bfloat16')
def test_interpreter_refuses_bfloat16():
    tensors = [tensor.bfloat16() for tensor in sliding_tensors(1, 1, 4, 3, 3)]
    message = r"and float32 or float16 in Triton's interpreter; got torch.bfloat16 on cpu"
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(*tensors, 3, backend='triton')


def rows_of(script):
    """Run a script of this folder without the interpreter; return the words of each line."""
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, f'tests/ops/{script}'], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def test_kernels_compile_for_gpus():
    """For Ampere and Hopper, without a GPU, within the smallest shared memory of either."""
    compiled = rows_of('compile_kernels.py')
    assert len(compiled) == 2 * (3 * 4 + 3 * 3 + 3 * 2)
    assert all(int(shared_memory) <= 99 * 1024 for *_, shared_memory in compiled), compiled


@pytest.mark.parametrize(('module', 'failing'), [
    (sliding_kernels, 'attend'), (sliding_kernels, 'attend_backward'),
    (conv_kernels, 'convolve'), (conv_kernels, 'convolve_kernels_backward')])
def test_failing_kernels_fall_back_to_torch(module, failing, monkeypatch):
    def fail(*arguments):
        raise RuntimeError('out of resources')

    operator, run, make_tensors, arguments = {
        sliding_kernels: ('sliding_window_attention', slide(3), sliding_tensors, (1, 1, 4, 3, 5)),
        conv_kernels: ('shift_conv', functools.partial(shift_conv, stride=2), conv_tensors,
                       (2, 5, 2, 4, 5, 3, True, True))}[module]
    monkeypatch.setattr(backend, '_failed_kernels', set())
    monkeypatch.setattr(module, failing, fail)
    message = f'kernels of {operator} failed; it runs in torch.*out of resources'
    with pytest.warns(RuntimeWarning, match=message):
        compare_on_device(run, make_tensors(*arguments), torch.float32)
    # Warned of once.
    compare_on_device(run, make_tensors(*arguments), torch.float32)


def test_image_sizes_share_compiled_kernels():
    """Strips and, where these do not apply, tiles."""
    counts = rows_of('specialize_kernels.py')
    # One column is too narrow for strips at dilation 1. Forward and transposed are two constants.
    assert len(counts) == 6 + 3 + 2
    for kernel, *_, count in counts:
        assert int(count) == 1 + kernel.endswith('.convolve_kernel'), counts
