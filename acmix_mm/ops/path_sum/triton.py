"""add_paths by Triton kernels for NVIDIA GPUs."""

from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable
from acmix_mm.ops.backend import require_triton, run_kernels
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.path_sum.reference import add_paths_gradients, add_paths_reference


def add_paths_triton(convolution: Tensor, attention: Tensor, taps: Optional[Tensor],
                     size: list[int], stride: int, dilation: int, shift_size: int,
                     channels_first: bool) -> Tensor:
    require_triton('add_paths', convolution)
    return _add(convolution, attention, taps, size, stride, dilation, shift_size, channels_first)


def _empty_sum(convolution: Tensor, attention: Tensor, taps: Optional[Tensor], size: list[int],
               stride: int, dilation: int, shift_size: int, channels_first: bool) -> Tensor:
    batch, height, width, channels = convolution.shape
    if channels_first:
        return convolution.new_empty(batch, channels, height, width).permute(0, 2, 3, 1)
    return convolution.new_empty(convolution.shape)


@custom_op(_empty_sum)
def add_paths_kernels(convolution: Tensor, attention: Tensor, taps: Optional[Tensor],
                      size: list[int], stride: int, dilation: int, shift_size: int,
                      channels_first: bool) -> Tensor:
    geometry = size, stride, dilation, shift_size
    out = _empty_sum(convolution, attention, taps, *geometry, channels_first)

    def kernels() -> Tensor:
        from acmix_mm.ops.path_sum.triton_kernels import add
        with torch.cuda.device_of(convolution):
            add(convolution.contiguous(), attention.contiguous(), taps, out, *geometry,
                channels_first)
        return out

    return run_kernels('add_paths', kernels, lambda: out.copy_(
        add_paths_reference(convolution, attention, taps, *geometry, channels_first)))


def _empty_gradients(grad_out: Tensor, taps: Optional[Tensor], size: list[int], stride: int,
                     dilation: int, shift_size: int, copies: bool) -> tuple[Tensor, Tensor]:
    return (grad_out.new_empty(grad_out.shape if copies else 0),
            grad_out.new_empty(0) if taps is None else torch.empty_like(taps))


@custom_op(_empty_gradients)
def add_paths_kernels_backward(grad_out: Tensor, taps: Optional[Tensor], size: list[int],
                               stride: int, dilation: int, shift_size: int,
                               copies: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of each path and of the taps, empty for None.

    The first is a contiguous copy; without ``copies`` it is empty, because it would be
    ``grad_out``.
    """
    geometry = size, stride, dilation, shift_size
    grad, grad_taps = _empty_gradients(grad_out, taps, *geometry, copies)

    def kernels() -> tuple[Tensor, Tensor]:
        from acmix_mm.ops.path_sum.triton_kernels import add_backward
        with torch.cuda.device_of(grad_out):
            add_backward(grad_out, grad if copies else None, None if taps is None else grad_taps,
                         *geometry)
        return grad, grad_taps

    def torch_backend() -> tuple[Tensor, Tensor]:
        found, found_taps = add_paths_gradients(grad_out, taps, *geometry)
        return (grad.copy_(found) if copies else grad,
                grad_taps if found_taps is None else grad_taps.copy_(found_taps))

    return run_kernels('add_paths', kernels, torch_backend)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, taps, *ctx.geometry, _ = inputs
    ctx.save_for_backward(taps)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
    taps, = ctx.saved_tensors
    *_, shift_size = ctx.geometry
    copies = bool(shift_size) or not grad_out.is_contiguous()
    grad, grad_taps = grad_out, None
    if creates_graph():
        # In operations whose gradients can be differentiated.
        grad, grad_taps = add_paths_gradients(grad_out, taps, *ctx.geometry)
    elif copies or taps is not None:
        copied, grad_taps = add_paths_kernels_backward(grad_out, taps, *ctx.geometry, copies)
        grad = copied if copies else grad_out
    return grad, grad, None if taps is None else grad_taps, None, None, None, None, None


_add = differentiable(add_paths_kernels, _setup_context, _gradients)
