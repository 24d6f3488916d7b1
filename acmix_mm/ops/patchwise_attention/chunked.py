"""Patch-wise attention on a chunk of rows at a time, with recomputation in the backward pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from acmix_mm.ops.autograd import recomputing
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
    return _apply_to_chunks(padded, own, *parameters, equation, kernel_size)


def apply_to_chunks(padded: Tensor, own: Tensor, *arguments: Any) -> Tensor:
    """Apply an equation to padded maps.

    Args:
        padded: the maps of the neighbours, padded by reflection.
        own: the maps of the positions themselves.
        arguments: the parameters, then the equation and the kernel size.
    """
    *parameters, equation, kernel_size = arguments
    return torch.cat([
        apply_to_padded(equation, kernel_size, padded[:, :, around], own[:, :, rows], *parameters)
        for rows, around in _chunks(padded, own, kernel_size)], 2)


def apply_to_chunks_backward(grad_out: Tensor, padded: Tensor, own: Tensor,
                             *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of ``padded``, ``own`` and the parameters."""
    *parameters, equation, kernel_size = arguments
    precise = torch.promote_types(padded.dtype, torch.float32)
    grad_padded = torch.zeros_like(padded, dtype=precise)
    grad_own = torch.empty_like(own)
    grad_parameters = [torch.zeros_like(each, dtype=precise) for each in parameters]
    for rows, around in _chunks(padded, own, kernel_size):
        leaves = [each.detach().requires_grad_()
                  for each in (padded[:, :, around], own[:, :, rows], *parameters)]
        with torch.enable_grad():
            out = apply_to_padded(equation, kernel_size, *leaves)
        grads = torch.autograd.grad(out, leaves, grad_out[:, :, rows])
        grad_padded[:, :, around] += grads[0]
        grad_own[:, :, rows] = grads[1]
        for total, grad in zip(grad_parameters, grads[2:]):
            total += grad
    grad_parameters = [grad.to(each.dtype) for grad, each in zip(grad_parameters, parameters)]
    return grad_padded.to(padded.dtype), grad_own, *grad_parameters


_apply_to_chunks = recomputing(apply_to_chunks, apply_to_chunks_backward)


def _chunks(padded: Tensor, own: Tensor, kernel_size: int) -> Iterator[tuple[slice, slice]]:
    """Divide the rows of a map into chunks; yield their rows, and their rows in ``padded``."""
    batch, height, width = own.shape[0], *own.shape[2:]
    copied = batch * padded.shape[1] * kernel_size**2 * width
    step = max(CHUNK // max(copied, 1), 1)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        yield slice(top, bottom), slice(top, bottom + kernel_size - 1)
