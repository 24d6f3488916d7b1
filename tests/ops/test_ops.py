"""Every fast form of an operator against its reference, forward and backward."""

import functools
import itertools

import pytest
import torch
from helpers.operators import (
    TOLERANCE,
    compare,
    conv_tensors,
    slide,
    sliding_tensors,
    window_tensors,
)

import acmix_mm.ops.patchwise_attention as patch_module
from acmix_mm.ops import (
    patch_aggregation,
    patch_features,
    shift_conv,
    sliding_window_attention,
    window_attention,
)
from acmix_mm.ops.reflection import reflected_range


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', ['two_step', 'folded', 'conv2d'])
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
def test_shift_conv_equals_reference(dtype, backend, heads, head_dims, height, width, kernel_size,
                                     bias):
    for channels_last in (True, False):
        tensors = conv_tensors(2, heads, head_dims, height, width, kernel_size, bias,
                               channels_last)
        compare(shift_conv, tensors, backend, dtype)


@pytest.mark.parametrize('backend', ['two_step', 'folded', 'conv2d'])
@pytest.mark.parametrize(('stride', 'dilation'), [(2, 1), (3, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize(('height', 'width', 'kernel_size'), [(1, 1, 3), (8, 5, 3), (13, 12, 5)])
def test_shift_conv_with_stride_and_dilation(backend, stride, dilation, height, width, kernel_size):
    tensors = conv_tensors(2, 3, 4, height, width, kernel_size, True, False)
    run = functools.partial(shift_conv, stride=stride, dilation=dilation)
    compare(run, tensors, backend, torch.float32)


def test_shift_conv_starts_as_pure_shifts():
    """With one-hot kernels, output is the sum of the mixed maps, each moved by its own offset."""
    maps = torch.randn(1, 3, 1, 5, 6)
    mixing = torch.randn(9, 3)
    one_hot = torch.eye(9).view(1, 9, 3, 3)
    mixed = torch.einsum('jm,bmdhw->bjhw', mixing, maps)
    expected = torch.zeros(1, 1, 5, 6)
    for index, (down, across) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
        for row, column in itertools.product(range(5), range(6)):
            if 0 <= row + down < 5 and 0 <= column + across < 6:
                expected[0, 0, row, column] += mixed[0, index, row + down, column + across]
    torch.testing.assert_close(shift_conv(maps, mixing, one_hot), expected)


def test_shift_conv_gradcheck():
    for backend in ('two_step', 'folded'):
        tensors = [tensor.double().requires_grad_()
                   for tensor in conv_tensors(1, 2, 2, 3, 4, 3, True, True)]
        assert torch.autograd.gradcheck(functools.partial(shift_conv, backend=backend), tensors)


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
    def run(qkv, bias, backend):
        return window_attention(qkv, bias, window_size, shift_size=shift_size, backend=backend)
    return run


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', ['sdpa', 'chunked'])
@pytest.mark.parametrize(('batch', 'grid', 'window_size', 'shift_size', 'heads', 'head_dims'),
                         WINDOWS)
def test_window_attention_equals_reference(dtype, backend, batch, grid, window_size, shift_size,
                                           heads, head_dims):
    tensors = window_tensors(batch, grid, window_size, heads, head_dims)
    compare(attend(window_size, shift_size), tensors, backend, dtype)


def test_window_attention_without_gradients_equals_reference():
    """Where nothing needs a gradient, torch takes another kernel."""
    qkv, bias = window_tensors(2, (2, 3), (7, 7), 3, 8)
    for shift_size in (0, 3):
        run = attend((7, 7), shift_size)
        for backend in ('sdpa', 'chunked'):
            torch.testing.assert_close(run(qkv, bias, backend), run(qkv, bias, 'reference'))


def test_window_attention_gradcheck():
    tensors = [tensor.double().requires_grad_() for tensor in
               window_tensors(2, (2, 2), (2, 3), 2, 2)]
    for shift_size in (0, 1):
        run = attend((2, 3), shift_size)
        assert torch.autograd.gradcheck(lambda *t, run=run: run(*t, backend='chunked'), tensors)


def test_window_attention_drops_weights_at_its_rate():
    qkv, bias = window_tensors(1, (4, 4), (7, 7), 4, 8)
    qkv[:, :, :, 2] = 1.0
    for backend in (None, 'sdpa', 'reference'):
        out = window_attention(qkv, torch.zeros_like(bias), (7, 7), dropout_p=0.25, backend=backend)
        assert out.std() > 0.01
        assert out.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', ['tiled', 'dense'])
@pytest.mark.parametrize(('heads', 'head_dims', 'height', 'width', 'kernel_size'), [
    (1, 4, 1, 1, 7),
    (2, 8, 1, 12, 7),
    (4, 4, 3, 2, 7),
    (2, 4, 8, 8, 5),
    (1, 16, 17, 30, 3),
    (2, 8, 65, 97, 7),
])
def test_sliding_attention_equals_reference(dtype, backend, heads, head_dims, height, width,
                                            kernel_size):
    for heads_last in (True, False):
        tensors = sliding_tensors(2, heads, head_dims, height, width, heads_last)
        compare(slide(kernel_size), tensors, backend, dtype)


@pytest.mark.parametrize('backend', ['tiled', 'dense'])
@pytest.mark.parametrize(('stride', 'dilation'), [(2, 1), (3, 1), (1, 2), (1, 4), (2, 3)])
@pytest.mark.parametrize(('height', 'width', 'kernel_size'), [(1, 1, 3), (9, 4, 7), (30, 33, 7)])
def test_sliding_attention_with_stride_and_dilation(backend, stride, dilation, height, width,
                                                    kernel_size):
    tensors = sliding_tensors(2, 2, 4, height, width)
    compare(slide(kernel_size, stride, dilation), tensors, backend, torch.float32)


def test_sliding_attention_gradcheck():
    tensors = [tensor.double().requires_grad_() for tensor in sliding_tensors(1, 2, 2, 5, 9)]
    for stride, dilation in ((1, 1), (2, 2)):
        run = slide(3, stride, dilation)
        assert torch.autograd.gradcheck(lambda *t, run=run: run(*t, backend='tiled'), tensors)


def test_sliding_attention_averages_the_neighbourhood_when_queries_are_zero():
    qkv, positions = sliding_tensors(1, 1, 2, 6, 7)
    qkv[:, :, :, 0] = 0
    out = sliding_window_attention(qkv, positions, 3)
    values = qkv[:, :, :, 2, 0].permute(0, 3, 1, 2)
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1), mode='reflect')
    expected = torch.nn.functional.avg_pool2d(padded, 3, stride=1)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected)


