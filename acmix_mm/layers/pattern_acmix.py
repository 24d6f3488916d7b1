"""ACmix, or its attention path alone, with attention over a pattern of the whole map."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Optional

from torch import Tensor, nn

from acmix_mm.layers.acmix_conv import ACmixConv2d
from acmix_mm.layers.attention_pattern import PATTERN_TYPES, AttentionPattern, GlobalPattern
from acmix_mm.layers.base import (
    ATTENTION,
    CONVOLUTION,
    PROJECTIONS,
    TwoPathLayer,
    scaled_linear,
    split_heads,
)
from acmix_mm.layers.padded_conv import PaddedConvolution, Size, layer_or_plain
from acmix_mm.layers.point_attention import PointAttention
from acmix_mm.layers.shift_path import FullyConnected, Shifts
from acmix_mm.ops import position_encoding, project


class PatternACmixConv2d(ACmixConv2d):
    """:class:`ACmixConv2d` whose attention reads a pattern of the whole map, not a neighbourhood.

    Everything else, the position encoding included, is that of :class:`ACmixConv2d`, with the same
    parameters. The stride skips queries; the dilation applies to the convolution path only.

    Args:
        in_channels: see :class:`ACmixConv2d`, as for all other arguments but ``pattern``.
        out_channels: channels of the output.
        kernel_size: side of the convolution path's kernel.
        stride: stride, the same along both axes.
        padding: None or ``dilation · (kernel_size // 2)``.
        dilation: distance between the taps of the kernel.
        groups: must be 1.
        bias: whether the three projections have a bias.
        num_heads: number of attention heads.
        mix: both paths, or one of them.
        combine: how both paths are added.
        shift: how the convolution path shifts.
        shift_groups: number of groups of shift kernels.
        pattern: the positions that attention reads.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size = 3,
                 stride: Size = 1, padding: Optional[Size] = None, dilation: Size = 1,
                 groups: int = 1, bias: bool = True, num_heads: int = 4, mix: str = 'acmix',
                 combine: str = 'rates', shift: str = 'learned',
                 shift_groups: Optional[int] = None,
                 pattern: AttentionPattern = GlobalPattern()) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                         bias, num_heads, mix=mix, combine=combine, shift=shift,
                         shift_groups=shift_groups)
        pattern.check(self.stride[0])
        self.pattern = pattern

    def attend_positions(self, qkv: Tensor, positions: Tensor) -> Tensor:
        return self.pattern.attend(qkv, positions, stride=self.stride[0])

    def num_pairs(self, x: Tensor, out: Tensor) -> int:
        return len(x) * self.pattern.num_pairs(self.map_size(x), self.stride[0])

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        heads = (self.num_heads, -1)
        q = self.conv1(x)[0, :, row, column].unflatten(0, heads)
        k = self.conv2(x)[0].permute(1, 2, 0).unflatten(2, heads)
        positions = self.position_encoding(self.map_size(x), x)
        return self.pattern.point(q, k, positions, self.stride[0], q.shape[1]**-0.5, row, column)

    def extra_repr(self) -> str:
        return (f'{PaddedConvolution.extra_repr(self)}, num_heads={self.num_heads}, '
                f'mix={self.mix!r}, pattern={self.pattern}')


def pattern_or_pointwise(type_name: str, in_channels: int, out_channels: int, kernel_size: Size,
                         *args: Any, **kwargs: Any) -> nn.Module:
    """Build :class:`PatternACmixConv2d`, or ``nn.Conv2d`` if the kernel is 1×1 or there are groups.

    Args:
        type_name: a key of ``PATTERN_TYPES``.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the kernel.
        args: further positional arguments of ``nn.Conv2d``.
        kwargs: further arguments of ``nn.Conv2d``, of the layer and of its pattern.
    """
    pattern, kwargs = PATTERN_TYPES[type_name].split(kwargs)
    return layer_or_plain(partial(PatternACmixConv2d, pattern=pattern), in_channels, out_channels,
                          kernel_size, *args, **kwargs)


