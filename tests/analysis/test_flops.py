"""Counts of the layers against formulas worked out by hand, and against torch's own counts."""

import contextlib
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.analysis.flops import count, total
from acmix_mm.layers import (
    ACmixConv2d,
    PatchwiseACmix,
    PatternACmix,
    PatternACmixConv2d,
    ReducedACmix,
    WindowACmix,
)
from acmix_mm.layers.attention_pattern import GlobalPattern, bigbird_pattern, random_pattern
from acmix_mm.layers.base import ATTENTION, CONVOLUTION, OPERATOR_CLASSES, PROJECTIONS, REST
from acmix_mm.ops import use_backend
from acmix_mm.ops.shift_conv.folding import convolved_bias


def numbers(counts):
    return {name: each.multiply_adds for name, each in counts.items()}


CONVOLUTION_BACKENDS = ('reference', 'two_step', 'folded', 'conv2d', 'triton')


@contextlib.contextmanager
def use_backends(attention, convolution):
    """Use one backend for attention and another one for shift_conv.

    The innermost context applies first, so it must be one that the other operator lacks.
    """
    inner, outer = attention, convolution
    if attention in CONVOLUTION_BACKENDS:
        inner, outer = convolution, attention
    with use_backend(outer), use_backend(inner):
        yield


def pairs_of_backends(attention):
    """All operators have 'reference' and 'triton', so that contexts cannot combine these two."""
    return [pair for pair in itertools.product(attention, CONVOLUTION_BACKENDS)
            if set(pair) != {'reference', 'triton'}]


@pytest.mark.parametrize(('attention', 'convolution'), pairs_of_backends(
    ['reference', 'sdpa', 'chunked', 'triton']))
def test_window_acmix(attention, convolution):
    """Two images of 5×6, windows of 4: attention's map is padded to 8×8."""
    layer = WindowACmix(12, 3, window_size=4, shift_size=2)
    with use_backends(attention, convolution):
        counts = count(layer, lambda: layer(torch.zeros(2, 5, 6, 12)))
    assert numbers(counts) == {
        PROJECTIONS: 2 * 64 * 4 * 12 * 12,
        ATTENTION: 2 * 64 * 2 * 16 * 12,
        CONVOLUTION: 2 * 30 * (3 * 12 * 9 + 12 * 81),
        REST: 0,
    }
    assert {name: each.parameters for name, each in counts.items()} == {
        PROJECTIONS: 36 * 12 + 36 + 12 * 12 + 12, ATTENTION: 49 * 3,
        CONVOLUTION: 9 * 9 + 9 + 12 * 9 * 9, REST: 2}
    assert total(counts).parameters == sum(each.numel() for each in layer.parameters())


@pytest.mark.parametrize(('attention', 'convolution'), pairs_of_backends(
    ['reference', 'tiled', 'dense', 'triton']))
def test_acmix_conv(attention, convolution):
    """Stride 2 on 7×5: projections and fc run on all 35 positions, the rest on 4×3 outputs."""
    layer = ACmixConv2d(6, 8, stride=2, num_heads=2, attn_kernel_size=5)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer)
    with use_backends(attention, convolution):
        counts = count(model, lambda: model(torch.zeros(2, 3, 7, 5)))
    assert numbers(counts) == {
        PROJECTIONS: 2 * 35 * 3 * 6 * 8,
        ATTENTION: 2 * 12 * 2 * 25 * 8 + 35 * 2 * 4,
        CONVOLUTION: 2 * (35 * 3 * 8 * 9 + 12 * 8 * 81),
        REST: 2 * 35 * 3 * 6,
    }


def test_reduced_acmix():
    """6×5 in cells of 2: 3×2 keys and values, which the fc mixes once per cell."""
    layer = ReducedACmix(12, 3, sr_ratio=2)
    assert numbers(count(layer, lambda: layer(torch.zeros(2, 6, 5, 12)))) == {
        PROJECTIONS: 2 * 12 * 12 * (30 + 2 * 6 + 6 * 4 + 30),
        ATTENTION: 2 * 30 * 2 * 6 * 12,
        CONVOLUTION: 2 * ((30 + 2 * 6) * 12 * 9 + 30 * 12 * 81),
        REST: 0,
    }


@pytest.mark.parametrize('backend', ['reference', 'chunked', 'kernel_rows'])
def test_patchwise_acmix(backend):
    layer = PatchwiseACmix(32, 2, 8, 3).eval()
    with use_backend(backend):
        counts = count(layer, lambda: layer(torch.zeros(2, 32, 4, 5)))
    assert numbers(counts) == {
        PROJECTIONS: 40 * 32 * (2 + 2 + 8),
        ATTENTION: 40 * (2 * 10 * 1 + 1 * 9 + 9 * 8),
        CONVOLUTION: 40 * ((2 + 2 + 8) * 9 + 8 * 81),
        REST: 0,
    }


