"""Reflection padding of any width: maps narrower than the padding are reflected repeatedly.

As in ``torch.nn.functional.pad(mode='reflect')``, the edge itself is not repeated.
"""

import torch
from torch import Tensor

from acmix_mm.ops.symbolic import divide


def reflected_range(start: int, stop: int, extent: int, device: torch.device) -> Tensor:
    """Positions start … stop − 1 reflected into an axis of length ``extent``, int64."""
    return reflect(torch.arange(start, stop, device=device), extent)


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