class PatternACmix(TwoPathLayer):
    """:class:`WindowACmix` whose attention reads a pattern of the whole map, not a window.

    Nothing is shifted, so the convolution path never wraps around the map.

    **Position term.** Attention in windows adds a learned bias for each offset within a window.
    Offsets beyond it have none, and a bias for all offsets of a map would depend on its size, with
    memory that grows with its square. The position term here is that of :class:`ACmixConv2d`
    instead, softmax_j(scale · q_i · (k_j + p_i − p_j)) with p linear in the coordinates, which
    keeps memory linear. So between :class:`WindowACmix` and this layer, the pattern and the
    position term differ; between ``ACmixConv2d`` and :class:`PatternACmixConv2d`, only the pattern.

    Maps (batch, height, width, embed_dims) of any size to the same shape and dtype.

    Parameters are those of :class:`WindowACmix` with ``conv_p``, the position encoding without a
    bias, which would cancel, in place of ``relative_position_bias_table``.

    Args:
        embed_dims: channels of the map.
        num_heads: number of attention heads; divides ``embed_dims``.
        pattern: the positions that attention reads.
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
        'qkv': PROJECTIONS, 'proj': PROJECTIONS, 'conv_p': ATTENTION}

    def __init__(self, embed_dims: int, num_heads: int, pattern: AttentionPattern,
                 qkv_bias: bool = True, qk_scale: Optional[float] = None,
                 attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 mix: str = 'acmix', combine: str = 'rates',
                 shift: str = 'learned', shift_groups: Optional[int] = None) -> None:
        super().__init__(mix, combine)
        pattern.check(1)
        self.pattern = pattern
        self.num_heads = num_heads
        self.head_dims = split_heads('embed_dims', embed_dims, num_heads)
        self.scale = qk_scale or self.head_dims**-0.5
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=qkv_bias)
        if self.attends:
            self.conv_p = nn.Linear(2, self.head_dims, bias=False)
            self.attn_drop = nn.Dropout(attn_drop_rate)
            self.proj = nn.Linear(embed_dims, embed_dims)
        if self.convolves:
            self.fc = FullyConnected(3 * num_heads, kernel_size=3, bias=True)
            self.dep_conv = Shifts(self.head_dims, num_heads, 3, shift, shift_groups)
        self.add_rates()
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def reset_parameters(self) -> None:
        """Reset convolution path and rates."""
        self.reset_convolution()

    def project(self, x: Tensor) -> tuple[Tensor]:
        """Return queries, keys and values, (batch, height, width, 3, num_heads, head_dims)."""
        return project(x, self.qkv.weight, self.qkv.bias, self.num_heads,
                       for_convolution=self.convolves),

    def attend(self, qkv: Tensor) -> Tensor:
        out = self.pattern.attend(qkv, self.position_encoding(qkv.shape[1:3], qkv),
                                  scale=self.scale,
                                  dropout_p=self.attn_drop.p if self.training else 0.0)
        return scaled_linear(self.attention_rate, out, self.proj)

    def convolve(self, qkv: Tensor) -> Tensor:
        maps = qkv.flatten(3, 4).permute(0, 3, 4, 1, 2)
        return self.shift_and_sum(maps).permute(0, 2, 3, 1)

    def convolve_input(self, x: Tensor) -> Optional[Tensor]:
        if not self.composition(x, x.shape[3]):
            return None
        out = self.project_shift_and_sum(x.permute(0, 3, 1, 2), self.qkv.weight, self.qkv.bias)
        return out.permute(0, 2, 3, 1)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return self.proj_drop(out)

    def position_encoding(self, size: Sequence[int], like: Tensor) -> Tensor:
        """The encoding of each position of a map, (height, width, head_dims), at least float32."""
        weight = self.conv_p.weight
        return position_encoding(weight, weight.new_zeros(len(weight)), size[0], size[1],
                                 like.dtype)

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        batch, height, width, channels = x.shape
        positions = batch * height * width
        counts = {PROJECTIONS: 3 * positions * channels**2}
        if self.attends:
            counts[PROJECTIONS] += positions * channels**2
            pairs = batch * self.pattern.num_pairs((height, width), 1)
            counts[ATTENTION] = 2 * pairs * channels + 2 * self.head_dims * height * width
        if self.convolves:
            counts[CONVOLUTION] = self.shift_multiply_adds(3 * positions * channels, positions)
        return counts

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        q, k, _ = self.qkv(x)[0].unflatten(2, (3, self.num_heads, self.head_dims)).unbind(2)
        positions = self.position_encoding(self.map_size(x), x)
        return self.pattern.point(q[row, column], k, positions, 1, self.scale, row, column)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, pattern={self.pattern}, mix={self.mix!r}'
