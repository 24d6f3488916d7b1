"""ACmix in a Swin host: windowed attention and convolution on the same projections."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import (
    ATTENTION,
    CONVOLUTION,
    PROJECTIONS,
    TwoPathLayer,
    autocast_dtype,
    check_positive,
    scaled_linear,
    split_heads,
)
from acmix_mm.layers.point_attention import PointAttention, scatter, softmax
from acmix_mm.layers.shift_path import FullyConnected, Shifts
from acmix_mm.ops import (
    add_paths,
    convolve_composed,
    position_bias,
    project,
    projected_window_attention,
    roll_map,
)
from acmix_mm.ops.window_attention import (
    MASKED_LOGIT,
    pads_in_place,
    rolls_in_place,
    window_attention_and_map,
)
from acmix_mm.ops.window_attention.padding import drop_padding, pad_to_windows, padding_values, roll


class WindowACmix(TwoPathLayer):
    """Attention in (shifted) windows and a 3×3 convolution on the same projections.

    Paper: arXiv 2111.14556, section 4.1; out = rate1 · proj(attention) + rate2 · convolution.
    Both paths read the cyclically shifted map, so in a shifted block the convolution wraps around
    the edges of the map, as in the authors' code. The attention path pads the map at the bottom
    and right to whole windows, as MMDetection's Swin does. The convolution path does not read this
    padding: its own border is zero at every map size, as in pre-training. If the map is no larger
    than one window, the window shrinks to the map and nothing is shifted.

    Maps (batch, height, width, embed_dims) of any size to the same shape and dtype.

    Parameters are named as in the authors' code: ``qkv``, ``proj``,
    ``relative_position_bias_table``, ``fc``, ``dep_conv``, ``rate1``, ``rate2``.

    Args:
        embed_dims: channels of the map.
        num_heads: number of attention heads; divides ``embed_dims``.
        window_size: side of a window.
        shift_size: cyclic shift; less than ``window_size``.
        qkv_bias: whether q, k and v have a bias.
        qk_scale: scale of the logits; ``head_dims ** -0.5`` by default.
        attn_drop_rate: dropout rate of the attention weights.
        proj_drop_rate: dropout rate of the output.
        mix: see :class:`acmix_mm.layers.base.TwoPathLayer`.
        combine: see the same class.
        shift: see :class:`acmix_mm.layers.shift_path.Shifts`.
        shift_groups: see the same class.

    Raises:
        ValueError: an argument is invalid.
    """

    channels_last = True
    parameter_classes: ClassVar[dict[str, str]] = {
        **TwoPathLayer.parameter_classes,
        'qkv': PROJECTIONS, 'proj': PROJECTIONS, 'relative_position_bias_table': ATTENTION}

    relative_position_index: Tensor

    def __init__(self, embed_dims: int, num_heads: int, window_size: int, shift_size: int = 0,
                 qkv_bias: bool = True, qk_scale: Optional[float] = None,
                 attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 mix: str = 'acmix', combine: str = 'rates',
                 shift: str = 'learned', shift_groups: Optional[int] = None) -> None:
        super().__init__(mix, combine)
        check_positive('window_size', window_size)
        if not 0 <= shift_size < window_size:
            raise ValueError(f'shift_size must lie in [0, window_size), got {shift_size} for a '
                             f'window of {window_size}.')
        self.num_heads = num_heads
        self.head_dims = split_heads('embed_dims', embed_dims, num_heads)
        self.window_size = window_size
        self.shift_size = shift_size
        self.scale = qk_scale or self.head_dims**-0.5

        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        if self.attends:
            self.relative_position_bias_table = nn.Parameter(
                torch.empty((2 * window_size - 1)**2, num_heads))
            self.register_buffer('relative_position_index', relative_position_index(window_size))
            self.attn_drop = nn.Dropout(attn_drop_rate)
            self.proj = nn.Linear(embed_dims, embed_dims)
        if self.convolves:
            self.fc = FullyConnected(3 * num_heads, kernel_size=3, bias=True)
            self.dep_conv = Shifts(self.head_dims, num_heads, 3, shift, shift_groups)
        self.add_rates()
        self.proj_drop = nn.Dropout(proj_drop_rate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the position table as Swin does, and reset convolution path and rates."""
        if self.attends:
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.reset_convolution()

    def forward(self, x: Tensor) -> Tensor:
        composition = self.composition(x, x.shape[3])
        if self.attends and composition and not self.rolls_input(x):
            return self.forward_composed(x, composition)
        return super().forward(x)

    def forward_composed(self, x: Tensor, composition: str) -> Tensor:
        """Compute both paths from composed weights and one rolled map, for GPUs."""
        size = x.shape[1:3]
        window_size, shift_size = self.window_and_shift(size)
        maps = roll_map(x, -shift_size, autocast_dtype(x))
        weights = self.compose(composition, self.qkv.weight, self.qkv.bias, maps.dtype,
                               self.proj.bias)
        attention, maps = projected_window_attention(
            maps, weights.weight, weights.bias, self.position_bias(window_size), window_size,
            shift_size=shift_size, scale=self.scale)
        out = add_paths(convolve_composed(maps, weights), F.linear(attention, self.proj.weight),
                        weights.taps, size, shift_size=shift_size)
        return self.proj_drop(out)

    def project(self, x: Tensor) -> tuple['Projections']:
        size = x.shape[1:3]
        window_size, shift_size = self.window_and_shift(size)
        is_padded, is_rolled = self.pads_input(x), self.rolls_input(x)
        if is_padded:
            x = pad_to_windows(x, window_size)
        if is_rolled:
            x = roll(x, -shift_size)
        qkv = project(x, self.qkv.weight, self.qkv.bias, self.num_heads,
                      for_convolution=self.convolves)
        return Projections(qkv, size, is_padded, is_rolled),

    def attend(self, projected: 'Projections') -> Tensor:
        window_size, shift_size = self.window_and_shift(projected.size)
        out, projected.qkv = window_attention_and_map(
            projected.qkv, self.position_bias(window_size), window_size, shift_size=shift_size,
            padding=None if projected.is_padded else padding_values(projected.qkv, self.qkv.bias),
            is_rolled=projected.is_rolled, scale=self.scale, dropout_p=self.attention_dropout)
        out = scaled_linear(self.attention_rate, out, self.proj)
        return drop_padding(out, projected.size, shift_size) if projected.is_padded else out

    def convolve(self, projected: 'Projections') -> Tensor:
        qkv = projected.qkv
        _, shift_size = self.window_and_shift(projected.size)
        if projected.is_padded:
            qkv = drop_padding(qkv, projected.size, shift_size)
        elif not projected.is_rolled:
            qkv = roll(qkv, -shift_size)
        out = self.shift_and_sum(qkv.flatten(3, 4).permute(0, 3, 4, 1, 2)).permute(0, 2, 3, 1)
        return out if projected.is_rolled else roll(out, shift_size)

    def convolve_input(self, x: Tensor) -> Optional[Tensor]:
        if not self.composition(x, x.shape[3]):
            return None
        _, shift_size = self.window_and_shift(x.shape[1:3])
        maps = roll(x, -shift_size)
        out = self.project_shift_and_sum(maps.permute(0, 3, 1, 2), self.qkv.weight, self.qkv.bias)
        out = out.permute(0, 2, 3, 1)
        return out if self.rolls_input(x) else roll(out, shift_size)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        _, shift_size = self.window_and_shift(x.shape[1:3])
        if self.rolls_input(x):
            out = roll(out, shift_size)
        return self.proj_drop(out)

    def pads_input(self, x: Tensor) -> bool:
        """Whether the map is padded before it is projected. If not, attention pads in place."""
        window_size, _ = self.window_and_shift(x.shape[1:3])
        return self.attends and not pads_in_place(x, window_size, self.head_dims,
                                                  self.attention_dropout)

    def rolls_input(self, x: Tensor) -> bool:
        """Whether both paths read the rolled map, and their sum is rolled back.

        If not, attention rolls in place, and the convolution path rolls a map of its own.
        """
        window_size, _ = self.window_and_shift(x.shape[1:3])
        return not self.attends or not rolls_in_place(x, window_size, self.head_dims,
                                                      self.attention_dropout)

    @property
    def attention_dropout(self) -> float:
        """The dropout rate of the attention weights that applies now."""
        return self.attn_drop.p if self.training else 0.0

    def window_and_shift(self, size: Sequence[int]) -> tuple[tuple[int, int], int]:
        """The window's (height, width) and the cyclic shift on a map of ``size``."""
        if size[0] <= self.window_size and size[1] <= self.window_size:
            return (size[0], size[1]), 0
        return (self.window_size, self.window_size), self.shift_size

    def position_bias(self, window_size: tuple[int, int]) -> Tensor:
        """The bias between all positions of a window, (num_heads, area, area)."""
        return position_bias(self.relative_position_bias_table, self.relative_position_index,
                             window_size)

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        """Each position of the padded map attends to those of its window."""
        batch, height, width, channels = x.shape
        (win_h, win_w), _ = self.window_and_shift((height, width))
        padded = batch * (-(-height // win_h) * win_h) * (-(-width // win_w) * win_w)
        counts = {PROJECTIONS: 3 * padded * channels**2}
        if self.attends:
            counts[PROJECTIONS] += padded * channels**2
            counts[ATTENTION] = 2 * padded * win_h * win_w * channels
        if self.convolves:
            positions = batch * height * width
            counts[CONVOLUTION] = self.shift_multiply_adds(3 * positions * channels, positions)
        return counts

    @property
    def min_dynamic_size(self) -> int:
        return self.window_size + 1

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        """softmax(q·k·scale + bias) over the window (arXiv 2103.14030, section 3.2).

        In a shifted block, a window at an edge wraps around the map, and pairs of positions from
        opposite edges are masked. Padded positions are keys like all others.
        """
        window, shift = self.window_and_shift(x.shape[1:3])
        padded = pad_to_windows(x, window)
        heads = (3, self.num_heads, self.head_dims)
        q, k, _ = self.qkv(padded)[0].unflatten(2, heads).unbind(2)

        axes, place, is_masked = [], [], []
        for position, extent, length in zip((row, column), padded.shape[1:3], window):
            rolled = (position - shift) % extent
            start = rolled // length * length
            within = torch.arange(start, start + length, device=x.device)
            axes.append((within + shift) % extent)
            place.append(rolled - start)
            is_masked.append((within >= extent - shift) != (rolled >= extent - shift))
        keys = k[axes[0]][:, axes[1]]
        logits = self.scale * torch.einsum('nd,rcnd->nrc', q[row, column], keys)
        bias = self.position_bias(window)[:, place[0] * window[1] + place[1]].unflatten(1, window)
        masked = is_masked[0][:, None] | is_masked[1]
        weights = softmax(logits + bias + MASKED_LOGIT * masked)
        weights = scatter(weights, axes[0], axes[1], padded.shape[1:3])
        return PointAttention(weights, 1, int((~masked).sum()), True)


@dataclass
class Projections:
    """What both paths read.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims). Attention
            replaces it by what the convolution path should read, so that both gradients are added
            in place.
        size: (height, width) of the input of the layer.
        is_padded: whether the map has been padded to whole windows.
        is_rolled: whether it has been rolled.
    """

    qkv: Tensor
    size: Sequence[int]
    is_padded: bool
    is_rolled: bool


def relative_position_index(window_size: int) -> Tensor:
    """Row of the position table for each pair of positions in a window, (area, area), int64.

    Rows are in row-major order over the offset from key to query, starting at -(window_size - 1)
    along both axes.
    """
    rows, columns = torch.meshgrid(torch.arange(window_size), torch.arange(window_size),
                                   indexing='ij')
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows + window_size - 1
    across = columns[:, None] - columns + window_size - 1
    return down * (2 * window_size - 1) + across
