"""Window attention by Triton kernels for NVIDIA GPUs, which pad and roll the map in place."""

import inspect
from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable, differentiable_gradients
from acmix_mm.ops.backend import require_triton, run_kernels, runs_triton
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.window_attention.chunked import attend_windows, attend_windows_backward
from acmix_mm.ops.window_attention.padding import roll


def window_attention_triton(qkv: Tensor, bias: Tensor, padding: Optional[Tensor],
                            window_size: tuple[int, int], shift_size: int, is_rolled: bool,
                            scale: float, dropout_p: float) -> Tensor:
    require_triton('window_attention', qkv)
    if dropout_p:
        raise ValueError("window_attention's backend 'triton' has no dropout, got "
                         f"dropout_p={dropout_p}; use 'sdpa'.")
    if not has_kernel(qkv, window_size, qkv.shape[5]):
        raise ValueError(
            f"window_attention's backend 'triton' does not take windows of {window_size[0]}×"
            f'{window_size[1]} with {qkv.shape[5]} channels of {qkv.dtype} per head. Leave out '
            'backend to have one chosen.')
    is_padded = padding is None
    if padding is None:
        padding = qkv.new_zeros(qkv.shape[3:])
    return _attend(qkv, bias, padding, list(window_size), shift_size, is_rolled, is_padded, scale)


def has_kernel(x: Tensor, window_size: tuple[int, int], head_dims: int) -> bool:
    """Whether the Triton kernels support these windows and heads, in a tensor's dtype, and run on
    its device.
    """
    if not runs_triton(x):
        return False
    from acmix_mm.ops.window_attention.triton_kernels import fits
    return fits(window_size, head_dims, x.dtype)


@custom_op(lambda qkv, *others: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]))
def attend_windows_triton(qkv: Tensor, bias: Tensor, padding: Tensor, window_size: list[int],
                          shift_size: int, is_rolled: bool, is_padded: bool,
                          scale: float) -> Tensor:
    geometry = window_size, shift_size, is_rolled, is_padded, scale

    def kernels() -> Tensor:
        from acmix_mm.ops.window_attention.triton_kernels import attend
        out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
        with torch.cuda.device_of(qkv):
            attend(qkv.contiguous(), bias, padding.contiguous(), out, *geometry)
        return out

    return run_kernels('window_attention', kernels,
                       lambda: _attend_in_torch(qkv, bias, padding, *geometry).contiguous())


@custom_op(lambda grad_out, qkv, bias, padding, *others: (
    qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), padding.new_empty(padding.shape)))
def attend_windows_triton_backward(
        grad_out: Tensor, qkv: Tensor, bias: Tensor, padding: Tensor, window_size: list[int],
        shift_size: int, is_rolled: bool, is_padded: bool,
        scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``qkv``, ``bias`` and ``padding``."""
    geometry = window_size, shift_size, is_rolled, is_padded, scale

    def kernels() -> tuple[Tensor, Tensor, Tensor]:
        from acmix_mm.ops.window_attention.triton_kernels import attend_backward
        with torch.cuda.device_of(qkv):
            grad_qkv, grad_bias, grad_padding = attend_backward(
                grad_out.contiguous(), qkv.contiguous(), bias, padding.contiguous(), *geometry)
        return grad_qkv, grad_bias.to(bias.dtype), grad_padding.to(padding.dtype)

    return run_kernels('window_attention', kernels, lambda: _gradients_in_torch(
        grad_out, qkv, bias, padding, *geometry))


def _attend_in_torch(qkv: Tensor, bias: Tensor, padding: Tensor, window_size: list[int],
                     shift_size: int, is_rolled: bool, is_padded: bool, scale: float) -> Tensor:
    """The same attention, in operations whose gradients can be differentiated."""
    shift = 0 if is_rolled else shift_size
    out = inspect.unwrap(attend_windows)(
        roll(qkv, -shift), bias.to(qkv.dtype), padding.to(qkv.dtype), window_size, shift_size,
        scale)
    return roll(out, shift)


def _gradients_in_torch(grad_out: Tensor, qkv: Tensor, bias: Tensor, padding: Tensor,
                        window_size: list[int], shift_size: int, is_rolled: bool,
                        is_padded: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    shift = 0 if is_rolled else shift_size
    grad_qkv, grad_bias, grad_padding = inspect.unwrap(attend_windows_backward)(
        roll(grad_out, -shift), roll(qkv, -shift), bias.to(qkv.dtype), padding.to(qkv.dtype),
        window_size, shift_size, scale)
    return (roll(grad_qkv, shift).contiguous(), grad_bias.to(bias.dtype),
            grad_padding.to(padding.dtype))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    qkv, bias, padding, *ctx.geometry = inputs
    ctx.save_for_backward(qkv, bias, padding)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
    arguments = *ctx.saved_tensors, *ctx.geometry
    if creates_graph():
        return differentiable_gradients(_attend_in_torch, grad_out, *arguments)
    grads = attend_windows_triton_backward(grad_out, *arguments)
    return *grads, *[None] * len(ctx.geometry)


_attend = differentiable(attend_windows_triton, _setup_context, _gradients)
