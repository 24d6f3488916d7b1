"""The backends of window_attention against the reference, and its argument checks."""

import functools

import pytest
import torch
from helpers.operators import TOLERANCE, compare, padded_window_tensors, window_tensors

from acmix_mm.ops import window_attention

BACKENDS = ('sdpa', 'chunked')
WINDOWS = [
    # batch, grid, window, shift, heads, head_dims
    (1, (1, 1), (7, 7), 0, 3, 8),
    (2, (2, 3), (7, 7), 0, 2, 8),
    (2, (2, 3), (7, 7), 3, 2, 8),
    (1, (1, 4), (7, 7), 3, 3, 4),
    (2, (3, 2), (4, 4), 2, 1, 8),
    (2, (1, 1), (2, 5), 0, 2, 4),
    (1, (1, 1), (1, 1), 0, 2, 4),
]


def attend(window_size, shift_size):
    return functools.partial(window_attention, window_size=window_size, shift_size=shift_size)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('batch', 'grid', 'window_size', 'shift_size', 'heads', 'head_dims'),
                         WINDOWS)
def test_equals_reference(dtype, backend, batch, grid, window_size, shift_size, heads, head_dims):
    tensors = window_tensors(batch, grid, window_size, heads, head_dims)
    compare(attend(window_size, shift_size), tensors, backend, dtype)


@pytest.mark.parametrize('backend', BACKENDS)
def test_equals_reference_without_gradients(backend):
    """Without gradients, torch runs another attention kernel."""
    qkv, bias = window_tensors(2, (2, 3), (7, 7), 3, 8)
    for shift_size in (0, 3):
        run = attend((7, 7), shift_size)
        torch.testing.assert_close(run(qkv, bias, backend=backend),
                                   run(qkv, bias, backend='reference'))


def test_gradcheck():
    tensors = [tensor.double().requires_grad_() for tensor in
               window_tensors(2, (2, 2), (2, 3), 2, 2)]
    for shift_size in (0, 1):
        run = functools.partial(attend((2, 3), shift_size), backend='chunked')
        assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize('backend', ['reference', *BACKENDS])
def test_maps_rolled_without_padding(backend):
    """Also along an axis shorter than the shift."""
    for size, shift_size in (((5, 4), 1), ((1, 9), 3)):
        qkv, bias, padding = (each.double() for each in
                              padded_window_tensors(2, size, (4, 4), 2, 2))
        run = functools.partial(window_attention, bias=bias, window_size=(4, 4), padding=padding,
                                shift_size=shift_size, backend=backend)
        expected = run(qkv).roll((-shift_size, -shift_size), (1, 2))
        actual = run(qkv.roll((-shift_size, -shift_size), (1, 2)), is_rolled=True)
        torch.testing.assert_close(actual, expected)


def test_dropout_rate():
    qkv, bias = window_tensors(1, (4, 4), (7, 7), 4, 8)
    qkv[:, :, :, 2] = 1.0
    for backend in (None, 'sdpa', 'reference'):
        out = window_attention(qkv, torch.zeros_like(bias), (7, 7), dropout_p=0.25, backend=backend)
        assert out.std() > 0.01
        assert out.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='flash'), 'has no backend .flash.; it has chunked, reference, sdpa, triton'),
    (dict(backend='chunked', dropout_p=0.1), 'has no dropout, got dropout_p=0.1; use .sdpa.'),
    (dict(qkv=torch.zeros(1, 7, 7, 12)), 'takes qkv of shape'),
    (dict(window_size=(5, 7)), 'does not divide into windows'),
    (dict(padding=torch.zeros(2, 4)), 'takes padding of shape .3, 2, 4. for this map'),
    (dict(bias=torch.zeros(2, 49, 48)), 'takes a bias of shape'),
    (dict(shift_size=7), 'shift_size must lie in'),
])
def test_invalid_arguments(change, message):
    qkv, bias = window_tensors(1, (2, 1), (7, 7), 2, 4)
    given = dict(qkv=qkv, bias=bias, window_size=(7, 7))
    with pytest.raises(ValueError, match=message):
        window_attention(**{**given, **change})
