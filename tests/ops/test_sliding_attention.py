"""The backends of sliding_window_attention against the reference, and its argument checks."""

import functools

import pytest
import torch
from helpers import relative_error
from helpers.operators import TOLERANCE, compare, slide, sliding_tensors

from acmix_mm.ops import sliding_window_attention

BACKENDS = ('tiled', 'dense')


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('heads', 'head_dims', 'height', 'width', 'kernel_size'), [
    (1, 4, 1, 1, 7),
    (2, 8, 1, 12, 7),
    (4, 4, 3, 2, 7),
    (2, 4, 8, 8, 5),
    (1, 16, 17, 30, 3),
    (2, 8, 65, 97, 7),
])
def test_equals_reference(dtype, backend, heads, head_dims, height, width, kernel_size):
    for heads_last in (True, False):
        tensors = sliding_tensors(2, heads, head_dims, height, width, heads_last)
        compare(slide(kernel_size), tensors, backend, dtype)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('stride', 'dilation'), [(2, 1), (3, 1), (1, 2), (1, 4), (2, 3)])
@pytest.mark.parametrize(('height', 'width', 'kernel_size'), [(1, 1, 3), (9, 4, 7), (30, 33, 7)])
def test_stride_and_dilation(backend, stride, dilation, height, width, kernel_size):
    tensors = sliding_tensors(2, 2, 4, height, width)
    compare(slide(kernel_size, stride, dilation), tensors, backend, torch.float32)


def test_gradcheck():
    tensors = [tensor.double().requires_grad_() for tensor in sliding_tensors(1, 2, 2, 5, 9)]
    for stride, dilation in ((1, 1), (2, 2)):
        run = functools.partial(slide(3, stride, dilation), backend='tiled')
        assert torch.autograd.gradcheck(run, tensors)


def test_zero_queries_average_the_neighbourhood():
    qkv, positions = sliding_tensors(1, 1, 2, 6, 7)
    qkv[:, :, :, 0] = 0
    out = sliding_window_attention(qkv, positions, 3)
    values = qkv[:, :, :, 2, 0].permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1), mode='reflect')
    expected = torch.nn.functional.avg_pool2d(padded, 3, stride=1)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize('backend', ('reference', *BACKENDS))
def test_positions_stay_in_float32(backend):
    """Queries, keys and values are in bfloat16."""
    qkv, positions = sliding_tensors(2, 2, 8, 9, 10)
    results = []
    for dtype, name in ((torch.float64, 'reference'), (torch.bfloat16, backend)):
        leaf = positions.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = sliding_window_attention(qkv.bfloat16().to(dtype), leaf, 3, backend=name)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out.sum(), leaf)])
    for expected, actual in zip(*results):
        assert relative_error(actual.double(), expected) < TOLERANCE[torch.bfloat16]
    assert actual.dtype == torch.float32


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fused'), 'has no backend .fused.; it has dense, reference, tiled, triton'),
    (dict(qkv=torch.zeros(1, 5, 6, 24)), 'takes qkv of shape'),
    (dict(positions=torch.zeros(4, 5, 5)), 'positions must be of shape'),
    (dict(kernel_size=4), 'takes odd kernels, got one of 4'),
])
def test_invalid_arguments(change, message):
    qkv, positions = sliding_tensors(1, 2, 4, 5, 6)
    given = dict(qkv=qkv, positions=positions, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**{**given, **change})
