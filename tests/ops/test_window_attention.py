"""The backends of window_attention against the reference, and its argument checks."""

import functools

import pytest
import torch
from helpers.operators import (
    TOLERANCE,
    attend_padded,
    compare,
    padded_window_tensors,
    window_tensors,
)

from acmix_mm.ops import window_attention
from acmix_mm.ops.window_attention import chunked, window_attention_and_map

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


PADDED = [
    # size, window, shift; the padding lies in one or two rows of windows, or shifts are wider than
    # the map
    ((10, 9), (7, 7), 3),
    ((15, 16), (7, 7), 5),
    ((9, 8), (4, 4), 0),
    ((2, 9), (4, 4), 3),
]


@pytest.mark.parametrize('strip_logits', [1, 2**19])
@pytest.mark.parametrize('is_rolled', [False, True])
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('size', 'window_size', 'shift_size'), PADDED)
def test_padding_equals_reference(monkeypatch, size, window_size, shift_size, backend, is_rolled,
                                  strip_logits):
    """The reference pads, rolls, attends, rolls back and crops."""
    monkeypatch.setattr(chunked, 'STRIP_LOGITS', strip_logits)
    whole = attend_padded(window_size, shift_size)

    def run(qkv, bias, padding, backend):
        if backend == 'reference' or not is_rolled:
            return whole(qkv, bias, padding, backend)
        out = window_attention(qkv.roll((-shift_size, -shift_size), (1, 2)), bias, window_size,
                               shift_size=shift_size, padding=padding, is_rolled=True,
                               backend=backend)
        return out.roll((shift_size, shift_size), (1, 2))

    tensors = padded_window_tensors(2, size, window_size, 2, 4)
    compare(run, tensors, backend, torch.float32)


@pytest.mark.parametrize('backend', [*BACKENDS, 'reference'])
def test_gradient_of_a_map_that_others_read(backend):
    """Whether the others, attention, or both need the gradient."""
    qkv, bias, padding = (each.double().requires_grad_()
                          for each in padded_window_tensors(1, (5, 6), (4, 4), 2, 4))
    options = dict(shift_size=1, padding=padding, is_rolled=True, scale=0.5, backend=backend)
    expected_out = window_attention(qkv, bias, (4, 4), **options).sin().sum()
    for expected, losses in [
        (expected_out, lambda out, maps: out.sin().sum()),
        (qkv.cos().sum(), lambda out, maps: maps.cos().sum()),
        (expected_out + qkv.cos().sum(), lambda out, maps: out.sin().sum() + maps.cos().sum()),
    ]:
        actual = losses(*window_attention_and_map(qkv, bias, (4, 4), **options))
        grads = [torch.autograd.grad(loss, (qkv, bias), allow_unused=True, retain_graph=True)
                 for loss in (actual, expected)]
        torch.testing.assert_close(*grads)
    maps = window_attention_and_map(qkv, bias, (4, 4), **options)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: window_attention_and_map(*tensors, (4, 4), **options), (qkv, bias),
        fast_mode=True)
    assert torch.equal(maps[1], qkv)


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
