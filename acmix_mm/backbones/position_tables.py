"""Resizing of learned position tables."""

import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.symbolic import statically_known_true


def resize_grid(rows: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Interpolate a position table to another grid.

    Args:
        rows: (1, old height · old width, channels), in row-major order.
        old: (height, width) of the grid of ``rows``.
        new: (height, width) of the new grid.
        mode: interpolation of the host, ``'bicubic'`` or ``'bilinear'``.

    Returns:
        (1, new height · new width, channels).
    """
    if statically_known_true(old[0] == new[0]) and statically_known_true(old[1] == new[1]):
        return rows
    grid = rows.unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new), mode=mode, align_corners=False)
    return grid.flatten(2).transpose(1, 2)
