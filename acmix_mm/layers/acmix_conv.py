"""ACmix as a replacement for a convolution: sliding-window attention and convolution."""

from collections.abc import Sequence
from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn

from acmix_mm.layers.base import (
    ATTENTION,
    CONVOLUTION,
    PROJECTIONS,
    TwoPathLayer,
    autocast_dtype,
    check_odd,
    split_heads,
)
from acmix_mm.layers.padded_conv import PaddedConvolution, Size, layer_or_plain
from acmix_mm.layers.point_attention import (
    PointAttention,
    gather,
    neighbours,
    scatter,
    softmax,
)
from acmix_mm.layers.shift_path import FullyConnected, Shifts
from acmix_mm.ops import (
    add_paths,
    convolve_composed,
    linear_and_map,
    position_encoding,
    project,
    sliding_window_attention,
)


class ACmixConv2d(PaddedConvolution, TwoPathLayer):
    """A drop-in replacement for a padded ``nn.Conv2d`` with an odd kernel.

    Paper: arXiv 2111.14556, section 4.1; out = rate1 · attention + rate2 · convolution. Queries,
    keys and values are 1×1 projections of the input, with a bias if ``bias`` is set. The attention
    path reads the attn_kernel_size² positions around each output position, with reflection padding;
    the convolution path reads kernel_size². Stride skips output positions, and dilation spreads the
    neighbourhoods of both paths. As in the authors' code, the attention path's channels are in
    the order (head, channel), the convolution path's in (channel, head), and both are added as they
    are.

    Maps (batch, in_channels, height, width), from 1×1 on, to (batch, out_channels, ⌈height /
    stride⌉, ⌈width / stride⌉), in the memory format of the input.

    Parameters are named as in the authors' code: ``conv1``, ``conv2``, ``conv3`` (q, k, v),
    ``conv_p`` (position encoding), ``fc``, ``dep_conv``, ``rate1``, ``rate2``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: side of the convolution path's kernel, odd. For 1, use
            :func:`acmix_or_pointwise`.
        stride: stride, the same along both axes.
        padding: None or ``dilation · (kernel_size // 2)``, which keeps the size at stride 1.
        dilation: distance between the taps of the kernel, and between attention's neighbours.
        groups: must be 1; :func:`acmix_or_pointwise` accepts others.
        bias: whether the three projections have a bias.
        num_heads: number of attention heads; divides ``out_channels``.
        attn_kernel_size: side of attention's neighbourhood, odd.
        mix: see :class:`acmix_mm.layers.base.TwoPathLayer`.
        combine: see the same class.
        shift: see :class:`acmix_mm.layers.shift_path.Shifts`.
        shift_groups: see the same class.

    Raises:
        ValueError: an argument is invalid.
    """

    parameter_classes: ClassVar[dict[str, str]] = {
        **TwoPathLayer.parameter_classes,
        'conv1': PROJECTIONS, 'conv2': PROJECTIONS, 'conv3': PROJECTIONS, 'conv_p': ATTENTION}

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size = 3,
                 stride: Size = 1, padding: Optional[Size] = None, dilation: Size = 1,
                 groups: int = 1, bias: bool = True, num_heads: int = 4,
                 attn_kernel_size: int = 7, mix: str = 'acmix', combine: str = 'rates',
                 shift: str = 'learned', shift_groups: Optional[int] = None) -> None:
        super().__init__(mix, combine)
        self.set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        head_dims = split_heads('out_channels', out_channels, num_heads)
        check_odd('attn_kernel_size', attn_kernel_size)

        self.num_heads = num_heads
        self.attn_kernel_size = attn_kernel_size
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        if self.attends:
            self.conv_p = nn.Conv2d(2, head_dims, 1)
        if self.convolves:
            self.fc = FullyConnected(3 * num_heads, self.kernel_size[0], bias=False)
            self.dep_conv = Shifts(head_dims, num_heads, self.kernel_size[0], shift, shift_groups)
        self.add_rates()

    def init_weights(self) -> None:
        """Keep the constructor's initialisation; without this, OpenMMLab applies its own."""

    def forward(self, x: Tensor) -> Tensor:
        composition = self.composition(x, self.in_channels, self.stride[0])
        if self.attends and composition:
            return self.forward_composed(x, composition)
        # On a GPU, projections and convolution would each copy the map into this order, and the
        # projections add their bias in a pass of its own.
        maps = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
        return self.finish(super().forward(maps), x)

    def forward_composed(self, x: Tensor, composition: str) -> Tensor:
        """Compute both paths from composed weights, for GPUs and exports."""
        stride, dilation = self.stride[0], self.dilation[0]
        maps = x.to(autocast_dtype(x), memory_format=torch.channels_last).permute(0, 2, 3, 1)
        weights = self.compose(composition, *self.projections(), maps.dtype)
        qkv, maps = linear_and_map(maps, weights.weight, weights.bias)
        out = add_paths(convolve_composed(maps, weights, stride, dilation),
                        self.attend(qkv.unflatten(3, (3, self.num_heads, -1))).permute(0, 2, 3, 1),
                        weights.taps, x.shape[2:], stride=stride, dilation=dilation,
                        channels_first=x.is_contiguous())
        return out.permute(0, 3, 1, 2)

    def project(self, x: Tensor) -> tuple[Tensor]:
        """Return queries, keys and values, (batch, height, width, 3, num_heads, head_dims)."""
        weight, bias = self.projections()
        return project(x.permute(0, 2, 3, 1), weight, bias, self.num_heads,
                       for_convolution=self.convolves),

    def projections(self) -> tuple[Tensor, Optional[Tensor]]:
        """Weight and bias of the three projections as one linear layer."""
        projections = (self.conv1, self.conv2, self.conv3)
        weight = torch.cat([conv.weight for conv in projections]).flatten(1)
        biases = [conv.bias for conv in projections if conv.bias is not None]
        return weight, torch.cat(biases) if biases else None

    def attend(self, qkv: Tensor) -> Tensor:
        """Compute the attention path. Its rate is applied in :meth:`combine_paths`."""
        out = self.attend_positions(qkv, self.position_encoding(qkv.shape[1:3], qkv))
        return out.permute(0, 3, 1, 2)

    def attend_positions(self, qkv: Tensor, positions: Tensor) -> Tensor:
        """Attend with a position encoding: (batch, out height, out width, out_channels)."""
        return sliding_window_attention(qkv, positions, self.attn_kernel_size,
                                        stride=self.stride[0], dilation=self.dilation[0])

    def convolve(self, qkv: Tensor) -> Tensor:
        maps = qkv.flatten(3, 4).permute(0, 3, 4, 1, 2)
        return self.shift_and_sum(maps, stride=self.stride[0], dilation=self.dilation[0])

    def convolve_input(self, x: Tensor) -> Optional[Tensor]:
        if not self.composition(x, self.in_channels, self.stride[0]):
            return None
        return self.project_shift_and_sum(x, *self.projections(), stride=self.stride[0],
                                          dilation=self.dilation[0])

    def combine_paths(self, attention: Tensor, convolution: Tensor) -> Tensor:
        # No projection follows attention whose weight the rate could scale.
        rate = self.attention_rate
        if rate is None:
            return convolution.add_(attention)
        return convolution.addcmul_(attention, rate.to(attention.dtype))

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        # As nn.Conv2d does: some consumers, such as mmcv's RoIAlign, do not check strides.
        return out.contiguous() if x.is_contiguous() else out

    def position_encoding(self, size: Sequence[int], like: Tensor) -> Tensor:
        """The encoding of each position of a map, (height, width, head_dims), at least float32."""
        assert self.conv_p.bias is not None
        return position_encoding(self.conv_p.weight.flatten(1), self.conv_p.bias, size[0], size[1],
                                 like.dtype)

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        positions, outputs = x[:, 0].numel(), out[:, 0].numel()
        channels = self.out_channels
        counts = {PROJECTIONS: 3 * positions * self.in_channels * channels}
        if self.attends:
            encoding = 2 * (channels // self.num_heads) * x[0, 0].numel()
            counts[ATTENTION] = 2 * self.num_pairs(x, out) * channels + encoding
        if self.convolves:
            counts[CONVOLUTION] = self.shift_multiply_adds(3 * positions * channels, outputs)
        return counts

    def num_pairs(self, x: Tensor, out: Tensor) -> int:
        """Number of pairs of a query and a position that it attends to, from input and output."""
        return out[:, 0].numel() * self.attn_kernel_size**2

    def elementwise_operations(self, x: Tensor, out: Tensor) -> int:
        """One for each channel of queries, keys and values, for the bias of the projections."""
        return 3 * self.out_channels * x[:, 0].numel()

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        """softmax_j(scale · q_i · (k_j + p_i − p_j)) over the k×k positions around i.

        With reflection padding, a position near the border sums the weights of all its copies.
        """
        _, _, height, width = x.shape
        heads = (self.num_heads, -1)
        q = self.conv1(x)[0, :, row, column].unflatten(0, heads)
        k = self.conv2(x)[0].unflatten(0, heads)
        positions = self.position_encoding((height, width), x).permute(2, 0, 1)

        rows, columns = (neighbours(centre, extent, self.attn_kernel_size, x.device,
                                    dilation=self.dilation[0])
                         for centre, extent in ((row, height), (column, width)))
        relative = positions[:, row, column][:, None, None] - gather(positions, rows, columns)
        keys = gather(k, rows, columns) + relative.to(k.dtype)
        logits = q.shape[1]**-0.5 * torch.einsum('nd,ndrc->nrc', q, keys)
        weights = scatter(softmax(logits), rows, columns, (height, width))
        return PointAttention(weights, 1, self.attn_kernel_size**2, True)

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, num_heads={self.num_heads}, '
                f'attn_kernel_size={self.attn_kernel_size}, mix={self.mix!r}')


def acmix_or_pointwise(in_channels: int, out_channels: int, kernel_size: Size, *args: Any,
                       **kwargs: Any) -> nn.Module:
    """Build :class:`ACmixConv2d`, or ``nn.Conv2d`` if the kernel is 1×1 or there are groups."""
    return layer_or_plain(ACmixConv2d, in_channels, out_channels, kernel_size, *args, **kwargs)
