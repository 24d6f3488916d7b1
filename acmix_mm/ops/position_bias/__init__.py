"""The relative position bias of windowed attention, read from a table.

Paper: arXiv 2103.14030, section 3.2, equation 4.
"""

from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.position_bias.reference import position_bias_reference
from acmix_mm.ops.position_bias.triton import position_bias_triton

__all__ = ['position_bias']


def position_bias(table: Tensor, index: Tensor, window_size: tuple[int, int], *,
                  backend: Optional[str] = None) -> Tensor:
    """Read the bias between all positions of a window from the table of its offsets.

    Args:
        table: ((2 · side − 1)², num_heads), any floating dtype: in row-major order over the offset
            from key to query, from -(side − 1) along both axes.
        index: the row of each pair of positions in a window of ``side``, (side², side²), int64.
        window_size: (height, width) of the window, at most ``side`` each.
        backend: ``'reference'`` or ``'triton'``, whose kernel computes the gradient. By default
            ``'triton'`` on a GPU that can run it.

    Returns:
        (num_heads, area, area) with area = height · width.
    """
    automatic = 'triton' if table.is_cuda and runs_triton(table) else 'reference'
    run = select_backend('position_bias', backend, table.device, automatic=automatic,
                         exporting='reference')
    return run(table, index, list(window_size))


register_backends('position_bias', Backend('reference', position_bias_reference),
                  Backend('triton', position_bias_triton, triton_unavailable))
