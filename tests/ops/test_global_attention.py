"""Global attention: its backends against its equation, and memory linear in the map."""

import functools

import pytest
import torch
from helpers.operators import TOLERANCE, compare, largest_tensor, sliding_tensors

from acmix_mm.ops import global_attention


def attend_by_loops(qkv, positions, stride, scale):
    """The equation, as loops over queries."""
    q, k, v = qkv.unbind(3)
    out = torch.empty_like(q[:, ::stride, ::stride])
    for row in range(0, qkv.shape[1], stride):
        for column in range(0, qkv.shape[2], stride):
            keys = k + (positions[row, column] - positions)[None, :, :, None]
            logits = scale * (q[:, row, column][:, None, None] * keys).sum(-1)
            weights = logits.flatten(1, 2).softmax(1).view_as(logits)
            out[:, row // stride, column // stride] = (weights[..., None] * v).sum((1, 2))
    return out.flatten(3)


@pytest.mark.parametrize('backend', ['reference', 'sdpa'])
@pytest.mark.parametrize(('size', 'stride'), [((1, 1), 1), ((4, 7), 1), ((5, 4), 2), ((7, 3), 3)])
def test_equals_the_equation(backend, size, stride):
    tensors = [each.double() for each in sliding_tensors(2, 2, 3, *size)]
    results = []
    for run in (functools.partial(attend_by_loops, scale=0.7),
                functools.partial(global_attention, scale=0.7, backend=backend)):
        leaves = [each.clone().requires_grad_() for each in tensors]
        out = run(*leaves, stride=stride)
        cotangent = torch.arange(out.numel()).view_as(out).double().sin()
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('heads_last', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
def test_sdpa_equals_reference(dtype, heads_last, stride):
    run = functools.partial(global_attention, stride=stride)
    compare(run, sliding_tensors(2, 2, 16, 9, 14, heads_last), 'sdpa', dtype)


@pytest.mark.parametrize('heads_last', [False, True])
def test_memory_is_linear(heads_last):
    """No tensor has more elements than queries, keys and values, forward and backward."""
    sizes = {}
    for side in (12, 24):
        tensors = [each.requires_grad_() for each in
                   sliding_tensors(1, 2, 8, side, side, heads_last)]
        for backend in ('sdpa', 'reference'):
            run = functools.partial(global_attention, *tensors, backend=backend)
            sizes[backend, side] = largest_tensor(lambda run=run: run().sum().backward())
    assert [sizes['sdpa', side] for side in (12, 24)] == [3 * 16 * 12**2, 3 * 16 * 24**2]
    assert sizes['reference', 24] >= 24**4


def test_dropout():
    tensors = sliding_tensors(1, 2, 8, 6, 5)
    for backend in ('reference', 'sdpa'):
        torch.manual_seed(0)
        outs = torch.stack([global_attention(*tensors, dropout_p=0.2, backend=backend)
                            for _ in range(400)])
        expected = global_attention(*tensors)
        assert not torch.allclose(outs[0], expected)
        assert (outs.mean(0) - expected).abs().max() < 0.2


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='tiled'), 'has no backend .tiled.; it has reference, sdpa'),
    (dict(qkv=torch.zeros(1, 5, 6, 2, 2, 4)), 'takes qkv of shape'),
    (dict(positions=torch.zeros(6, 5, 4)), r'positions must be of shape \(5, 6, 4\)'),
])
def test_invalid_arguments(change, message):
    given = dict(zip(('qkv', 'positions'), sliding_tensors(1, 2, 4, 5, 6)))
    with pytest.raises(ValueError, match=message):
        global_attention(**{**given, **change})
