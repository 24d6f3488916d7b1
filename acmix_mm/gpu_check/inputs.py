"""Random inputs of the operators, float32 on the CPU; a bias may be None."""

from typing import Optional

import torch
from torch import Tensor


def sliding_tensors(batch: int, heads: int, head_dims: int, height: int, width: int,
                    heads_last: bool = False) -> list[Tensor]:
    """Projections and positions; with ``heads_last``, the heads are adjacent in memory."""
    qkv = torch.randn(batch, height, width, 3, heads, head_dims)
    if heads_last:
        qkv = qkv.permute(0, 1, 2, 5, 3, 4).contiguous().permute(0, 1, 2, 4, 5, 3)
    return [qkv, torch.randn(height, width, head_dims)]


def window_tensors(batch: int, grid: tuple[int, int], window_size: tuple[int, int], heads: int,
                   head_dims: int) -> list[Tensor]:
    """Projections of a grid of windows, and the position bias."""
    height, width = grid[0] * window_size[0], grid[1] * window_size[1]
    area = window_size[0] * window_size[1]
    return [torch.randn(batch, height, width, 3, heads, head_dims), torch.randn(heads, area, area)]


def padded_window_tensors(batch: int, size: tuple[int, int], window_size: tuple[int, int],
                          heads: int, head_dims: int) -> list[Tensor]:
    """As :func:`window_tensors`, for a map of any size, and the values of its padding."""
    area = window_size[0] * window_size[1]
    return [torch.randn(batch, *size, 3, heads, head_dims), torch.randn(heads, area, area),
            torch.randn(3, heads, head_dims)]


def conv_tensors(batch: int, heads: int, head_dims: int, height: int, width: int,
                 kernel_size: int, bias: bool, channels_last: bool) -> list[Optional[Tensor]]:
    """Maps, the fc's weight, shift kernels and the fc's bias."""
    shifts = kernel_size**2
    if channels_last:
        maps = torch.randn(batch, height, width, 3 * heads, head_dims).permute(0, 3, 4, 1, 2)
    else:
        maps = torch.randn(batch, 3 * heads, head_dims, height, width)
    return [maps, torch.randn(shifts, 3 * heads) / (3 * heads)**0.5,
            torch.randn(heads * head_dims, shifts, kernel_size, kernel_size) / shifts,
            torch.randn(shifts) if bias else None]


def projected_tensors(batch: int, in_channels: int, heads: int, head_dims: int, height: int,
                      width: int, kernel_size: int, bias: bool,
                      fc_bias: bool) -> list[Optional[Tensor]]:
    """The input, weight and bias of the projections, and what :func:`conv_tensors` adds to maps."""
    _, fc_weight, shift_weight, fc_bias_or_none = conv_tensors(
        0, heads, head_dims, 1, 1, kernel_size, fc_bias, True)
    channels = 3 * heads * head_dims
    return [torch.randn(batch, in_channels, height, width),
            torch.randn(channels, in_channels) / in_channels**0.5,
            torch.randn(channels) if bias else None, fc_weight, shift_weight, fc_bias_or_none]


def weights_tensors(in_channels: int, heads: int, head_dims: int, kernel_size: int, bias: bool,
                    fc_bias: bool, rates: bool, attention_bias: bool) -> list[Optional[Tensor]]:
    """The tensors of :func:`acmix_mm.ops.compose_paths`."""
    _, weight, of_weight, *of_shifts = projected_tensors(
        0, in_channels, heads, head_dims, 1, 1, kernel_size, bias, fc_bias)
    rate1, rate2 = (torch.randn(1) if rates else None for _ in range(2))
    return [weight, of_weight, *of_shifts, rate1, rate2,
            torch.randn(heads * head_dims) if attention_bias else None]


def sum_tensors(batch: int, height: int, width: int, channels: int,
                kernel_size: Optional[int] = None) -> list[Optional[Tensor]]:
    """Convolution, attention and taps of :func:`acmix_mm.ops.add_paths`."""
    taps = None if kernel_size is None else torch.randn(channels, kernel_size**2)
    return [*torch.randn(2, batch, height, width, channels), taps]


def encoding_tensors(head_dims: int) -> list[Tensor]:
    """Weight and bias of :func:`acmix_mm.ops.position_encoding`."""
    return [torch.randn(head_dims, 2), torch.randn(head_dims)]


def random_tensors(*shape: int) -> list[Tensor]:
    """One tensor."""
    return [torch.randn(shape)]


def features_tensors(batch: int, channels: int, height: int, width: int,
                     kernel_size: int) -> list[Tensor]:
    """Queries, keys, scale, shift and weight of :func:`acmix_mm.ops.patch_features`."""
    around = channels * (kernel_size**2 + 1)
    q, k = torch.randn(2, batch, channels, height, width)
    return [q, k, torch.randn(around), torch.randn(around), torch.randn(3, around) / around**0.5]


def aggregation_tensors(batch: int, channels: int, height: int, width: int, kernel_size: int,
                        groups: int = 2) -> list[Tensor]:
    """Values, features, weight and bias of :func:`acmix_mm.ops.patch_aggregation`."""
    area = kernel_size**2
    return [torch.randn(batch, channels, height, width), torch.randn(batch, 3, height, width),
            torch.randn(groups * area, 3) / area, torch.randn(groups * area) / area]


def involution_tensors(batch: int, groups: int, per_group: int, height: int, width: int,
                       kernel_size: int, stride: int = 1) -> list[Tensor]:
    """Input and kernels of :func:`acmix_mm.ops.involution`."""
    size = [-(-extent // stride) for extent in (height, width)]
    return [torch.randn(batch, groups * per_group, height, width),
            torch.randn(batch, groups, kernel_size, kernel_size, *size)]
