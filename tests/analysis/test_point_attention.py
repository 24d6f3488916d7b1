"""Attention weights of a single point reproduce the layer's output there."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from helpers.analysis import CASES
from helpers.weights import randomised

from acmix_mm.layers import (
    ACmixConv2d,
    PatchwiseACmix,
    PatternACmix,
    PatternACmixConv2d,
    ReducedACmix,
    WindowACmix,
)


def attended(layer, x, attention):
    """Apply the attention weights of one point to the values, and project as the layer does."""
    weights = attention.weights
    if isinstance(layer, WindowACmix):
        bottom, right = (size - own for size, own in zip(weights.shape[1:], x.shape[1:3]))
        v = layer.qkv(F.pad(x, (0, 0, 0, right, 0, bottom)))[0].chunk(3, 2)[2].permute(2, 0, 1)
    elif isinstance(layer, PatternACmix):
        v = layer.qkv(x)[0].chunk(3, 2)[2].permute(2, 0, 1)
    elif isinstance(layer, ReducedACmix):
        weight, bias = layer.attn.in_proj_weight, layer.attn.in_proj_bias
        v = F.linear(layer.reduce(x)[0], weight.chunk(3)[2], bias.chunk(3)[2]).permute(2, 0, 1)
    else:
        v = layer.conv3(x)[0]
    if isinstance(layer, PatchwiseACmix):
        groups = torch.arange(len(v)) % len(weights)
    else:
        groups = torch.arange(len(v)) // (len(v) // len(weights))
    out = (weights[groups] * v).sum((1, 2))
    if isinstance(layer, (WindowACmix, PatternACmix)):
        return layer.proj(out)
    return layer.attn.out_proj(out) if isinstance(layer, ReducedACmix) else out


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_attention_of_a_point_gives_the_output_of_the_layer(case):
    layer, shape = CASES[case]
    randomised(layer, 0.5)
    layer.rate1.fill_(1)
    layer.rate2.fill_(0)
    x = torch.randn(shape)
    out = layer(x)
    channels_last = layer.channels_last
    size = layer.map_size(x)
    step = getattr(layer, 'stride', (1, 1))[0]
    for row, column in itertools.product(range(0, size[0], step), range(0, size[1], step)):
        attention = layer.attention_of_point(x, row, column)
        place = (row // step, column // step)
        expected = (out if channels_last else out.permute(0, 2, 3, 1))[0][place]
        assert relative_error(attended(layer, x, attention), expected) < 1e-4, (row, column)

        weights = attention.weights
        if attention.is_softmax:
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum((1, 2)), torch.ones(len(weights)))
        seen_rows, seen_columns = np.nonzero(weights.abs().sum(0).numpy() > 1e-20)
        assert attention.num_positions >= len(seen_rows)
        if isinstance(layer, (WindowACmix, ReducedACmix, PatternACmix, PatternACmixConv2d)):
            assert attention.num_positions == len(seen_rows)
        if isinstance(layer, WindowACmix) and case != 'one window':
            # The windows of a shifted map are offset by the shift.
            for seen, own in ((seen_rows, row), (seen_columns, column)):
                assert set((seen + layer.shift_size) // 4) == {(own + layer.shift_size) // 4}
        if type(layer) in (ACmixConv2d, PatchwiseACmix):
            side = layer.attn_kernel_size if isinstance(layer, ACmixConv2d) else layer.kernel_size
            reach = side // 2 * getattr(layer, 'dilation', (1, 1))[0]
            assert abs(seen_rows - row).max() <= reach
            assert abs(seen_columns - column).max() <= reach


def test_layer_without_attention_is_rejected():
    with pytest.raises(ValueError, match="mix='conv' does not attend"):
        ReducedACmix(8, 2, mix='conv').attention_of_point(torch.randn(1, 4, 4, 8), 0, 0)
