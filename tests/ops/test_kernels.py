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
from helpers.operators import (
    DEVICE,
    attend_padded,
    attend_projections,
    compare,
    conv_tensors,
    padded_window_tensors,
    projected_window_tensors,
    slide,
    sliding_tensors,
    weights_tensors,
    window_tensors,
)

from acmix_mm.gpu_check import subjects
from acmix_mm.ops import backend, shift_conv, sliding_window_attention, window_attention
from acmix_mm.ops.backend import has_triton
from acmix_mm.ops.reflection import reflection_pad

if not has_triton():
    pytest.skip('needs triton 3', allow_module_level=True)
from acmix_mm.ops.path_sum import triton_kernels as sum_kernels
from acmix_mm.ops.path_weights import triton_kernels as weights_kernels
from acmix_mm.ops.position_bias import triton_kernels as bias_kernels
from acmix_mm.ops.position_encoding import triton_kernels as encoding_kernels
from acmix_mm.ops.rolling import triton_kernels as rolling_kernels
from acmix_mm.ops.shift_conv import triton_kernels as conv_kernels
from acmix_mm.ops.sliding_attention import triton_kernels as sliding_kernels
from acmix_mm.ops.window_attention import triton_kernels as window_kernels

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


@pytest.mark.parametrize(('height', 'width', 'reach', 'stride'), [
    # Several programs, stride, maps as wide as the padding or narrower, one position.
    (3, 40, 2, 2), (4, 4, 3, 1), (2, 3, 9, 2), (1, 1, 3, 1)])
def test_folding_is_the_gradient_of_padding(height, width, reach, stride):
    maps = torch.randn(2, 6, height, width, device=DEVICE, requires_grad=True)
    padded = reflection_pad(maps, reach)
    grad = torch.randn_like(padded)
    expected, = torch.autograd.grad(padded, maps, grad)
    by_part = grad.permute(0, 2, 3, 1).unflatten(3, (3, 2)).contiguous()
    for order in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 5, 3, 4)):
        shape = torch.empty(1, height, width, 3, 3, 2, device=DEVICE).permute(order).shape
        inverse = [order.index(axis) for axis in range(6)]
        grad_qkv = torch.ones(shape, device=DEVICE).permute(inverse)
        sliding_kernels.fold(by_part.unsqueeze(1), grad_qkv, reach, stride)
        for part in (1, 2):
            torch.testing.assert_close(grad_qkv[0, :, :, part].flatten(2).permute(2, 0, 1),
                                       expected[part - 1], rtol=1e-5, atol=1e-5)
        has_output = torch.zeros(height, width, device=DEVICE)
        has_output[::stride, ::stride] = 1
        assert torch.equal(grad_qkv[0, :, :, 0], has_output[:, :, None, None].expand(-1, -1, 3, 2))


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


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize(('batch', 'size', 'window_size', 'shift_size', 'heads', 'head_dims'), [
    # Padding at both edges, at one and nowhere; all of its positions in one window or in two.
    (1, (3, 5), (2, 2), 1, 2, 8),
    (2, (3, 4), (3, 3), 0, 1, 16),
    (1, (8, 8), (4, 4), 2, 1, 4),
    (1, (7, 3), (5, 5), 3, 2, 24),
    (1, (8, 14), (7, 7), 3, 1, 32),
    (1, (9, 1), (8, 8), 7, 1, 16),
    # A window that shrank to the map.
    (2, (2, 5), (2, 5), 0, 3, 4),
    # Windows that several programs share.
    (1, (10, 8), (9, 9), 4, 1, 24),
    (1, (11, 13), (12, 12), 6, 1, 8),
])
def test_window_attention(dtype, batch, size, window_size, shift_size, heads, head_dims,
                          monkeypatch):
    # Programs take several windows; the last of them fewer.
    monkeypatch.setattr(window_kernels, 'PROGRAMS', 2 * heads)
    tensors = padded_window_tensors(batch, size, window_size, heads, head_dims)
    # Rolled by the kernels or, which does not depend on the dtype, before.
    for is_rolled in {False, shift_size > 0 and dtype == torch.float32}:
        compare_on_device(attend_padded(window_size, shift_size, is_rolled), tensors, dtype)


def test_window_attention_on_rolled_maps():
    for shift_size in (0, 1):
        run = functools.partial(window_attention, window_size=(2, 3), shift_size=shift_size)
        compare_on_device(run, window_tensors(2, (2, 2), (2, 3), 2, 16), torch.float32)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('has_bias', [True, False])
def test_projected_window_attention(dtype, has_bias):
    """The gradient of the map is that of both operators that read it."""
    tensors = projected_window_tensors(2)
    if not has_bias:
        tensors[2] = None
    compare_on_device(attend_projections, tensors, dtype)


def test_window_attention_takes_bias_and_padding_in_float32():
    """Beside projections in half precision, as under autocast; gradients are not rounded."""
    tensors = padded_window_tensors(1, (3, 5), (2, 2), 1, 8)
    results = {}
    for name, dtypes in (('reference', [torch.float64] * 3),
                         ('triton', (torch.float16, torch.float32, torch.float32))):
        leaves = [tensor.half().to(DEVICE, dtype).requires_grad_()
                  for tensor, dtype in zip(tensors, dtypes)]
        out = attend_padded((2, 2), 0)(*leaves, backend=name)
        results[name] = torch.autograd.grad(out.sum(), leaves)
        assert [grad.dtype for grad in results[name]] == list(dtypes)
    for actual, expected in zip(results['triton'], results['reference']):
        assert (actual - expected).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('is_grouped', [False, True])
