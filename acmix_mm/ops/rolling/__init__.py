"""Rolling the map of a shifted block, while converting it."""

from typing import Optional

import torch
from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.rolling.reference import roll_map_reference
from acmix_mm.ops.rolling.triton import roll_map_triton

__all__ = ['roll_map']


def roll_map(x: Tensor, shift_size: int, dtype: torch.dtype, *,
             backend: Optional[str] = None) -> Tensor:
    """Roll a map along both axes and convert it, in one pass on a GPU.

    ``torch.roll`` moves the map once for each axis.

    Args:
        x: (batch, height, width, channels), any floating dtype.
        shift_size: number of positions, of any sign.
        dtype: of the result.
        backend: ``'reference'`` or ``'triton'``. By default ``'triton'`` on a GPU that can run it.

    Returns:
        Of the shape of ``x``.
    """
    automatic = 'triton' if x.is_cuda and runs_triton(x) else 'reference'
    run = select_backend('roll_map', backend, x.device, automatic=automatic, exporting='reference')
    return run(x, shift_size, dtype) if shift_size else x.to(dtype)


register_backends('roll_map', Backend('reference', roll_map_reference),
                  Backend('triton', roll_map_triton, triton_unavailable))
