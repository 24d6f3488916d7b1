"""Patch-wise attention for exports: a sum over the rows of the kernel, in torch's own operations.

For equations that are sums over neighbours, with parameters (groups · kernel_size², …).
"""

import functools

import torch
from torch import Tensor

from acmix_mm.ops.patchwise_attention.reference import Equation
from acmix_mm.ops.reflection import reflection_pad


def apply_by_kernel_row(equation: Equation, kernel_size: int, neighbours: Tensor, own: Tensor,
                        *parameters: Tensor) -> Tensor:
    """Apply the equation to one row of all neighbourhoods at a time, and sum the results."""
    height, width = own.shape[2:]
    padded = reflection_pad(neighbours, kernel_size // 2)
    across = torch.stack([padded[..., column:column + width] for column in range(kernel_size)], 2)
    rows = [each.unflatten(0, (-1, kernel_size, kernel_size)).unbind(1) for each in parameters]
    own = own.flatten(2)
    parts = (equation(across[..., row:row + height, :].flatten(3), own,
                      *(each.flatten(0, 1) for each in parameters_of_row))
             for row, parameters_of_row in enumerate(zip(*rows)))
    return functools.reduce(torch.add, parts).unflatten(2, (height, width))
