"""Involution as a sum over the offsets of the neighbourhood, for a chunk of rows at a time.

It makes no copies of neighbourhoods and saves only its inputs for the backward pass.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from acmix_mm.ops.autograd import recomputing
from acmix_mm.ops.custom_op import custom_op

# Elements of the output in a chunk. On a CPU, a chunk stays in the cache.
CPU_CHUNK = 2**18
GPU_CHUNK = 2**26


def _empty_output(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    return torch.empty_like(x[:, :, ::stride, ::stride])


@custom_op(_empty_output)
def involve_chunked(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    kernel_size, width = kernels.shape[3], kernels.shape[5]
    out = _empty_output(x, kernels, stride, dilation)
    maps = _pad_groups(x, kernels, dilation)
    for rows in _chunks(out):
        weights = kernels[..., rows, :].to(maps.dtype).contiguous()
        total: Any = 0
        for down, across in itertools.product(range(kernel_size), repeat=2):
            shifted = _shifted(maps, rows, width, dilation * down, dilation * across, stride)
            weight = weights[:, :, None, down, across]
            total = total.addcmul_(weight, shifted) if down or across else weight * shifted
        out[:, :, rows] = total.flatten(1, 2)
    return out


@custom_op(lambda grad_out, x, kernels, *geometry: (torch.empty_like(x), torch.empty_like(kernels)))
def involve_chunked_backward(grad_out: Tensor, x: Tensor, kernels: Tensor, stride: int,
                             dilation: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``kernels``."""
    groups, kernel_size, width = kernels.shape[1], kernels.shape[3], kernels.shape[5]
    maps = _pad_groups(x, kernels, dilation)
    # Up to k² outputs add to one position, too many for a sum in half precision.
    grad_maps = torch.zeros_like(maps)
    grad_kernels = torch.empty_like(kernels)
    for rows in _chunks(grad_out):
        weights = kernels[..., rows, :].to(maps.dtype).contiguous()
        grad_weights = torch.empty_like(weights)
        grad = grad_out[:, :, rows].to(maps.dtype).contiguous().unflatten(1, (groups, -1))
        for down, across in itertools.product(range(kernel_size), repeat=2):
            where = rows, width, dilation * down, dilation * across, stride
            grad_weights[:, :, down, across] = (grad * _shifted(maps, *where)).sum(2)
            _shifted(grad_maps, *where).addcmul_(weights[:, :, None, down, across], grad)
        grad_kernels[..., rows, :] = grad_weights
    reach = dilation * (kernel_size // 2)
    inner = grad_maps[..., reach:reach + x.shape[2], reach:reach + x.shape[3]].flatten(1, 2)
    return torch.empty_like(x).copy_(inner), grad_kernels


involution_chunked = recomputing(involve_chunked, involve_chunked_backward)


def _pad_groups(x: Tensor, kernels: Tensor, dilation: int) -> Tensor:
    """Pad ``x`` with zeros: (batch, groups, channels of a group, padded height, padded width).

    The result is contiguous and in float32 or higher precision.
    """
    reach = dilation * (kernels.shape[2] // 2)
    batch, channels, height, width = x.shape
    padded = x.new_zeros(batch, channels, height + 2 * reach, width + 2 * reach,
                         dtype=torch.promote_types(x.dtype, torch.float32))
    padded[:, :, reach:reach + height, reach:reach + width] = x
    return padded.unflatten(1, (kernels.shape[1], -1))


def _shifted(maps: Tensor, rows: slice, width: int, down: int, across: int, stride: int) -> Tensor:
    """A view of the inputs of some output rows at one offset of the neighbourhood.

    Args:
        maps: padded maps, from :func:`_pad_groups`.
        rows: rows of the output.
        width: width of the output.
        down: vertical offset from the first neighbour.
        across: horizontal offset from the first neighbour.
        stride: distance between the positions of the output.
    """
    top, bottom = down + stride * rows.start, down + stride * (rows.stop - 1)
    return maps[..., top:bottom + 1:stride, across:across + stride * (width - 1) + 1:stride]


def _chunks(out: Tensor) -> Iterator[slice]:
    """Divide the rows of an output into chunks."""
    size = CPU_CHUNK if out.device.type == 'cpu' else GPU_CHUNK
    height = out.shape[2]
    step = max(size // max(out[:, :, 0].numel(), 1), 1)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))
