"""Sizes as they are in an export: open, so that conditions on them have no answer."""

from typing import Union

import torch
from torch import Tensor


def statically_known_true(condition: Union[bool, 'torch.SymBool']) -> bool:
    """Whether a condition on sizes holds; in an export, whether it does for all that are allowed.

    For short cuts that change no result: an export of open sizes goes the long way, where asking
    for the condition itself would tie it to the sizes of its example.
    """
    if not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true
    return statically_known_true(condition)


def divide(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Which stretch of ``length`` a position, int64, lies in, and where in that."""
    which = position // length
    # The remainder of an open length has no translation into ONNX.
    return which, position - which * length
