"""Maps continued beyond their edges as in a mirror, as reflection padding does."""

import torch
from torch import Tensor

from .sizes import place_in


def mirrored(start: int, stop: int, extent: int, device: torch.device) -> Tensor:
    """Positions start … stop − 1 folded back into an axis of ``extent``, as often as it takes.

    As reflection padding does, the edge itself is not repeated; an axis of one has only that.
    """
    return folded(torch.arange(start, stop, device=device), extent)


def folded(position: Tensor, extent: int) -> Tensor:
    """Any positions, int64, folded back into an axis of ``extent`` as :func:`mirrored` does."""
    period = max(2 * (extent - 1), 1)
    position = place_in(position, period)[1]
    return torch.minimum(position, period - position) if extent > 1 else position


def fold_border(padded: Tensor, axis: int, extent: int, reach: int) -> Tensor:
    """Add what lies beyond the edges of an axis to where it was mirrored from, in place.

    Args:
        padded: a map that begins ``reach`` positions before its axis does.
        extent: positions of the axis itself.

    Returns:
        A view of ``padded``, ``extent`` along ``axis``.
    """
    inner = padded.narrow(axis, reach, extent)
    index = mirrored(-reach, padded.shape[axis] - reach, extent, padded.device)
    for start, stop in ((0, reach), (reach + extent, padded.shape[axis])):
        inner.index_add_(axis, index[start:stop], padded.narrow(axis, start, stop - start))
    return inner
