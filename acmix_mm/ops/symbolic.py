"""Arithmetic on sizes that are symbolic in an export of dynamic shapes."""

from typing import Union

import torch
from torch import Tensor


def statically_known_true(condition: Union[bool, 'torch.SymBool']) -> bool:
    """Whether a condition on sizes holds; if they are symbolic, whether it holds for all sizes.

    For shortcuts that do not change the result. Evaluating the condition itself would specialise
    the export to the sizes of its example.
    """
    if not isinstance(condition, torch.SymBool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true
    return statically_known_true(condition)


def divide(position: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of positions, int64, by ``length``."""
    quotient = position // length
    # The remainder by a symbolic length cannot be translated into ONNX.
    return quotient, position - quotient * length
