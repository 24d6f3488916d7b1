"""Maps continued beyond their edges as in a mirror, as reflection padding does."""

import torch
from torch import Tensor

from acmix_mm.ops.symbolic import divide


def reflected_range(start: int, stop: int, extent: int, device: torch.device) -> Tensor:
    """Positions start … stop − 1 folded back into an axis of ``extent``, as often as it takes.

    As reflection padding does, the edge itself is not repeated; an axis of one has only that.
    """
    return reflect(torch.arange(start, stop, device=device), extent)


def reflect(position: Tensor, extent: int) -> Tensor:
    """Reflect any positions, int64, into an axis of ``extent`` as reflection padding does."""
    period = max(2 * (extent - 1), 1)
    position = divide(position, period)[1]
    return torch.minimum(position, period - position) if extent > 1 else position


def add_reflected_border(padded: Tensor, axis: int, extent: int, reach: int) -> Tensor:
    """Add what lies beyond the edges of an axis to where it was mirrored from, in place.

    Args:
        padded: a map that begins ``reach`` positions before its axis does.
        extent: positions of the axis itself.

    Returns:
        A view of ``padded``, ``extent`` along ``axis``.
    """
    inner = padded.narrow(axis, reach, extent)
    index = reflected_range(-reach, padded.shape[axis] - reach, extent, padded.device)
    for start, stop in ((0, reach), (reach + extent, padded.shape[axis])):
        inner.index_add_(axis, index[start:stop], padded.narrow(axis, start, stop - start))
    return inner


def reflection_pad(maps: Tensor, reach: int) -> Tensor:
    """Continue (batch, channels, height, width) by ``reach`` on all sides, mirrored at the edges.

    The edge itself is not repeated. Maps smaller than ``reach`` are mirrored again and again.
    """
    rows, columns = (reflected_range(-reach, extent + reach, extent, maps.device)
                     for extent in maps.shape[2:])
    return maps.index_select(2, rows).index_select(3, columns)
