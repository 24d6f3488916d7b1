"""The equations of both operators, and their application to a whole map at once.

A backend applies an equation: a function of the copied neighbourhoods of some positions, (batch,
channels, kernel_size², positions), of the positions' own maps, (batch, channels, positions), and of
parameters. It returns (batch, channels, positions).
"""

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.reflection import reflection_pad

Equation = Callable[..., Tensor]


def compute_features(keys: Tensor, q: Tensor, scale: Tensor, shift: Tensor,
                     weight: Tensor) -> Tensor:
    """The equation of :func:`acmix_mm.ops.patch_features`."""
    around = torch.cat([q, keys.flatten(1, 2)], 1)
    # Rounded to half precision, scale and shift no longer cancel, and the shift may overflow.
    normed = torch.addcmul(shift[:, None], scale[:, None], around).relu()
    return torch.matmul(weight.to(around.dtype), normed.to(around.dtype))


def aggregate(values: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation of :func:`acmix_mm.ops.patch_aggregation`."""
    weight, bias = weight.to(values.dtype), bias.to(values.dtype)
    weights = torch.matmul(weight, features.to(values.dtype)) + bias[:, None]
    weights = weights.unflatten(1, (-1, values.shape[2]))
    shared = values.unflatten(1, (-1, weights.shape[1]))
    return (shared * weights[:, None]).sum(3).flatten(1, 2)


def apply_reference(equation: Equation, kernel_size: int, neighbours: Tensor, own: Tensor,
                    *parameters: Tensor) -> Tensor:
    """Copy every neighbourhood of the map and apply the equation once."""
    padded = reflection_pad(neighbours, kernel_size // 2)
    return apply_to_padded(equation, kernel_size, padded, own, *parameters)


def apply_to_padded(equation: Equation, kernel_size: int, padded: Tensor, own: Tensor,
                    *parameters: Tensor) -> Tensor:
    """Copy the neighbourhood of each position of ``own`` from ``padded`` and apply the equation."""
    copies = F.unfold(padded, kernel_size).unflatten(1, (padded.shape[1], -1))
    return equation(copies, own.flatten(2), *parameters).unflatten(2, own.shape[2:])
