"""The backends of shift_conv against the reference, and its argument checks."""

import functools
import itertools

import pytest
import torch
from helpers import relative_error
from helpers.operators import TOLERANCE, compare, conv_tensors

from acmix_mm.ops import shift_conv

BACKENDS = ('two_step', 'folded', 'conv2d')


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('heads', 'head_dims', 'height', 'width', 'kernel_size', 'bias'), [
    (1, 4, 1, 1, 3, True),
    (3, 8, 1, 6, 3, True),
    (3, 8, 2, 2, 3, True),
    (3, 8, 9, 5, 3, False),
    (4, 4, 8, 11, 3, True),
    (6, 4, 14, 14, 3, True),
    (2, 4, 4, 7, 5, True),
    (2, 4, 7, 6, 5, False),
    (2, 4, 5, 5, 1, True),
])
def test_equals_reference(dtype, backend, heads, head_dims, height, width, kernel_size, bias):
    for channels_last in (True, False):
        tensors = conv_tensors(2, heads, head_dims, height, width, kernel_size, bias,
                               channels_last)
        compare(shift_conv, tensors, backend, dtype)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('stride', 'dilation'), [(2, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(('height', 'width', 'kernel_size'), [(1, 1, 3), (8, 5, 3), (13, 12, 5)])
def test_stride_and_dilation(backend, stride, dilation, height, width, kernel_size):
    tensors = conv_tensors(2, 3, 4, height, width, kernel_size, True, False)
    run = functools.partial(shift_conv, stride=stride, dilation=dilation)
    compare(run, tensors, backend, torch.float32)


def test_one_hot_kernels_are_shifts():
    """The output is the sum of the mixed maps, each moved by its own offset."""
    maps = torch.randn(1, 3, 1, 5, 6)
    mixing = torch.randn(9, 3)
    one_hot = torch.eye(9).view(1, 9, 3, 3)
    mixed = torch.einsum('jm,bmdhw->bjdhw', mixing, maps)[:, :, 0]
    expected = torch.zeros(1, 1, 5, 6)
    for index, (down, across) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
        for row, column in itertools.product(range(5), range(6)):
            if 0 <= row + down < 5 and 0 <= column + across < 6:
                expected[0, 0, row, column] += mixed[0, index, row + down, column + across]
    torch.testing.assert_close(shift_conv(maps, mixing, one_hot), expected)


@pytest.mark.parametrize('backend', ['two_step', 'folded'])
def test_gradcheck(backend):
    tensors = [tensor.double().requires_grad_()
               for tensor in conv_tensors(1, 2, 2, 3, 4, 3, True, True)]
    assert torch.autograd.gradcheck(functools.partial(shift_conv, backend=backend), tensors)


@pytest.mark.parametrize('backend', BACKENDS)
def test_float32_under_autocast(backend):
    """The backward pass runs outside autocast, on float32 inputs and a gradient in bfloat16."""
    tensors = conv_tensors(1, 2, 4, 5, 6, 3, True, True)
    results = []
    for enabled in (False, True):
        leaves = [each.clone().requires_grad_() for each in tensors]
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = shift_conv(*leaves, backend=backend)
        out.square().sum().backward()
        results.append([each.grad for each in leaves])
    for expected, actual in zip(*results):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 0.1


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fastest'), 'has no backend .fastest.; it has conv2d, folded, reference, triton, '
                              'two_step'),
    (dict(maps=torch.zeros(1, 9, 4, 5)), 'takes maps of shape'),
    (dict(shift_weight=torch.zeros(10, 9, 3, 3)), 'need a shift_weight of shape'),
    (dict(shift_weight=torch.zeros(12, 4, 2, 2), fc_weight=torch.zeros(4, 9)), 'odd kernels'),
    (dict(fc_weight=torch.zeros(9, 8)), 'need an fc_weight of shape'),
])
def test_invalid_arguments(change, message):
    maps, fc_weight, shift_weight, _ = conv_tensors(1, 3, 4, 5, 5, 3, False, False)
    given = dict(maps=maps, fc_weight=fc_weight, shift_weight=shift_weight)
    with pytest.raises(ValueError, match=message):
        shift_conv(**{**given, **change})