def test_mirrored_border_repeats_as_often_as_it_takes():
    assert reflected_range(-4, 8, 4, 'cpu').tolist() == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert reflected_range(-3, 4, 2, 'cpu').tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert reflected_range(-3, 4, 1, 'cpu').tolist() == [0] * 7


def features_tensors(batch, channels, height, width, kernel_size):
    around = channels * (kernel_size**2 + 1)
    q, k = torch.randn(2, batch, channels, height, width)
    return [q, k, torch.randn(around), torch.randn(around), torch.randn(3, around) / around**0.5]


def aggregation_tensors(batch, channels, height, width, kernel_size, groups=2):
    area = kernel_size**2
    return [torch.randn(batch, channels, height, width), torch.randn(batch, 3, height, width),
            torch.randn(groups * area, 3) / area, torch.randn(groups * area) / area]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('operator', 'tensors_of'), [
    (patch_features, features_tensors), (patch_aggregation, aggregation_tensors)])
@pytest.mark.parametrize(('height', 'width', 'kernel_size'), [
    (1, 1, 7), (1, 12, 7), (3, 2, 7), (9, 5, 3), (17, 30, 7), (4, 4, 1)])
def test_patch_operators_equal_reference(dtype, operator, tensors_of, height, width, kernel_size,
                                         monkeypatch):
    monkeypatch.setattr(patch_module, 'COPIED_AT_ONCE', 2 * 4 * width * kernel_size**2 * 3)
    run = functools.partial(operator, kernel_size=kernel_size)
    compare(run, tensors_of(2, 4, height, width, kernel_size), 'chunked', dtype)
    if operator is patch_aggregation:
        compare(run, tensors_of(2, 4, height, width, kernel_size), 'kernel_rows', dtype)


def test_patch_operators_gradcheck(monkeypatch):
    monkeypatch.setattr(patch_module, 'COPIED_AT_ONCE', 1)
    for operator, tensors in ((patch_features, features_tensors(1, 2, 3, 2, 3)),
                              (patch_aggregation, aggregation_tensors(1, 4, 3, 2, 3))):
        leaves = [tensor.double().requires_grad_() for tensor in tensors]
        run = functools.partial(operator, kernel_size=3)
        assert torch.autograd.gradcheck(run, leaves)


