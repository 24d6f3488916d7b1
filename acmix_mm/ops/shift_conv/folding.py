"""Folding the fully connected layer into the kernels, and its bias into the output.

The bias is convolved as well. It adds the same to all inner positions of the output, and less near
the border, where some taps of the kernel lie outside the map. Along each axis, positions with the
same set of taps inside form a border region; the middle region is the inside of the map.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def folded_kernels(fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
    """The product of the two linear steps, (head_dims · num_heads, num_maps, k, k)."""
    return torch.einsum('cjyx,jm->cmyx', shift_weight, fc_weight)


def bias_taps(fc_bias: Tensor, shift_weight: Tensor) -> Tensor:
    """What each tap of the kernels adds to the output for the bias, (channels, 1, k, k)."""
    return torch.einsum('cjyx,j->cyx', shift_weight, fc_bias)[:, None]


def convolved_bias(fc_bias: Optional[Tensor], shift_weight: Tensor, size: Sequence[int],
                   dilation: int) -> Optional[Tensor]:
    """What the bias adds to the output, (channels, row regions, column regions), or None.

    It is computed on a map of at most one position per region.

    Args:
        fc_bias: (k²,), or None.
        shift_weight: (channels, k², k, k).
        size: (height, width) of the map.
        dilation: distance between the taps of the kernel.
    """
    if fc_bias is None:
        return None
    taps = bias_taps(fc_bias, shift_weight)
    reach = dilation * (shift_weight.shape[-1] // 2)
    ones = taps.new_ones(1, 1, *(min(extent, 2 * reach + 1) for extent in size))
    return F.conv2d(ones, taps, padding=reach, dilation=dilation)[0]


class BorderRegions:
    """The border regions of a map, to add a convolved bias and to compute its gradient.

    Args:
        shape: (channels, row regions, column regions), from :func:`convolved_bias`.
        size: (height, width) of the map.
        stride: distance between the positions of the output.
    """

    def __init__(self, shape: Sequence[int], size: Sequence[int], stride: int) -> None:
        self.shape = shape
        self.row, self.column = (regions // 2 for regions in shape[1:])
        rows, columns = (_region_slices(extent, regions, stride)
                         for extent, regions in zip(size, shape[1:]))
        self.border = [(row, column, rows[row], columns[column]) for row in rows
                       for column in columns if (row, column) != (self.row, self.column)]

    def split(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The bias inside the map, (channels,), and how that of each region differs from it."""
        inner = bias[:, self.row, self.column]
        return inner, bias - inner[:, None, None]

    def add(self, images: Tensor, difference: Tensor) -> Tensor:
        """Add the difference of each region to (batch, channels, height, width), in place."""
        for row, column, rows, columns in self.border:
            images[:, :, rows, columns] += difference[:, row, column, None, None].to(images.dtype)
        return images

    def gradient(self, grad_images: Tensor, total: Tensor) -> Tensor:
        """The gradient of the bias, from that of the images and its sum over all positions."""
        grad_bias = total.new_zeros(self.shape)
        for row, column, rows, columns in self.border:
            grad_bias[:, row, column] = grad_images[:, :, rows, columns].sum((0, 2, 3))
        grad_bias[:, self.row, self.column] = total - grad_bias.sum((1, 2))
        return grad_bias


def bias_map(bias: Tensor, size: Sequence[int], stride: int) -> Tensor:
    """What the bias adds to each position of the output, (channels, out height, out width).

    Args:
        bias: from :func:`convolved_bias`.
        size: (height, width) of the map.
        stride: distance between the positions of the output.
    """
    for axis, extent in enumerate(size, 1):
        regions = bias.shape[axis]
        middle = regions // 2
        positions = torch.arange(0, extent, stride, device=bias.device)
        behind = (positions - (extent - regions + middle)).clamp(min=0)
        bias = bias.index_select(axis, positions.clamp(max=middle) + behind)
    return bias


def _region_slices(extent: int, regions: int, stride: int) -> dict[int, slice]:
    """The positions of the output in each region along an axis; empty regions are left out."""
    middle = regions // 2
    from_end = extent - regions
    slices = {}
    for region in range(regions):
        first = region + from_end * (region > middle)
        last = region + from_end * (region >= middle)
        start, stop = -(-first // stride), last // stride + 1
        if start < stop:
            slices[region] = slice(start, stop)
    return slices
