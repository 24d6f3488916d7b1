"""ACmix in a Swin host: windowed attention and the convolution path on the same q, k, v."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import FullyConnected, Shifts, TwoPaths, scaled
from acmix_mm.ops import project, window_attention
from acmix_mm.ops.backend import is_exporting
from acmix_mm.ops.symbolic import statically_known_true


class WindowACmix(TwoPaths):
    """Mix attention in (shifted) windows with a 3×3 convolution over the same projections.

    Paper: arXiv 2111.14556, section 4.1; out = rate1 · proj(attention) + rate2 · convolution.
    Both paths read the cyclically shifted map, so that in a shifted block the convolution wraps
    around the map's edges, as in the authors' code. The attention path pads the map at its
    bottom and right to whole windows, as MMDetection's Swin does; the convolution path never
    sees that padding: at any size its border is zero, as it was in pre-training.
    Where the map is no larger than one window, the window shrinks to it and nothing is shifted.

    Parameters have the authors' names: ``qkv``, ``proj``, ``relative_position_bias_table``,
    ``fc``, ``dep_conv``, ``rate1``, ``rate2``.

    Args:
        embed_dims: channels of the map.
        num_heads: attention heads; divides ``embed_dims``.
        window_size: side of a window, in pixels of the map.
        shift_size: cyclic shift, in pixels; less than ``window_size``.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: factor of the logits; ``head_dims ** -0.5`` if None.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
        mix: ``'acmix'`` for both paths; ``'attn'`` or ``'conv'`` builds that path alone, and no
            rates.
        combine: how the paths are added; see :class:`acmix_mm.layers.base.TwoPaths`.
        shift: how the convolution path shifts; see :class:`acmix_mm.layers.base.Shifts`.
        shift_groups: groups of its kernels: one for every head (None), or 1.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, embed_dims: int, num_heads: int, window_size: int, shift_size: int = 0,
                 qkv_bias: bool = True, qk_scale: Optional[float] = None,
                 attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 mix: str = 'acmix', combine: str = 'rates',
                 shift: str = 'learned', shift_groups: Optional[int] = None) -> None:
        super().__init__()
        self.set_paths(mix, combine)
        if embed_dims % num_heads:
            raise ValueError(f'num_heads must divide embed_dims, got {num_heads} heads for '
                             f'{embed_dims} channels.')
        if not 0 <= shift_size < window_size:
            raise ValueError(f'shift_size must lie in [0, window_size), got {shift_size} for a '
                             f'window of {window_size}.')
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.window_size = window_size
        self.shift_size = shift_size
        self.scale = qk_scale or self.head_dims**-0.5

        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        if mix != 'conv':
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * window_size - 1)**2, num_heads))
            self.register_buffer('relative_position_index', relative_position_index(window_size))
            self.attn_drop = nn.Dropout(attn_drop_rate)
            self.proj = nn.Linear(embed_dims, embed_dims)
        if mix != 'attn':
            self.fc = FullyConnected(3 * num_heads, kernel_size=3, bias=True)
            self.dep_conv = Shifts(self.head_dims, num_heads, 3, shift, shift_groups)
        self.add_rates()
        self.proj_drop = nn.Dropout(proj_drop_rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position table as Swin does; put the convolution path at its start."""
        if self.mix != 'conv':
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        if self.mix != 'attn':
            self.fc.reset_parameters()
            self.dep_conv.reset_parameters()
        self.reset_rates()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, height, width, embed_dims) to the same shape and dtype, at any size."""
        size = x.shape[1:3]
        if size[0] <= self.window_size and size[1] <= self.window_size:
            window_size, shift_size = tuple(size), 0
        else:
            window_size, shift_size = (self.window_size, self.window_size), self.shift_size

        x = pad_to_windows(x, window_size)
        if shift_size:
            x = roll(x, -shift_size)
        qkv = project(x, self.qkv.weight, self.qkv.bias, self.num_heads,
                      for_convolution=self.mix != 'attn')

        if self.mix != 'conv':
            attention = self.attend(qkv, window_size, shift_size)
            out = attention = drop_padding(attention, size, shift_size)
        if self.mix != 'attn':
            out = convolution = self.convolve(drop_padding(qkv, size, shift_size))
        if self.mix == 'acmix':
            out = attention + convolution

        if shift_size:
            out = roll(out, shift_size)
        return self.proj_drop(out)

    def attend(self, qkv: Tensor, window_size: tuple[int, int], shift_size: int) -> Tensor:
        """The attention path, times its rate: (batch, height, width, 3, num_heads, head_dims) to
        channels.
        """
        out = window_attention(qkv, self.position_bias(window_size), window_size,
                               shift_size=shift_size, scale=self.scale,
                               dropout_p=self.attn_drop.p if self.training else 0.0)
        # The rate scales the small weight in place of the map.
        rate = self.attention_rate
        return F.linear(out, scaled(rate, self.proj.weight), scaled(rate, self.proj.bias))

    def convolve(self, qkv: Tensor) -> Tensor:
        """The convolution path, times its rate: (batch, height, width, 3, num_heads, head_dims) to
        channels.
        """
        return self.shift_and_sum(qkv.flatten(3, 4).permute(0, 3, 4, 1, 2)).permute(0, 2, 3, 1)

    def position_bias(self, window_size: tuple[int, int]) -> Tensor:
        """Bias between the positions of a window, (num_heads, area, area)."""
        height, width = window_size
        index = self.relative_position_index.unflatten(0, (self.window_size, -1)).unflatten(
            2, (self.window_size, -1))[:height, :width, :height, :width]
        area = height * width
        bias = self.relative_position_bias_table[index.reshape(-1)]
        return bias.view(area, area, self.num_heads).permute(2, 0, 1)


def relative_position_index(window_size: int) -> Tensor:
    """Row of the position table for each pair of positions of a window, (area, area), int64.

    Row-major over the offset from key to query, both axes from -(window_size - 1) up.
    """
    rows, columns = torch.meshgrid(torch.arange(window_size), torch.arange(window_size),
                                   indexing='ij')
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows + window_size - 1
    across = columns[:, None] - columns + window_size - 1
    return down * (2 * window_size - 1) + across


def pad_to_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Pad (batch, height, width, channels) with zeros at its bottom and right to whole windows."""
    bottom, right = ((extent + side - 1) // side * side - extent
                     for extent, side in zip(x.shape[1:3], window_size))
    if statically_known_true(bottom == 0) and statically_known_true(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def roll(x: Tensor, shift: int) -> Tensor:
    """Roll (batch, height, width, …) along both axes, by less than their extents."""
    if not is_exporting():
        return x.roll((shift, shift), (1, 2))
    for axis in (1, 2):
        first = -shift if shift < 0 else x.shape[axis] - shift
        x = joined(x, axis, (first, x.shape[axis] - first), (0, first))
    return x


def drop_padding(x: Tensor, size: tuple[int, int], shift_size: int) -> Tensor:
    """Undo bottom and right padding on a map that was rolled by ``-shift_size`` afterwards.

    Args:
        x: (batch, padded height, padded width, …).
        size: (height, width) before padding.
        shift_size: what the padded map was rolled by.

    Returns:
        (batch, height, width, …): the map as if it had been rolled without padding.
    """
    # torch.cat lays its result out in the order of the axes: that of memory is to stay. Strides of
    # open sizes do not compare.
    axes = list(range(x.dim()))
    order = axes if is_exporting() else sorted(axes, key=x.stride, reverse=True)
    x = x.permute(order)
    for axis, extent in zip((order.index(1), order.index(2)), size):
        padded = x.shape[axis]
        if statically_known_true(padded == extent):
            continue
        shift = shift_size if shift_size < extent else shift_size % extent
        pieces = [((shift - shift_size) % padded, extent - shift)]
        if shift:
            pieces.append((padded - shift_size, shift))
        x = joined(x, axis, *pieces)
    return x.permute([order.index(axis) for axis in range(x.dim())])


def joined(x: Tensor, axis: int, *pieces: tuple[int, int]) -> Tensor:
    """Pieces of an axis, each as its (first position, length), one behind the other."""
    if is_exporting():
        # What torch asks of a view's strides would tie an export to the sizes of its example.
        return x.index_select(axis, torch.cat([
            torch.arange(first, first + length, device=x.device) for first, length in pieces]))
    stretches = [x.narrow(axis, *piece) for piece in pieces]
    return torch.cat(stretches, axis) if len(stretches) > 1 else stretches[0]
