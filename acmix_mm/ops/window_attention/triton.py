"""Window attention by Triton kernels for NVIDIA GPUs, which pad and roll the map in place."""

import inspect
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable, differentiable_gradients
from acmix_mm.ops.backend import require_triton, run_kernels, runs_triton
from acmix_mm.ops.caching import is_compiling
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.linear import product_gradients
from acmix_mm.ops.window_attention.chunked import attend_windows, attend_windows_backward
from acmix_mm.ops.window_attention.padding import padding_of, padding_values, roll


def window_attention_triton(qkv: Tensor, bias: Tensor, padding: Optional[Tensor],
                            window_size: tuple[int, int], shift_size: int, is_rolled: bool,
                            scale: float, dropout_p: float) -> Tensor:
    if dropout_p:
        raise ValueError("window_attention's backend 'triton' has no dropout, got "
                         f"dropout_p={dropout_p}; use 'sdpa'.")
    _check(qkv, window_size)
    is_padded = padding is None
    if padding is None:
        padding = qkv.new_zeros(qkv.shape[3:])
    return _attend(qkv, bias, padding, list(window_size), shift_size, is_rolled, is_padded,
                   scale)[0]


def attend_projections_triton(x: Tensor, weight: Tensor, bias: Optional[Tensor], qkv: Tensor,
                              position_bias: Tensor, padding: Tensor, window_size: tuple[int, int],
                              shift_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attend in a map that was projected to ``qkv``; return the output, and ``x`` to be read by
    others. See :func:`acmix_mm.ops.window_attention.projected_window_attention`.
    """
    _check(qkv, window_size)
    geometry = list(window_size), shift_size, True, False, scale
    if is_compiling():
        return _attend(qkv, position_bias, padding, *geometry)[0], x
    return _AttendProjections.apply(x, weight, bias, qkv.detach(), position_bias, padding.detach(),
                                    *geometry)


def _check(qkv: Tensor, window_size: tuple[int, int]) -> None:
    require_triton('window_attention', qkv)
    if not has_kernel(qkv, window_size, qkv.shape[5]):
        raise ValueError(
            f"window_attention's backend 'triton' does not take windows of {window_size[0]}×"
            f'{window_size[1]} with {qkv.shape[5]} channels of {qkv.dtype} per head. Leave out '
            'backend to have one chosen.')


def has_kernel(x: Tensor, window_size: tuple[int, int], head_dims: int) -> bool:
    """Whether the Triton kernels support these windows and heads, in a tensor's dtype, and run on
    its device.
    """
    if not runs_triton(x):
        return False
    from acmix_mm.ops.window_attention.triton_kernels import fits
    return fits(window_size, head_dims, x.dtype)


def _empty_output(qkv: Tensor, bias: Tensor, padding: Tensor, window_size: list[int],
                  shift_size: int, is_rolled: bool, is_padded: bool,
                  scale: float) -> tuple[Tensor, Tensor]:
    from acmix_mm.ops.window_attention.triton_kernels import shape_of_biases
    return (qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]),
            qkv.new_empty(shape_of_biases(len(bias), window_size, shift_size),
                          dtype=torch.float32))


@custom_op(_empty_output)
def attend_windows_triton(qkv: Tensor, bias: Tensor, padding: Tensor, window_size: list[int],
                          shift_size: int, is_rolled: bool, is_padded: bool,
                          scale: float) -> tuple[Tensor, Tensor]:
    """Return the output, and the biases and masks in the tiles that the kernels read."""
    geometry = window_size, shift_size, is_rolled, is_padded, scale
    out, biases = _empty_output(qkv, bias, padding, *geometry)

    def kernels() -> tuple[Tensor, Tensor]:
        from acmix_mm.ops.window_attention.triton_kernels import attend, fill_biases
        with torch.cuda.device_of(qkv):
            fill_biases(bias, biases, window_size, shift_size)
            attend(qkv.contiguous(), biases, padding.contiguous(), out, *geometry)
        return out, biases

    def torch_backend() -> tuple[Tensor, Tensor]:
        return out.copy_(_attend_in_torch(qkv, bias, padding, *geometry)), biases

    return run_kernels('window_attention', kernels, torch_backend)


def _empty_gradients(grad_out: Tensor, qkv: Tensor, bias: Tensor, padding: Tensor, biases: Tensor,
                     window_size: list[int], shift_size: int, is_rolled: bool, is_padded: bool,
                     scale: float) -> tuple[Tensor, Tensor]:
    batch, height, width = qkv.shape[:3]
    bottom, right = padding_of((height, width), window_size)
    positions = batch * (height + bottom) * (width + right)
    return qkv.new_empty(positions, *padding.shape), bias.new_empty(bias.shape)


@custom_op(_empty_gradients)
def attend_windows_triton_backward(
        grad_out: Tensor, qkv: Tensor, bias: Tensor, padding: Tensor, biases: Tensor,
        window_size: list[int], shift_size: int, is_rolled: bool, is_padded: bool,
        scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of all positions, those of ``qkv`` first, and of ``bias``.

    The gradients of positions outside of the map, (positions, 3, num_heads, head_dims), add up to
    that of ``padding``. ``biases`` are those that :func:`attend_windows_triton` returns.
    """
    geometry = window_size, shift_size, is_rolled, is_padded, scale

    def kernels() -> tuple[Tensor, Tensor]:
        from acmix_mm.ops.window_attention.triton_kernels import attend_backward
        with torch.cuda.device_of(qkv):
            grads, grad_bias = attend_backward(
                grad_out.contiguous(), qkv.contiguous(), biases, padding.contiguous(), *geometry)
        return grads, grad_bias.to(bias.dtype)

    def torch_backend() -> tuple[Tensor, Tensor]:
        grads, _ = _empty_gradients(grad_out, qkv, bias, padding, biases, *geometry)
        grad_qkv, grad_bias, grad_padding = _gradients_in_torch(grad_out, qkv, bias, padding,
                                                                *geometry)
        positions = qkv.shape[:3].numel()
        grads[:positions] = grad_qkv.flatten(0, 2)
        # There is no position outside, or the first one stands for all.
        grads[positions:] = 0
        grads[positions:positions + 1] = grad_padding
        return grads, grad_bias

    return run_kernels('window_attention', kernels, torch_backend)


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
    return roll(grad_qkv, shift), grad_bias.to(bias.dtype), grad_padding


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, padding, *ctx.geometry = inputs
    ctx.save_for_backward(qkv, bias, padding, output[1])
    # Nor are zeros made for that of the biases in tiles.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor, _: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    """The gradients; the biases in tiles are for the backward pass only."""
    *inputs, biases = ctx.saved_tensors
    if creates_graph():
        return differentiable_gradients(_attend_in_torch, grad_out, *inputs, *ctx.geometry)
    grads, grad_bias = attend_windows_triton_backward(grad_out, *inputs, biases, *ctx.geometry)
    qkv, _, padding = inputs
    grad_qkv, outside = grads.tensor_split([qkv.shape[:3].numel()])
    return (grad_qkv.view(qkv.shape), grad_bias, outside.sum(0, dtype=padding.dtype),
            *[None] * len(ctx.geometry))


class _AttendProjections(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], qkv: Tensor,
                position_bias: Tensor, padding: Tensor,
                *geometry: Any) -> tuple[Tensor, Tensor]:
        out, biases = attend_windows_triton(qkv, position_bias, padding, *geometry)
        ctx.save_for_backward(x, weight, bias, qkv, position_bias, padding, biases)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return out, x

    @staticmethod
    def backward(ctx: Any, grad_out: Optional[Tensor],
                 grad_x: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        x, weight, bias, qkv, position_bias, padding, biases = ctx.saved_tensors
        others = [None] * (1 + len(ctx.geometry))
        if grad_out is None:
            return grad_x, None, None, None, None, *others
        if creates_graph():
            grad, *grads = differentiable_gradients(
                _attend_projections_in_torch, grad_out, x, weight, bias, position_bias,
                *ctx.geometry)
            grad_x = grad if grad is None or grad_x is None else grad + grad_x
            return grad_x, grads[0], grads[1], None, grads[2], *others
        rows, grad_bias = attend_windows_triton_backward(grad_out, qkv, position_bias, padding,
                                                         biases, *ctx.geometry)
        # Under autocast, the product may have been in another dtype.
        rows = rows.flatten(1).to(x.dtype)
        # The bias of the projections is that of positions outside of the map, too.
        grad_of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return (*product_gradients(rows[:qkv.shape[:3].numel()], x, weight, grad_x,
                                   ctx.needs_input_grad[:2]),
                grad_of_bias, None, grad_bias, *others)


def _attend_projections_in_torch(x: Tensor, weight: Tensor, bias: Optional[Tensor],
                                 position_bias: Tensor, *geometry: Any) -> Tensor:
    """The same as attend_projections_triton, in operations whose gradients can be differentiated.
    """
    qkv = F.linear(x, weight, bias).unflatten(3, (3, len(position_bias), -1))
    return _attend_in_torch(qkv, position_bias, padding_values(qkv, bias), *geometry)


_attend = differentiable(attend_windows_triton, _setup_context, _gradients)
