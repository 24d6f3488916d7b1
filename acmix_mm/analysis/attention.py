"""What one position attends to in an ACmix layer, by the equations and for that position alone."""

from collections.abc import Sequence
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.layers.acmix_conv import coordinates
from acmix_mm.ops.reflection import reflected_range
from acmix_mm.ops.window_attention import MASKED_LOGIT


class PointAttention(NamedTuple):
    """The attention of one position of a layer's input.

    Attributes:
        weights: (heads, rows, columns), each value's weight in the attention path at that position;
            rows and columns are those of the map of values, and what lies outside of the
            neighbourhood is zero. A Swin's map is padded to whole windows, a PVT's is reduced. For
            a SAN "heads" are the groups of channels that share weights.
        cell: positions of the layer's input along one side of a position of the values.
        count: how many positions share the attention, those that a mirrored border shows twice
            counted twice, masked ones not at all.
        is_softmax: whether the weights of a head are positive and sum to one.
    """

    weights: Tensor
    cell: int
    count: int
    is_softmax: bool


@torch.no_grad()
def attention_of_point(layer: nn.Module, x: Tensor, query: tuple[int, int]) -> PointAttention:
    """Compute the attention weights of one position.

    Args:
        layer: an ACmix layer that attends, in evaluation mode.
        x: what it takes, for one picture: (1, height, width, channels) of the Swin's and PVT's
            layers, (1, channels, height, width) of the others.
        query: row and column of the position in ``x``. An ``ACmixConv2d`` with a stride computes no
            output at some of them.

    Raises:
        ValueError: the layer does not attend.
    """
    if not attends(layer):
        raise ValueError(f'{type(layer).__name__} with mix={getattr(layer, "mix", None)!r} does '
                         'not attend.')
    return EQUATIONS[type(layer)](layer, x, *query)


def attends(module: nn.Module) -> bool:
    """Whether a module is an ACmix layer with an attention path."""
    return type(module) in EQUATIONS and module.mix != 'conv'


def in_shifted_window(layer: WindowACmix, x: Tensor, row: int, column: int) -> PointAttention:
    """softmax(q·k·scale + bias) over the window (arXiv 2103.14030, section 3.2).

    In a shifted block a window at the edge reaches around it, and what the shift brought together
    is masked. Positions of the padding are keys like others.
    """
    size, window, shift = x.shape[1:3], (layer.window_size,) * 2, layer.shift_size
    if max(size) <= layer.window_size:
        window, shift = tuple(size), 0
    bottom, right = (-extent % side for extent, side in zip(size, window))
    padded = F.pad(x, (0, 0, 0, right, 0, bottom))
    heads = (3, layer.num_heads, layer.head_dims)
    q, k, _ = layer.qkv(padded)[0].unflatten(2, heads).unbind(2)

    axes, place, side = [], [], []
    for position, extent, length in zip((row, column), padded.shape[1:3], window):
        rolled = (position - shift) % extent
        start = rolled // length * length
        within = torch.arange(start, start + length, device=x.device)
        axes.append((within + shift) % extent)
        place.append(rolled - start)
        side.append((within >= extent - shift) != (rolled >= extent - shift))
    keys = k[axes[0]][:, axes[1]]
    logits = layer.scale * torch.einsum('nd,rcnd->nrc', q[row, column], keys)
    bias = layer.position_bias(window)[:, place[0] * window[1] + place[1]].unflatten(1, window)
    masked = side[0][:, None] | side[1]
    weights = scatter(softmax(logits + bias + MASKED_LOGIT * masked), *axes, padded.shape[1:3])
    return PointAttention(weights, 1, int((~masked).sum()), True)


