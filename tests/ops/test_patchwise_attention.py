"""The backends of patch_features and patch_aggregation against the reference; argument checks."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.operators import TOLERANCE, aggregation_tensors, compare, features_tensors

from acmix_mm.ops import patch_aggregation, patch_features
from acmix_mm.ops.patchwise_attention import chunked


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('operator', 'tensors_of', 'backend'), [
    (patch_features, features_tensors, 'chunked'),
    (patch_aggregation, aggregation_tensors, 'chunked'),
    (patch_aggregation, aggregation_tensors, 'kernel_rows'),
])
@pytest.mark.parametrize(('height', 'width', 'kernel_size'), [
    (1, 1, 7), (1, 12, 7), (3, 2, 7), (9, 5, 3), (17, 30, 7), (4, 4, 1)])
def test_equals_reference(dtype, operator, tensors_of, backend, height, width, kernel_size,
                          monkeypatch):
    # Chunks of three rows.
    monkeypatch.setattr(chunked, 'CHUNK', 2 * 4 * width * kernel_size**2 * 3)
    run = functools.partial(operator, kernel_size=kernel_size)
    compare(run, tensors_of(2, 4, height, width, kernel_size), backend, dtype)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(chunked, 'CHUNK', 1)
    for operator, tensors in ((patch_features, features_tensors(1, 2, 3, 2, 3)),
                              (patch_aggregation, aggregation_tensors(1, 4, 3, 2, 3))):
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        run = functools.partial(operator, kernel_size=3)
        assert torch.autograd.gradcheck(run, leaves)


def test_copies_neighbourhoods_of_a_chunk_at_a_time(monkeypatch):
    """No intermediate tensor holds copies of the whole map."""
    monkeypatch.setattr(chunked, 'CHUNK', 4 * 16 * 49 * 2)
    unfold, shapes = F.unfold, []

    def recorded(*arguments):
        copies = unfold(*arguments)
        shapes.append(copies.shape)
        return copies
    monkeypatch.setattr(F, 'unfold', recorded)
    for operator, tensors in ((patch_features, features_tensors(1, 4, 24, 16, 7)),
                              (patch_aggregation, aggregation_tensors(1, 4, 24, 16, 7))):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        operator(*leaves, kernel_size=7).sum().backward()
    assert len(shapes) == 2 * 2 * 12
    assert set(shapes) == {(1, 4 * 49, 2 * 16)}


def test_aggregation_with_bias_alone_is_a_convolution_with_reflection_padding():
    v, features, weight, bias = aggregation_tensors(1, 4, 6, 5, 3)
    out = patch_aggregation(v, features, torch.zeros_like(weight), bias, 3)
    padded = F.pad(v, (1, 1, 1, 1), mode='reflect')
    kernels = bias.view(2, 1, 3, 3).repeat(2, 1, 1, 1)
    torch.testing.assert_close(out, F.conv2d(padded, kernels, groups=4))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fused'), 'has no backend .fused.; it has chunked, reference'),
    (dict(k=torch.zeros(1, 4, 5, 5)), 'takes q and k of shape'),
    (dict(scale=torch.zeros(36)), r'need scale and shift of shape \(40,\)'),
    (dict(kernel_size=4), 'takes odd kernels, got one of 4'),
])
def test_invalid_arguments_of_features(change, message):
    q, k, scale, shift, weight = features_tensors(1, 4, 5, 6, 3)
    given = dict(q=q, k=k, scale=scale, shift=shift, weight=weight, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        patch_features(**{**given, **change})


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fused'), 'has no backend .fused.; it has chunked, kernel_rows, reference'),
    (dict(features=torch.zeros(1, 3, 5, 5)), 'takes v and features of shape'),
    (dict(weight=torch.zeros(27, 3), bias=torch.zeros(27)), 'groups dividing 4'),
    (dict(bias=torch.zeros(9)), 'and a bias to match'),
    (dict(kernel_size=2), 'takes odd kernels, got one of 2'),
])
def test_invalid_arguments_of_aggregation(change, message):
    v, features, weight, bias = aggregation_tensors(1, 4, 5, 6, 3)
    given = dict(v=v, features=features, weight=weight, bias=bias, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        patch_aggregation(**{**given, **change})
