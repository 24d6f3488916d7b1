"""Sliding-window attention by Triton kernels for NVIDIA GPUs: tiled, with a streamed softmax."""

import inspect
from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable, differentiable_gradients
from acmix_mm.ops.backend import require_triton, run_kernels, runs_triton
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.sliding_attention.tiled import (
    attend_tiled,
    attend_tiled_backward,
    positions_gradient,
)


def sliding_attention_triton(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                             dilation: int, scale: float) -> Tensor:
    require_triton('sliding_window_attention', qkv)
    if not has_kernel(qkv, stride, dilation):
        raise ValueError("sliding_window_attention's backend 'triton' takes stride or dilation, "
                         'not both, and heads of 512 bytes at most; got '
                         f'stride={stride}, dilation={dilation} and {qkv.shape[5]} channels of '
                         f'{qkv.dtype}. Leave out backend to have one chosen.')
    return _attend(qkv, positions, kernel_size, stride, dilation, scale)[0]


def has_kernel(qkv: Tensor, stride: int, dilation: int) -> bool:
    """Whether the Triton kernels support these arguments and run on their device."""
    if not runs_triton(qkv) or (stride > 1 and dilation > 1):
        return False
    from acmix_mm.ops.sliding_attention.triton_kernels import fits
    return fits(qkv.shape[5], qkv.dtype)


def _empty_output(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                  scale: float) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty(qkv[:, ::stride, ::stride, 0].shape)
    return out, out.new_empty(out.shape[:4], dtype=torch.float32)


@custom_op(_empty_output)
def attend_triton(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                  scale: float) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sums, (batch, out height, out width, num_heads)."""
    geometry = kernel_size, stride, dilation, scale

    def kernels() -> tuple[Tensor, Tensor]:
        from acmix_mm.ops.sliding_attention.triton_kernels import attend
        out, log_sum = _empty_output(qkv, positions, *geometry)
        with torch.cuda.device_of(qkv):
            attend(qkv, positions, out, log_sum, *geometry)
        return out, log_sum

    def torch_backend() -> tuple[Tensor, Tensor]:
        out = attend_tiled(qkv, positions, *geometry)
        return out, out.new_zeros(out.shape[:4], dtype=torch.float32)

    return run_kernels('sliding_window_attention', kernels, torch_backend)


@custom_op(lambda grad_out, qkv, *others: torch.empty_like(qkv))
def attend_triton_backward(grad_out: Tensor, qkv: Tensor, positions: Tensor, out: Tensor,
                           log_sum: Tensor, kernel_size: int, stride: int, dilation: int,
                           scale: float) -> Tensor:
    geometry = kernel_size, stride, dilation, scale

    def kernels() -> Tensor:
        from acmix_mm.ops.sliding_attention.triton_kernels import attend_backward
        grad_qkv = torch.empty_like(qkv)
        with torch.cuda.device_of(qkv):
            attend_backward(grad_out, qkv, positions, out, log_sum, grad_qkv, *geometry)
        return grad_qkv

    return run_kernels('sliding_window_attention', kernels,
                       lambda: attend_tiled_backward(grad_out, qkv, positions, *geometry)[0])


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, positions, *ctx.geometry = inputs
    ctx.save_for_backward(qkv, positions, *output)
    # Nor are zeros made for that of the log-sums.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor, _: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    """The gradients; the log-sums are for the backward pass only."""
    qkv, positions = ctx.saved_tensors[:2]
    if creates_graph():
        return differentiable_gradients(inspect.unwrap(attend_tiled), grad_out, qkv, positions,
                                        *ctx.geometry)
    grad_qkv = attend_triton_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
    return grad_qkv, positions_gradient(grad_qkv, positions.dtype), *[None] * len(ctx.geometry)


_attend = differentiable(attend_triton, _setup_context, _gradients)