def in_sliding_window(layer: ACmixConv2d, x: Tensor, row: int, column: int) -> PointAttention:
    """softmax_j(scale · q_i · (k_j + p_i − p_j)) over the k×k positions around i.

    The border is mirrored: a position there has the sum of the weights of all that show it.
    """
    _, _, height, width = x.shape
    heads = (layer.num_heads, -1)
    q = layer.conv1(x)[0, :, row, column].unflatten(0, heads)
    k = layer.conv2(x)[0].unflatten(0, heads)
    grid = coordinates(height, width, x.dtype, x.device)
    positions = F.linear(grid, layer.conv_p.weight.flatten(1), layer.conv_p.bias).permute(2, 0, 1)

    reach, step = layer.dilation[0] * (layer.attn_kernel_size // 2), layer.dilation[0]
    rows, columns = (reflected_range(centre - reach, centre + reach + 1, extent, x.device)[::step]
                     for centre, extent in ((row, height), (column, width)))
    relative = positions[:, row, column][:, None, None] - around(positions, rows, columns)
    logits = q.shape[1]**-0.5 * torch.einsum('nd,ndrc->nrc', q, around(k, rows, columns) + relative)
    weights = scatter(softmax(logits), rows, columns, (height, width))
    return PointAttention(weights, 1, layer.attn_kernel_size**2, True)


def in_reduced_map(layer: ReducedACmix, x: Tensor, row: int, column: int) -> PointAttention:
    """softmax(q·k·scale) over the whole reduced map (arXiv 2102.12122, section 3.3)."""
    channels = x.shape[3]
    weight, bias = layer.attn.in_proj_weight, layer.attn.in_proj_bias
    bias_q, bias_k, _ = (None,) * 3 if bias is None else bias.split(channels)
    heads = (layer.num_heads, layer.head_dims)
    q = F.linear(x[0, row, column], weight[:channels], bias_q).unflatten(0, heads)
    k = F.linear(layer.reduce(x)[0], weight[channels:2 * channels], bias_k).unflatten(2, heads)
    logits = layer.head_dims**-0.5 * torch.einsum('nd,rcnd->nrc', q, k)
    return PointAttention(softmax(logits), layer.sr_ratio, logits[0].numel(), True)


def by_patch(layer: PatchwiseACmix, x: Tensor, row: int, column: int) -> PointAttention:
    """What ``conv_w`` makes of the query and all keys around it (arXiv 2004.13621, section 3.2).

    There is no softmax: weights may be negative and have any sum. Channel c of the values takes
    those of group c mod groups.
    """
    size, reach = x.shape[2:], layer.kernel_size // 2
    rows, columns = (reflected_range(centre - reach, centre + reach + 1, extent, x.device)
                     for centre, extent in zip((row, column), size))
    keys = around(layer.conv2(x)[0], rows, columns)
    features = torch.cat([layer.conv1(x)[0, :, row, column], keys.flatten()])
    weights = layer.conv_w(features[None, :, None, None]).flatten()
    weights = weights.unflatten(0, (-1, layer.kernel_size, layer.kernel_size))
    return PointAttention(scatter(weights, rows, columns, size), 1, layer.kernel_size**2, False)


def around(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The positions at ``rows`` and ``columns`` of maps (…, height, width)."""
    return maps[..., rows, :][..., columns]


def softmax(logits: Tensor) -> Tensor:
    """Over both axes of (heads, rows, columns)."""
    return logits.flatten(1).softmax(1).view_as(logits)


def scatter(weights: Tensor, rows: Tensor, columns: Tensor, size: Sequence[int]) -> Tensor:
    """Put (heads, rows, columns) where they belong on a map of zeros; repeated places add up."""
    across = weights.new_zeros(*weights.shape[:2], size[1]).index_add_(2, columns, weights)
    return weights.new_zeros(len(weights), *size).index_add_(1, rows, across)


EQUATIONS: dict[type, Callable[..., PointAttention]] = {
    WindowACmix: in_shifted_window,
    ACmixConv2d: in_sliding_window,
    ReducedACmix: in_reduced_map,
    PatchwiseACmix: by_patch,
}
