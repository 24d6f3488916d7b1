"""Involution: every position has a kernel of its own, shared by the channels of a group.

Paper: arXiv 2103.06255, section 3.1, equation 4, and algorithm 1 for stride and dilation. This is
the operator between convolution, whose kernel is the same at every position and differs between
channels, and attention, whose weights come of comparing positions.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.custom_op import custom_op

# Elements of the output that are summed at a time, in whole rows: on a CPU what its cache holds.
SUMMED_AT_ONCE = 2**18
SUMMED_AT_ONCE_ELSEWHERE = 2**26


def involution(x: Tensor, kernels: Tensor, *, stride: int = 1, dilation: int = 1,
               backend: Optional[str] = None) -> Tensor:
    """Weigh the neighbourhood of every stride-th position with that position's own kernel.

    out[c, i] = Σ_j kernels[group of c, j, i] · x[c, stride · i + dilation · (j − ⌊k / 2⌋)], j over
    a k × k neighbourhood; beyond the edges of the map x is zero. Channels of a group
    are neighbours: channel c is of group ⌊c · groups / channels⌋.

    Args:
        x: (batch, channels, height, width), any floating dtype and strides.
        kernels: (batch, groups, k, k, ⌈height / stride⌉, ⌈width / stride⌉), groups dividing the
            channels and k odd; cast to the dtype of ``x``.
        stride: distance of the positions that give an output; the others are left out.
        dilation: distance of neighbours.
        backend: ``'reference'`` or ``'chunked'``; the latter if None.

    Returns:
        (batch, channels, ⌈height / stride⌉, ⌈width / stride⌉), in the dtype and the memory format
        of ``x``.

    Raises:
        ValueError: the shapes do not fit together, the kernels are even, or no such
            backend exists.
    """
    if x.dim() != 4:
        raise ValueError('involution takes x of shape (batch, channels, height, width), got '
                         f'{tuple(x.shape)}.')
    batch, channels, height, width = x.shape
    size = tuple((extent + stride - 1) // stride for extent in (height, width))
    if kernels.dim() != 6 or kernels.shape[2] != kernels.shape[3] or (
            (kernels.shape[0], *kernels.shape[4:]) != (batch, *size)) or (
            not kernels.shape[1] or channels % kernels.shape[1]):
        raise ValueError(f'This map needs kernels of shape ({batch}, groups, k, k, {size[0]}, '
                         f'{size[1]}), groups dividing {channels}, got {tuple(kernels.shape)}.')
    if kernels.shape[2] % 2 == 0:
        raise ValueError(f'involution takes odd kernels, got some of {kernels.shape[2]}.')
    run = select_backend('involution', backend, x.device, automatic='chunked',
                         exporting='reference')
    return run(x, kernels.to(x.dtype), stride, dilation)


def involution_reference(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    """Copy every neighbourhood, multiply and sum; see :func:`involution`.

    This is the form of the paper's algorithm 1: it holds k² times the map.
    """
    groups, kernel_size, size = kernels.shape[1], kernels.shape[2], kernels.shape[4:]
    copies = F.unfold(x, kernel_size, dilation=dilation, padding=dilation * (kernel_size // 2),
                      stride=stride)
    copies = copies.view(x.shape[0], groups, -1, kernel_size**2, *size)
    return (kernels.flatten(2, 3).unsqueeze(2) * copies).sum(3).flatten(1, 2)


def involution_by_offset(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    """Add up one offset of the neighbourhood after the other, some rows of the map at a time.

    Nothing is copied for each neighbour, and nothing is kept but the inputs.
    """
    return _ByOffset.apply(x, kernels, stride, dilation)


class _ByOffset(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor, *geometry: int) -> Tensor:
        ctx.save_for_backward(x, kernels)
        ctx.geometry = geometry
        return involve_by_offset(x, kernels, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grads = involve_by_offset_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        return *grads, None, None


def _empty_involved(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    return torch.empty_like(x[:, :, ::stride, ::stride])


@custom_op(_empty_involved)
def involve_by_offset(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    kernel_size, width = kernels.shape[3], kernels.shape[5]
    out = _empty_involved(x, kernels, stride, dilation)
    maps = pad_groups(x, kernels, dilation)
    for rows in row_slices(out):
        weights = kernels[..., rows, :].to(maps.dtype).contiguous()
        total = 0
        for down, across in itertools.product(range(kernel_size), repeat=2):
            seen = shifted(maps, rows, width, dilation * down, dilation * across, stride)
            weight = weights[:, :, None, down, across]
            total = total.addcmul_(weight, seen) if down or across else weight * seen
        out[:, :, rows] = total.flatten(1, 2)
    return out


@custom_op(lambda grad_out, x, kernels, *geometry: (torch.empty_like(x), torch.empty_like(kernels)))
def involve_by_offset_backward(grad_out: Tensor, x: Tensor, kernels: Tensor, stride: int,
                               dilation: int) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``kernels``."""
    groups, kernel_size, width = kernels.shape[1], kernels.shape[3], kernels.shape[5]
    maps = pad_groups(x, kernels, dilation)
    # Up to k² outputs add to one position: half precision would not do.
    grad_maps = torch.zeros_like(maps)
    grad_kernels = torch.empty_like(kernels)
    for rows in row_slices(grad_out):
        weights = kernels[..., rows, :].to(maps.dtype).contiguous()
        grad_weights = torch.empty_like(weights)
        grad = grad_out[:, :, rows].to(maps.dtype).contiguous().unflatten(1, (groups, -1))
        for down, across in itertools.product(range(kernel_size), repeat=2):
            where = rows, width, dilation * down, dilation * across, stride
            grad_weights[:, :, down, across] = (grad * shifted(maps, *where)).sum(2)
            shifted(grad_maps, *where).addcmul_(weights[:, :, None, down, across], grad)
        grad_kernels[..., rows, :] = grad_weights
    reach = dilation * (kernel_size // 2)
    inner = grad_maps[..., reach:reach + x.shape[2], reach:reach + x.shape[3]].flatten(1, 2)
    return torch.empty_like(x).copy_(inner), grad_kernels


def pad_groups(x: Tensor, kernels: Tensor, dilation: int) -> Tensor:
    """``x`` with zeros around it, contiguous and in float32 at least.

    Returns:
        (batch, groups, channels of a group, padded height, padded width).
    """
    reach = dilation * (kernels.shape[2] // 2)
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, channels, height + 2 * reach, width + 2 * reach,
                         dtype=torch.promote_types(x.dtype, torch.float32))
    padded[:, :, reach:reach + height, reach:reach + width] = x
    return padded.unflatten(1, (kernels.shape[1], -1))


def shifted(maps: Tensor, rows: slice, width: int, down: int, across: int, stride: int) -> Tensor:
    """A view of what some rows of outputs see at one offset.

    Args:
        maps: of :func:`pad_groups`.
        rows: of the outputs.
        width: of the outputs.
        down, across: the offset, from the first position that an output sees.
        stride: distance of the outputs.
    """
    top, bottom = down + stride * rows.start, down + stride * (rows.stop - 1)
    return maps[..., top:bottom + 1:stride, across:across + stride * (width - 1) + 1:stride]


def row_slices(out: Tensor) -> Iterator[slice]:
    """The rows of an output to work on at a time."""
    at_once = SUMMED_AT_ONCE if out.device.type == 'cpu' else SUMMED_AT_ONCE_ELSEWHERE
    height = out.shape[2]
    step = max(at_once // max(out[:, :, 0].numel(), 1), 1)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


register_backends('involution', Backend('reference', involution_reference),
                  Backend('chunked', involution_by_offset))
