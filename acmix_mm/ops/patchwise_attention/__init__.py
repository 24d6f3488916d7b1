"""Patch-wise self-attention, the attention path of ACmix in a SAN host.

Paper: arXiv 2004.13621, section 3.2 (patch-wise self-attention with concatenation); the mirrored
border is its authors' code's. Each position weighs its neighbours by what two linear layers make
of all the keys around it together. Neither the keys nor the weights are ever held for a whole map,
where they would be kernel_size² times its size.
"""

from collections.abc import Iterator
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.reflection import reflection_pad

# Elements of the copies of neighbourhoods that are held at a time, in whole rows of the map.
COPIED_AT_ONCE = 2**22


def patch_features(q: Tensor, k: Tensor, scale: Tensor, shift: Tensor, weight: Tensor,
                   kernel_size: int, *, backend: Optional[str] = None) -> Tensor:
    """Map each query and all keys around it to features of their own, linearly after a ReLU.

    out_i = weight · relu(scale · [q_i, k_j for all j] + shift), j over the neighbourhood of i in
    row-major order, mirrored at the edges of the map.

    Args:
        q: queries, (batch, channels, height, width), any floating dtype.
        k: keys, (batch, key channels, height, width).
        scale: (channels + key channels · kernel_size²,); in their order, the neighbours run
            fastest.
        shift: of the same shape.
        weight: (features, channels + key channels · kernel_size²).
        kernel_size: side of the neighbourhood, odd.
        backend: ``'reference'`` or ``'chunked'``; if None the latter, but the former in an export.

    Returns:
        (batch, features, height, width), in the dtype of ``q``.

    Raises:
        ValueError: the shapes do not fit together, the kernel is even, or there is no such backend.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError('patch_features takes q and k of shape (batch, channels, height, width), '
                         f'alike but in their channels, got {tuple(q.shape)} and {tuple(k.shape)}.')
    check_kernel('patch_features', kernel_size)
    width = q.shape[1] + k.shape[1] * kernel_size**2
    if scale.shape != (width,) or shift.shape != (width,) or weight.shape[1:] != (width,):
        raise ValueError(f'These maps need scale and shift of shape {(width,)} and a weight of '
                         f'shape (features, {width}), got {tuple(scale.shape)}, '
                         f'{tuple(shift.shape)} and {tuple(weight.shape)}.')
    run = select_backend('patch_features', backend, q.device, automatic='chunked',
                         exporting='reference')
    return run(features_of_rows, kernel_size, k, q, scale, shift, weight)


def patch_aggregation(v: Tensor, features: Tensor, weight: Tensor, bias: Tensor,
                      kernel_size: int, *, backend: Optional[str] = None) -> Tensor:
    """Sum the values around each position, weighed linearly by its features.

    out_i = Σ_j (weight_j · features_i + bias_j) · v_j, j over the neighbourhood of i in row-major
    order, mirrored at the edges of the map. Channel c takes the weights of group c mod groups.

    Args:
        v: values, (batch, channels, height, width), any floating dtype.
        features: (batch, features, height, width).
        weight: (groups · kernel_size², features), groups dividing the channels; the neighbours
            run fastest.
        bias: (groups · kernel_size²,).
        kernel_size: side of the neighbourhood, odd.
        backend: ``'reference'``, ``'kernel_rows'`` or ``'chunked'``; if None the last, but
            ``'kernel_rows'`` in an export.

    Returns:
        (batch, channels, height, width), in the dtype of ``v``.

    Raises:
        ValueError: the shapes do not fit together, the kernel is even, or there is no such backend.
    """
    if v.dim() != 4 or features.dim() != 4 or (
            (v.shape[0], *v.shape[2:]) != (features.shape[0], *features.shape[2:])):
        raise ValueError('patch_aggregation takes v and features of shape (batch, channels, height,'
                         f' width), alike but in their channels, got {tuple(v.shape)} and '
                         f'{tuple(features.shape)}.')
    check_kernel('patch_aggregation', kernel_size)
    rows, area = weight.shape[0], kernel_size**2
    if rows % area or v.shape[1] % max(rows // area, 1) or (
            weight.shape != (rows, features.shape[1]) or bias.shape != (rows,)):
        raise ValueError(f'These maps need a weight of shape (groups · {area}, '
                         f'{features.shape[1]}) and a bias to it, groups dividing {v.shape[1]}, '
                         f'got {tuple(weight.shape)} and {tuple(bias.shape)}.')
    run = select_backend('patch_aggregation', backend, v.device, automatic='chunked',
                         exporting='kernel_rows')
    return run(aggregate_rows, kernel_size, v, features, weight, bias)


def check_kernel(operator: str, kernel_size: int) -> None:
    """Raise ValueError unless ``kernel_size`` is odd."""
    if kernel_size % 2 == 0:
        raise ValueError(f'{operator} takes odd kernels, got one of {kernel_size}.')


def features_of_rows(copies: Tensor, q: Tensor, scale: Tensor, shift: Tensor,
                     weight: Tensor) -> Tensor:
    """The equation of :func:`patch_features` for some positions.

    copies: k of all neighbours, (batch, key channels, kernel_size², positions); q: (batch,
    channels, positions). Returns (batch, features, positions).
    """
    around = torch.cat([q, copies.flatten(1, 2)], 1)
    around = torch.addcmul(shift[:, None], scale[:, None], around).relu()
    return torch.matmul(weight, around)


def aggregate_rows(copies: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The equation of :func:`patch_aggregation` for some positions.

    copies: v of all neighbours, (batch, channels, kernel_size², positions); features: (batch,
    features, positions). Returns (batch, channels, positions).
    """
    weights = torch.matmul(weight, features) + bias[:, None]
    weights = weights.unflatten(1, (-1, copies.shape[2]))
    shared = copies.unflatten(1, (-1, weights.shape[1]))
    return (shared * weights[:, None]).sum(3).flatten(1, 2)


