"""position_encoding by Triton kernels for NVIDIA GPUs."""

from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable
from acmix_mm.ops.backend import require_triton, run_kernels
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.position_encoding.reference import (
    position_encoding_gradients,
    position_encoding_reference,
)


def position_encoding_triton(weight: Tensor, bias: Tensor, height: int, width: int,
                             dtype: torch.dtype) -> Tensor:
    require_triton('position_encoding', weight)
    return _encode(weight, bias, height, width)


def _empty_encoding(weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return weight.new_empty(height, width, len(bias), dtype=torch.float32)


@custom_op(_empty_encoding)
def encode_positions(weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    out = _empty_encoding(weight, bias, height, width)

    def kernels() -> Tensor:
        from acmix_mm.ops.position_encoding.triton_kernels import encode
        with torch.cuda.device_of(weight):
            encode(weight.contiguous(), bias.contiguous(), out)
        return out

    return run_kernels('position_encoding', kernels, lambda: position_encoding_reference(
        weight, bias, height, width, torch.float32))


@custom_op(lambda grad, weight, bias: (weight.new_empty(weight.shape), bias.new_empty(bias.shape)))
def encode_positions_backward(grad: Tensor, weight: Tensor,
                              bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``weight`` and ``bias``, whose values are not read."""
    grads = weight.new_empty(weight.shape), bias.new_empty(bias.shape)

    def kernels() -> tuple[Tensor, Tensor]:
        from acmix_mm.ops.position_encoding.triton_kernels import encode_backward
        with torch.cuda.device_of(grad):
            encode_backward(grad.contiguous(), *grads)
        return grads

    def torch_backend() -> tuple[Tensor, Tensor]:
        for empty, each in zip(grads, position_encoding_gradients(grad)):
            empty.copy_(each)
        return grads

    return run_kernels('position_encoding', kernels, torch_backend)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
    weight, bias = ctx.saved_tensors
    if creates_graph():
        of_weight, of_bias = position_encoding_gradients(grad)
        grads = of_weight.to(weight.dtype), of_bias.to(bias.dtype)
    else:
        grads = encode_positions_backward(grad, weight, bias)
    return *grads, None, None


_encode = differentiable(encode_positions, _setup_context, _gradients)
