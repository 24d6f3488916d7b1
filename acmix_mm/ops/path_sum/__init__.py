"""The sum of both paths, with the biases of a composed convolution.

Paper: arXiv 2111.14556, equation 14; see :func:`acmix_mm.ops.compose_paths` for the rates.
"""

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.path_sum.reference import add_paths_reference
from acmix_mm.ops.path_sum.triton import add_paths_triton

__all__ = ['add_paths']


def add_paths(convolution: Tensor, attention: Tensor, taps: Optional[Tensor], size: Sequence[int],
              *, stride: int = 1, dilation: int = 1, shift_size: int = 0,
              channels_first: bool = False, backend: Optional[str] = None) -> Tensor:
    """Add both paths and what the taps of a convolution add for its biases, and roll the sum.

    Args:
        convolution: (batch, height, width, channels), any floating dtype and strides.
        attention: of the same shape and dtype.
        taps: what each tap of the convolution adds where it lies on the map, (channels, k²), in at
            least float32, or None.
        size: (height, width) of the input of the convolution.
        stride: of the convolution.
        dilation: of the convolution.
        shift_size: by how much to roll the sum along both axes; not negative.
        channels_first: memory order of the result.
        backend: ``'reference'`` or ``'triton'``. By default ``'triton'`` on a GPU that can run it.

    Returns:
        (batch, height, width, channels), in the dtype of ``convolution``.

    Raises:
        ValueError: the paths differ in shape or dtype.
    """
    if convolution.shape != attention.shape or convolution.dtype != attention.dtype:
        raise ValueError('add_paths takes two paths of one shape and dtype, got '
                         f'{tuple(convolution.shape)} in {convolution.dtype} and '
                         f'{tuple(attention.shape)} in {attention.dtype}.')
    automatic = 'triton' if convolution.is_cuda and runs_triton(convolution) else 'reference'
    run = select_backend('add_paths', backend, convolution.device, automatic=automatic,
                         exporting='reference')
    return run(convolution, attention, taps, list(size), stride, dilation, shift_size,
               channels_first)


register_backends('add_paths', Backend('reference', add_paths_reference),
                  Backend('triton', add_paths_triton, triton_unavailable))