@pytest.mark.parametrize('arguments', [
    # in_channels, heads, head_dims, kernel_size, bias, fc_bias, rates, attention_bias
    (20, 6, 1, 3, True, True, True, True),
    (4, 1, 3, 5, True, False, True, False),
    (5, 2, 2, 3, False, True, False, True),
    (3, 1, 2, 3, False, False, False, False),
])
def test_composed_weights(arguments, is_grouped, dtype, monkeypatch):
    # The first case has several blocks of input channels and of maps.
    monkeypatch.setattr(weights_kernels, 'MAX_BLOCK', 16)
    run = functools.partial(subjects.composed_weights, is_grouped=is_grouped)
    compare_on_device(run, weights_tensors(*arguments), dtype)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('subject', [
    *subjects.sum_cases(subjects.SUMS),
    *subjects.encoding_cases(subjects.ENCODINGS), *subjects.bias_cases(subjects.BIASES),
    *subjects.roll_cases(subjects.INTERPRETED_ROLLS)], ids=lambda each: each.case)
def test_small_operators(subject, dtype):
    compare_on_device(subject.run, subject.tensors(), dtype)


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


@pytest.mark.parametrize(('head_dims', 'dtype', 'options', 'message'), [
    (4, torch.float32, dict(dropout_p=0.1), "no dropout, got dropout_p=0.1; use 'sdpa'"),
    (4, torch.float64, {}, 'takes float32, bfloat16 or float16 on an NVIDIA GPU.*float64'),
    (65, torch.float32, {}, 'does not take windows of 4×4 with 65 channels of torch.float32'),
])
def test_invalid_arguments_of_window_attention(head_dims, dtype, options, message):
    tensors = [each.to(DEVICE, dtype) for each in window_tensors(1, (1, 1), (4, 4), 1, head_dims)]
    with pytest.raises(ValueError, match=message):
        window_attention(*tensors, (4, 4), backend='triton', **options)


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
    # Weights, sums, encoding, bias, rolling and folding.
    small = 2 * 2 * 3 + 9 + 3 + 2 + 1 + 2
    assert len(compiled) == 2 * (3 * 4 + 3 * 3 + 3 * 2 + 2 + 3 + small)
    assert all(int(shared_memory) <= 99 * 1024 for *_, shared_memory in compiled), compiled


FUNCTIONS = {
    conv_kernels: ('convolve', 'convolve_kernels_backward'),
    weights_kernels: ('compose', 'compose_backward'), sum_kernels: ('add', 'add_backward'),
    encoding_kernels: ('encode', 'encode_backward'), bias_kernels: ('sum_offsets',),
    rolling_kernels: ('roll',)}


@pytest.mark.parametrize(('operator', 'module', 'failing', 'run', 'tensors_of'), [
    (*kernels[:2], failing, *kernels[2:]) for kernels in [
        ('sliding_window_attention', sliding_kernels, slide(3),
         functools.partial(sliding_tensors, 1, 1, 4, 3, 5)),
        ('window_attention', window_kernels, attend_padded((2, 3), 1),
         functools.partial(padded_window_tensors, 1, (3, 5), (2, 3), 2, 4)),
        ('window_attention', window_kernels,
         functools.partial(window_attention, window_size=(2, 3), shift_size=1),
         functools.partial(window_tensors, 1, (2, 2), (2, 3), 2, 4)),
        ('shift_conv', conv_kernels, functools.partial(shift_conv, stride=2),
         functools.partial(conv_tensors, 2, 5, 2, 4, 5, 3, True, True)),
        *[(name, module, each.run, each.tensors) for name, module, cases in [
            ('compose_paths', weights_kernels,
             subjects.weights_cases(subjects.INTERPRETED_WEIGHTS)),
            ('add_paths', sum_kernels, subjects.sum_cases(
                [*subjects.INTERPRETED_SUMS, *subjects.SUMS[3:]])),
            ('position_encoding', encoding_kernels, subjects.encoding_cases([(4, 2, 3)])),
            ('position_bias', bias_kernels, subjects.bias_cases([(2, 3, (2, 3))])),
            ('roll_map', rolling_kernels, subjects.roll_cases([((1, 2, 3, 2), 1)])),
        ] for each in cases],
    ] for failing in FUNCTIONS.get(kernels[1], ('attend', 'attend_backward'))])
def test_failing_kernels_fall_back_to_torch(operator, module, failing, run, tensors_of,
                                            monkeypatch):
    def fail(*arguments):
        raise RuntimeError('out of resources')

    monkeypatch.setattr(backend, '_failed_kernels', set())
    monkeypatch.setattr(module, failing, fail)
    message = f'kernels of {operator} failed; it runs in torch.*out of resources'
    with pytest.warns(RuntimeWarning, match=message):
        compare_on_device(run, tensors_of(), torch.float32)
    # Warned of once.
    compare_on_device(run, tensors_of(), torch.float32)


def test_image_sizes_share_compiled_kernels():
    """Sliding attention in strips and, where these do not apply, in tiles; window attention."""
    counts = rows_of('specialize_kernels.py')
    # One column is too narrow for strips at dilation 1. Windows of 7 and of 12.
    assert len(counts) == 7 + 4 + 2 + 3 + 4 + 3 + 3 + 1 + 1
    for kernel, *_, count in counts:
        # Forward and transposed convolution, and two memory orders of the sum, are constants.
        assert int(count) == 1 + kernel.endswith(('.convolve_kernel', '.add_kernel')), counts
