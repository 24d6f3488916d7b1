"""add_paths in torch."""

from typing import Optional

import torch
from torch import Tensor

from acmix_mm.ops.projected_shift_conv.composed import map_of_taps, taps_inside
from acmix_mm.ops.projected_shift_conv.precision import at_least_float32, without_autocast


def add_paths_reference(convolution: Tensor, attention: Tensor, taps: Optional[Tensor],
                        size: list[int], stride: int, dilation: int, shift_size: int,
                        channels_first: bool) -> Tensor:
    out = convolution + attention
    if taps is not None:
        with without_autocast(taps.device):
            added = map_of_taps(taps, size, side(taps), stride, dilation)
        out = (out + added.permute(1, 2, 0)).to(convolution.dtype)
    if shift_size:
        out = out.roll((shift_size, shift_size), (1, 2))
    order = torch.contiguous_format if channels_first else torch.channels_last
    return out.permute(0, 3, 1, 2).contiguous(memory_format=order).permute(0, 2, 3, 1)


def add_paths_gradients(grad_out: Tensor, taps: Optional[Tensor], size: list[int], stride: int,
                        dilation: int, shift_size: int) -> tuple[Tensor, Optional[Tensor]]:
    """Return the gradients of each path, and of the taps."""
    grad = grad_out.roll((-shift_size, -shift_size), (1, 2)) if shift_size else grad_out
    if taps is None:
        return grad, None
    rows, columns = (taps_inside(extent, side(taps), stride, dilation, taps.dtype, taps.device)
                     for extent in size)
    summed = at_least_float32(grad).sum(0)
    return grad, torch.einsum('yxc,yt,xu->ctu', summed, rows, columns).flatten(1)


def side(taps: Tensor) -> int:
    """k, from (channels, k²)."""
    return round(taps.shape[1]**0.5)