def test_patch_operators_copy_a_few_rows_at_a_time(monkeypatch):
    """No tensor is made on the way that holds a copy of the whole map for every neighbour."""
    monkeypatch.setattr(patch_module, 'COPIED_AT_ONCE', 4 * 16 * 49 * 2)
    largest = []
    monkeypatch.setattr(patch_module.F, 'unfold', lambda *arguments, unfold=patch_module.F.unfold:
                        largest.append(unfold(*arguments)) or largest[-1])
    for operator, tensors in ((patch_features, features_tensors(1, 4, 24, 16, 7)),
                              (patch_aggregation, aggregation_tensors(1, 4, 24, 16, 7))):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        operator(*leaves, kernel_size=7).sum().backward()
    assert len(largest) == 2 * 2 * 12
    assert {copies.shape for copies in largest} == {(1, 4 * 49, 2 * 16)}


def test_patch_aggregation_with_bias_alone_is_a_mirrored_convolution():
    v, features, weight, bias = aggregation_tensors(1, 4, 6, 5, 3)
    out = patch_aggregation(v, features, torch.zeros_like(weight), bias, 3)
    padded = torch.nn.functional.pad(v, (1, 1, 1, 1), mode='reflect')
    kernels = bias.view(2, 1, 3, 3).repeat(2, 1, 1, 1)
    torch.testing.assert_close(out, torch.nn.functional.conv2d(padded, kernels, groups=4))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fused'), 'has no backend .fused.; it has chunked, reference'),
    (dict(k=torch.zeros(1, 4, 5, 5)), 'takes q and k of shape'),
    (dict(scale=torch.zeros(36)), r'need scale and shift of shape \(40,\)'),
    (dict(kernel_size=4), 'takes odd kernels, got one of 4'),
])
def test_patch_features_refuses(change, message):
    q, k, scale, shift, weight = features_tensors(1, 4, 5, 6, 3)
    given = dict(q=q, k=k, scale=scale, shift=shift, weight=weight, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        patch_features(**{**given, **change})


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fused'), 'has no backend .fused.; it has chunked, kernel_rows, reference'),
    (dict(features=torch.zeros(1, 3, 5, 5)), 'takes v and features of shape'),
    (dict(weight=torch.zeros(27, 3), bias=torch.zeros(27)), 'groups dividing 4'),
    (dict(bias=torch.zeros(9)), 'and a bias to it'),
    (dict(kernel_size=2), 'takes odd kernels, got one of 2'),
])
def test_patch_aggregation_refuses(change, message):
    v, features, weight, bias = aggregation_tensors(1, 4, 5, 6, 3)
    given = dict(v=v, features=features, weight=weight, bias=bias, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        patch_aggregation(**{**given, **change})


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fused'), 'has no backend .fused.; it has dense, reference, tiled, triton'),
    (dict(qkv=torch.zeros(1, 5, 6, 24)), 'takes qkv of shape'),
    (dict(positions=torch.zeros(4, 5, 5)), 'positions must be of shape'),
    (dict(kernel_size=4), 'takes odd kernels, got one of 4'),
])
def test_sliding_attention_refuses(change, message):
    qkv, positions = sliding_tensors(1, 2, 4, 5, 6)
    given = dict(qkv=qkv, positions=positions, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(**{**given, **change})


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='fastest'), 'has no backend .fastest.; it has conv2d, folded, reference, triton, '
                             'two_step'),
    (dict(maps=torch.zeros(1, 9, 4, 5)), 'takes maps of shape'),
    (dict(shift_weight=torch.zeros(10, 9, 3, 3)), 'need a shift_weight of shape'),
    (dict(shift_weight=torch.zeros(12, 4, 2, 2), fc_weight=torch.zeros(4, 9)), 'odd kernels'),
    (dict(fc_weight=torch.zeros(9, 8)), 'need an fc_weight of shape'),
])
def test_shift_conv_refuses(change, message):
    maps, fc_weight, shift_weight, _ = conv_tensors(1, 3, 4, 5, 5, 3, False, False)
    given = dict(maps=maps, fc_weight=fc_weight, shift_weight=shift_weight)
    with pytest.raises(ValueError, match=message):
        shift_conv(**{**given, **change})


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='flash'), 'has no backend .flash.; it has chunked, reference, sdpa'),
    (dict(backend='chunked', dropout_p=0.1), 'drops no weights; take .sdpa.'),
    (dict(qkv=torch.zeros(1, 7, 7, 12)), 'takes qkv of shape'),
    (dict(window_size=(5, 7)), 'does not divide into windows'),
    (dict(bias=torch.zeros(2, 49, 48)), 'takes a bias of shape'),
    (dict(shift_size=7), 'shift_size must lie in'),
])
def test_window_attention_refuses(change, message):
    qkv, bias = window_tensors(1, (2, 1), (7, 7), 2, 4)
    given = dict(qkv=qkv, bias=bias, window_size=(7, 7))
    with pytest.raises(ValueError, match=message):
        window_attention(**{**given, **change})
