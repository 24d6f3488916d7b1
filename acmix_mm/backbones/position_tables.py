"""Position tables that were learned at one size, and are asked for at another."""

import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.symbolic import statically_known_true


def resize_grid(rows: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Interpolate (1, old area, channels), row-major over a grid, to (1, new area, channels).

    ``mode`` is the host's: ``'bicubic'`` or ``'bilinear'``.
    """
    if statically_known_true(old[0] == new[0]) and statically_known_true(old[1] == new[1]):
        return rows
    grid = rows.unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=tuple(new), mode=mode, align_corners=False)
    return grid.flatten(2).transpose(1, 2)
