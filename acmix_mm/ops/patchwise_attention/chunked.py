"""Patch-wise attention on a chunk of rows at a time, with recomputation in the backward pass."""

from collections.abc import Iterator
from typing import Any, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmix_mm.ops.patchwise_attention.reference import Equation, apply_to_padded
from acmix_mm.ops.reflection import reflection_pad

# Elements of the copied neighbourhoods of a chunk.
CHUNK = 2**22


def apply_chunked(equation: Equation, kernel_size: int, neighbours: Tensor, own: Tensor,
                  *parameters: Tensor) -> Tensor:
    """Apply the equation to a chunk of rows at a time.

    The copies of neighbourhoods live as long as their chunk; only the maps are saved for the
    backward pass.
    """
    padded = reflection_pad(neighbours, kernel_size // 2)
    tensors = (each.to(padded.dtype) for each in (own, *parameters))
    return _Chunked.apply(equation, kernel_size, padded, *tensors)


class _Chunked(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, equation: Equation, kernel_size: int, padded: Tensor, own: Tensor,
                *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(padded, own, *parameters)
        ctx.equation, ctx.kernel_size = equation, kernel_size
        parts = [apply_to_padded(equation, kernel_size, padded[:, :, around], own[:, :, rows],
                                 *parameters)
                 for rows, around in _chunks(padded, own, kernel_size)]
        return torch.cat(parts, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        padded, own, *parameters = ctx.saved_tensors
        precise = torch.promote_types(padded.dtype, torch.float32)
        grad_padded = torch.zeros_like(padded, dtype=precise)
        grad_own = torch.empty_like(own)
        grad_parameters = [torch.zeros_like(each, dtype=precise) for each in parameters]
        for rows, around in _chunks(padded, own, ctx.kernel_size):
            leaves = [each.detach().requires_grad_()
                      for each in (padded[:, :, around], own[:, :, rows], *parameters)]
            with torch.enable_grad():
                out = apply_to_padded(ctx.equation, ctx.kernel_size, *leaves)
            grads = torch.autograd.grad(out, leaves, grad_out[:, :, rows])
            grad_padded[:, :, around] += grads[0]
            grad_own[:, :, rows] = grads[1]
            for total, grad in zip(grad_parameters, grads[2:]):
                total += grad
        grad_parameters = [each.to(padded.dtype) for each in grad_parameters]
        return None, None, grad_padded.to(padded.dtype), grad_own, *grad_parameters


def _chunks(padded: Tensor, own: Tensor, kernel_size: int) -> Iterator[tuple[slice, slice]]:
    """Divide the rows of a map into chunks; yield their rows, and their rows in ``padded``."""
    batch, height, width = own.shape[0], *own.shape[2:]
    copied = batch * padded.shape[1] * kernel_size**2 * width
    step = max(CHUNK // copied, 1)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        yield slice(top, bottom), slice(top, bottom + kernel_size - 1)
