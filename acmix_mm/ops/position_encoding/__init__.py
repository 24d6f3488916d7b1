"""The position encoding of sliding-window attention: linear in the coordinates.

Paper: arXiv 2111.14556; the encoding follows the authors' code, a 1×1 convolution of coordinates.
"""

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
from acmix_mm.ops.position_encoding.reference import position_encoding_reference
from acmix_mm.ops.position_encoding.triton import position_encoding_triton

__all__ = ['position_encoding']


def position_encoding(weight: Tensor, bias: Tensor, height: int, width: int, dtype: torch.dtype, *,
                      backend: Optional[str] = None) -> Tensor:
    """Encode the positions of a map: weight · (x, y) + bias.

    x and y go from -1 to 1 along the axes. They are at least float32, also under autocast: in
    bfloat16, neighbours on a map of width 336 would be 0.65 to 1.31 steps apart.

    Args:
        weight: (head_dims, 2), any floating dtype.
        bias: (head_dims,).
        height: of the map.
        width: of the map.
        dtype: of the map.
        backend: ``'reference'`` or ``'triton'``. By default ``'triton'`` on a GPU that can run it.

    Returns:
        (height, width, head_dims), float32, or wider if ``dtype`` is.

    Raises:
        ValueError: ``weight`` is of another shape.
    """
    if weight.shape != (len(bias), 2):
        raise ValueError('position_encoding takes a weight of shape (head_dims, 2) and a bias of '
                         f'shape (head_dims,), got {tuple(weight.shape)} and {tuple(bias.shape)}.')
    precise = torch.promote_types(dtype, torch.float32)
    runs = weight.is_cuda and precise == torch.float32 and runs_triton(weight)
    run = select_backend('position_encoding', backend, weight.device,
                         automatic='triton' if runs else 'reference', exporting='reference')
    return run(weight, bias, height, width, precise)


register_backends('position_encoding', Backend('reference', position_encoding_reference),
                  Backend('triton', position_encoding_triton, triton_unavailable))
