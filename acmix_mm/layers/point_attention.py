"""The attention weights of a single position, computed from the equations for analysis."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from acmix_mm.ops.reflection import reflected_range


class PointAttention(NamedTuple):
    """The attention weights of one position of a layer's input.

    Attributes:
        weights: (heads, rows, columns), the weight of each value in the attention path at that
            position; zero outside the neighbourhood. Rows and columns are those of the map of
            values, which is padded to whole windows in a Swin and reduced in a PVT. In a SAN,
            "heads" are the groups of channels that share weights.
        cell: side of the square of input positions that one value stands for.
        num_positions: number of positions attended to. Positions that reflection padding repeats
            count each time; masked ones do not count.
        is_softmax: whether the weights of each head are positive and sum to one.
    """

    weights: Tensor
    cell: int
    num_positions: int
    is_softmax: bool


def neighbours(centre: int, extent: int, kernel_size: int, device: torch.device,
               dilation: int = 1) -> Tensor:
    """Positions of the kernel's taps along an axis of ``extent``, with reflection padding."""
    reach = dilation * (kernel_size // 2)
    return reflected_range(centre - reach, centre + reach + 1, extent, device)[::dilation]


def gather(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Select ``rows`` and ``columns`` of maps (…, height, width)."""
    return maps[..., rows, :][..., columns]


def scatter(weights: Tensor, rows: Tensor, columns: Tensor, size: Sequence[int]) -> Tensor:
    """Place (heads, rows, columns) on zero maps of ``size``; repeated positions add up."""
    across = weights.new_zeros(*weights.shape[:2], size[1]).index_add_(2, columns, weights)
    return weights.new_zeros(len(weights), *size).index_add_(1, rows, across)


def softmax(logits: Tensor) -> Tensor:
    """Softmax over both axes of a neighbourhood, (heads, rows, columns)."""
    return logits.flatten(1).softmax(1).view_as(logits)
