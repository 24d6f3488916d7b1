"""Masks of shifted windows."""

import torch
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size

# Swin adds this to the logits between positions from opposite edges of the map.
MASKED_LOGIT = -100.0


def is_last(windows: int, device: torch.device) -> Tensor:
    """1 for the last of a number of windows and 0 for the others, int64; indexes edge_masks."""
    return (torch.arange(windows, device=device) == windows - 1).long()


@cached_by_size
def edge_masks(window_height: int, window_width: int, shift_size: int, dtype: torch.dtype,
               device: torch.device) -> Tensor:
    """The masks of a shifted map's windows, whose last row and column hold both of its edges.

    Returns:
        (2, 2, area, area), indexed by whether a window is in the last row and in the last column:
        ``MASKED_LOGIT`` between positions from opposite edges of the map, zero elsewhere.
    """
    down, across = (torch.arange(extent, device=device) >= extent - shift_size
                    for extent in (window_height, window_width))
    side = torch.zeros(2, 2, window_height, window_width, dtype=torch.int64, device=device)
    side[1] += 2 * down[:, None]
    side[:, 1] += across
    side = side.flatten(2)
    return (side[..., :, None] != side[..., None, :]).to(dtype) * MASKED_LOGIT
