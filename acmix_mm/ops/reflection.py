"""Reflection padding of any width: maps narrower than the padding are reflected repeatedly.

As in ``torch.nn.functional.pad(mode='reflect')``, the edge itself is not repeated.
"""

import torch
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size
from acmix_mm.ops.symbolic import divide


def reflected_range(start: int, stop: int, extent: int, device: torch.device) -> Tensor:
    """Positions start … stop − 1 reflected into an axis of length ``extent``, int64."""
    return reflect(torch.arange(start, stop, device=device), extent)


@cached_by_size
def reflected_axis(extent: int, reach: int, device: torch.device) -> Tensor:
    """The reflected positions of a padded axis, int64."""
    return reflected_range(-reach, extent + reach, extent, device)


def reflect(position: Tensor, extent: int) -> Tensor:
    """Reflect positions, int64, into an axis of length ``extent``."""
    period = max(2 * (extent - 1), 1)
    position = divide(position, period)[1]
    return torch.minimum(position, period - position) if extent > 1 else position


def reflection_pad(maps: Tensor, reach: int) -> Tensor:
    """Pad (batch, channels, height, width) by ``reach`` positions on all four sides."""
    rows, columns = (reflected_range(-reach, extent + reach, extent, maps.device)
                     for extent in maps.shape[2:])
    return maps.index_select(2, rows).index_select(3, columns)


def add_reflected_border(padded: Tensor, axis: int, extent: int, reach: int) -> Tensor:
    """Add the border of a padded map onto the positions it reflects, in place.

    This is the gradient of reflection padding along one axis.

    Args:
        padded: a map with a border of ``reach`` positions before and after ``axis``.
        axis: the padded axis.
        extent: length of the axis without its border.
        reach: width of the border.

    Returns:
        A view of ``padded`` without the border along ``axis``.
    """
    inner = padded.narrow(axis, reach, extent)
    index = reflected_axis(extent, reach, padded.device)
    for start, stop in ((0, reach), (reach + extent, padded.shape[axis])):
        inner.index_add_(axis, index[start:stop], padded.narrow(axis, start, stop - start))
    return inner