Equation = Callable[..., Tensor]


def whole_map(equation: Equation, kernel_size: int, neighbours: Tensor, own: Tensor,
              *parameters: Tensor) -> Tensor:
    """Copy every neighbourhood of the map and follow the equation once: the reference form."""
    padded = reflection_pad(neighbours, kernel_size // 2)
    return on_rows(equation, kernel_size, padded, own, *parameters)


def by_kernel_row(equation: Equation, kernel_size: int, neighbours: Tensor, own: Tensor,
                  *parameters: Tensor) -> Tensor:
    """Follow the equation for one row of all neighbourhoods at a time, and sum.

    This is for an equation that is a sum over neighbours, with parameters (groups · kernel_size²,
    …), and written in torch's own operations.
    """
    height, width = own.shape[2:]
    padded = reflection_pad(neighbours, kernel_size // 2)
    across = torch.stack([padded[..., column:column + width] for column in range(kernel_size)], 2)
    rows = [each.unflatten(0, (-1, kernel_size, kernel_size)).unbind(1) for each in parameters]
    own = own.flatten(2)
    out = sum(equation(across[..., row:row + height, :].flatten(3), own,
                       *(each.flatten(0, 1) for each in parameters_of_row))
              for row, parameters_of_row in enumerate(zip(*rows)))
    return out.unflatten(2, (height, width))


def row_by_row(equation: Equation, kernel_size: int, neighbours: Tensor, own: Tensor,
               *parameters: Tensor) -> Tensor:
    """Follow the equation for some rows at a time, and again in the backward pass.

    Nothing is kept but the maps: copies live only as long as their rows.
    """
    padded = reflection_pad(neighbours, kernel_size // 2)
    tensors = (each.to(padded.dtype) for each in (own, *parameters))
    return _RowByRow.apply(equation, kernel_size, padded, *tensors)


class _RowByRow(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, equation: Equation, kernel_size: int, padded: Tensor, own: Tensor,
                *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(padded, own, *parameters)
        ctx.equation, ctx.kernel_size = equation, kernel_size
        parts = [on_rows(equation, kernel_size, padded[:, :, around], own[:, :, rows], *parameters)
                 for rows, around in row_slices(padded, own, kernel_size)]
        return torch.cat(parts, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        padded, own, *parameters = ctx.saved_tensors
        precise = torch.promote_types(padded.dtype, torch.float32)
        grad_padded = torch.zeros_like(padded, dtype=precise)
        grad_own = torch.empty_like(own)
        grad_parameters = [torch.zeros_like(each, dtype=precise) for each in parameters]
        for rows, around in row_slices(padded, own, ctx.kernel_size):
            leaves = [each.detach().requires_grad_()
                      for each in (padded[:, :, around], own[:, :, rows], *parameters)]
            with torch.enable_grad():
                out = on_rows(ctx.equation, ctx.kernel_size, *leaves)
            grads = torch.autograd.grad(out, leaves, grad_out[:, :, rows])
            grad_padded[:, :, around] += grads[0]
            grad_own[:, :, rows] = grads[1]
            for total, grad in zip(grad_parameters, grads[2:]):
                total += grad
        grad_parameters = [each.to(padded.dtype) for each in grad_parameters]
        return None, None, grad_padded.to(padded.dtype), grad_own, *grad_parameters


def on_rows(equation: Equation, kernel_size: int, padded: Tensor, own: Tensor,
            *parameters: Tensor) -> Tensor:
    """Copy the neighbourhoods of the rows of ``own`` out of ``padded`` and follow the equation."""
    copies = F.unfold(padded, kernel_size).unflatten(1, (padded.shape[1], -1))
    return equation(copies, own.flatten(2), *parameters).unflatten(2, own.shape[2:])


def row_slices(padded: Tensor, own: Tensor, kernel_size: int) -> Iterator[tuple[slice, slice]]:
    """The rows to work on at a time, and the padded rows that their neighbourhoods reach."""
    batch, height, width = own.shape[0], *own.shape[2:]
    copied = batch * padded.shape[1] * kernel_size**2 * width
    step = max(COPIED_AT_ONCE // copied, 1)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        yield slice(top, bottom), slice(top, bottom + kernel_size - 1)


register_backends('patch_features', Backend('reference', whole_map), Backend('chunked', row_by_row))
register_backends('patch_aggregation', Backend('reference', whole_map),
                  Backend('chunked', row_by_row), Backend('kernel_rows', by_kernel_row))
