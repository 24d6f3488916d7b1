"""Reference implementation of shift_conv, and the paper's shift by tensor operations."""

import functools
import math
from collections.abc import Iterator
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_conv_reference(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                         fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Follow the paper's equations: each tap of the kernels shifts and weights the mixed maps."""
    kernels = shift_weight.unflatten(0, (maps.shape[2], -1)).flatten(3).unbind(3)
    views = _shifted_views(maps, fc_weight, fc_bias, shift_weight.shape[-1], stride, dilation)
    shifted = (torch.einsum('dnj,bjdhw->bdnhw', kernel, view)
               for kernel, view in zip(kernels, views))
    return functools.reduce(torch.add, shifted).flatten(1, 2)


def shift_sum(maps: Tensor, fc_weight: Tensor, fc_bias: Optional[Tensor] = None, *,
              stride: int = 1, dilation: int = 1) -> Tensor:
    """Mix the maps of all heads into k² maps, shift each, and sum them.

    This is the paper's shift by tensor operations (section 4.2). :func:`shift_conv` computes the
    same for every output head if its kernels are pure shifts.

    Args:
        maps: (batch, num_maps, head_dims, height, width).
        fc_weight: (k², num_maps), k odd.
        fc_bias: (k²,), or None.
        stride: distance between the positions of the output.
        dilation: distance between the taps of the kernel.

    Returns:
        (batch, head_dims, ⌈height / stride⌉, ⌈width / stride⌉).
    """
    views = _shifted_views(maps, fc_weight, fc_bias, math.isqrt(len(fc_weight)), stride, dilation)
    return functools.reduce(torch.add, (view[:, tap] for tap, view in enumerate(views)))


def _shifted_views(maps: Tensor, fc_weight: Tensor, fc_bias: Optional[Tensor], kernel_size: int,
                   stride: int, dilation: int) -> Iterator[Tensor]:
    """Mix the maps, and yield all of them as each tap of the kernel sees them.

    A view is (batch, k², head_dims, ⌈height / stride⌉, ⌈width / stride⌉), zero outside the map.
    """
    height, width = maps.shape[-2:]
    reach = dilation * (kernel_size // 2)
    mixed = torch.einsum('jm,bmdhw->bjdhw', fc_weight, maps)
    if fc_bias is not None:
        mixed = mixed + fc_bias.to(mixed.dtype)[:, None, None, None]
    padded = F.pad(mixed, (reach, reach, reach, reach))
    for down in range(0, dilation * kernel_size, dilation):
        for across in range(0, dilation * kernel_size, dilation):
            yield padded[..., down:down + height:stride, across:across + width:stride]