@pytest.mark.parametrize('backend', ['reference', 'sdpa'])
def test_global_attention(backend):
    """Two images of 5×7: each of 3×4 strided queries attends to all 35 positions."""
    layer = PatternACmixConv2d(6, 8, stride=2, num_heads=2, mix='attn')
    with use_backend(backend):
        counts = count(layer, lambda: layer(torch.zeros(2, 6, 5, 7)))
    assert numbers(counts) == {
        PROJECTIONS: 2 * 35 * 3 * 6 * 8,
        ATTENTION: 2 * 2 * 12 * 35 * 8 + 35 * 2 * 4,
        CONVOLUTION: 0,
        REST: 0,
    }
    assert counts[ATTENTION].parameters == 3 * 4


@pytest.mark.parametrize('backend', ['reference', 'sdpa'])
def test_random_attention(backend):
    """On 8×6, each query attends to two of four blocks; those at the right are half as wide."""
    pattern = random_pattern(block_size=4, random_blocks=2)
    layer = PatternACmix(12, 3, pattern)
    # Of blocks of 4×4: the left ones have 16 positions, the right ones 8.
    keys = [sum((16, 8)[block % 2] for block in drawn) for drawn in pattern.blocks.blocks(2, 2)]
    pairs = 16 * keys[0] + 8 * keys[1] + 16 * keys[2] + 8 * keys[3]
    with use_backend(backend):
        counts = count(layer, lambda: layer(torch.zeros(2, 8, 6, 12)))
    assert numbers(counts) == {
        PROJECTIONS: 2 * 48 * 4 * 12 * 12,
        ATTENTION: 2 * 2 * pairs * 12 + 48 * 2 * 4,
        CONVOLUTION: 2 * 48 * (3 * 12 * 9 + 12 * 81),
        REST: 0,
    }
    assert counts[ATTENTION].parameters == 2 * 4


@pytest.mark.parametrize('backend', ['reference', 'sdpa'])
def test_bigbird_attention(backend):
    """On 8×8 in blocks of 2, of which none are drawn, with one global position in the centre."""
    layer = PatternACmix(12, 3, bigbird_pattern(2, 0, 1), mix='attn')
    # The windows of corners, edges and inner blocks have 4, 6 and 9 blocks of 4 positions.
    window_pairs = 4 * 4 * (4 * 4 + 8 * 6 + 4 * 9)
    # It is in the window of the 9 blocks around it, and sees 64 positions instead of 36.
    token_pairs = 64 - 9 * 4 + 64 - 36
    with use_backend(backend):
        counts = count(layer, lambda: layer(torch.zeros(1, 8, 8, 12)))
    assert counts[ATTENTION].multiply_adds == 2 * (window_pairs + token_pairs) * 12 + 64 * 2 * 4


@pytest.mark.parametrize(('layer', 'x'), [
    (WindowACmix(12, 3, 4, 2), torch.empty(2, 8, 12, 12)),
    (WindowACmix(12, 3, 7, 3), torch.empty(1, 5, 3, 12)),
    (ReducedACmix(12, 3, 1), torch.empty(2, 6, 5, 12)),
], ids=['windows', 'one window', 'reduced'])
def test_formula_equals_direct_computation(layer, x):
    """Against torch's count of attention by matrix products and of convolution in two steps."""
    layer, x = layer.to('meta'), x.to('meta')
    with use_backend('two_step'), FlopCounterMode(display=False) as counter:
        layer(x)
    # Convolving the bias of the fc does not depend on the map size and is not counted.
    with FlopCounterMode(display=False) as bias_counter:
        convolved_bias(layer.fc.bias, layer.dep_conv.weight, x.shape[1:3], dilation=1)
    counted = counter.get_total_flops() - bias_counter.get_total_flops()
    assert total(count(layer, lambda: layer(x))).multiply_adds * 2 == counted


@pytest.mark.parametrize('mix', ['attn', 'conv'])
@pytest.mark.parametrize(('kind', 'arguments', 'shape'), [
    (ACmixConv2d, (6, 8), (1, 6, 4, 5)), (WindowACmix, (12, 3, 4), (1, 4, 8, 12)),
    (ReducedACmix, (12, 3, 2), (1, 4, 6, 12)), (PatchwiseACmix, (32, 2, 8, 3), (1, 32, 4, 5)),
    (PatternACmix, (12, 3, GlobalPattern()), (1, 4, 6, 12)),
], ids=lambda value: getattr(value, '__name__', ''))
def test_single_path(mix, kind, arguments, shape):
    counts = {}
    for each in ('acmix', mix):
        layer = kind(*arguments, mix=each).eval()
        counts[each] = count(layer, functools.partial(layer, torch.zeros(shape)))
    kept, dropped = {'attn': (ATTENTION, CONVOLUTION), 'conv': (CONVOLUTION, ATTENTION)}[mix]
    assert counts[mix][dropped] == (0, 0)
    assert counts[mix][kept] == counts['acmix'][kept]


def test_layer_called_twice():
    layer = ACmixConv2d(6, 8)
    x = torch.zeros(1, 6, 4, 5)
    once = count(layer, lambda: layer(x))
    twice = count(layer, lambda: (layer(x), layer(x)))
    for name in OPERATOR_CLASSES:
        assert twice[name].multiply_adds == 2 * once[name].multiply_adds
        assert twice[name].parameters == once[name].parameters
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
