"""roll_map by a Triton kernel for NVIDIA GPUs."""

from typing import Any

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable
from acmix_mm.ops.backend import require_triton, run_kernels
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.rolling.reference import roll_map_reference


def roll_map_triton(x: Tensor, shift_size: int, dtype: torch.dtype) -> Tensor:
    require_triton('roll_map', x)
    return _roll(x, shift_size, dtype)


@custom_op(lambda x, shift_size, dtype: x.new_empty(x.shape, dtype=dtype))
def roll_map_kernel(x: Tensor, shift_size: int, dtype: torch.dtype) -> Tensor:
    out = x.new_empty(x.shape, dtype=dtype)

    def kernels() -> Tensor:
        from acmix_mm.ops.rolling.triton_kernels import roll
        with torch.cuda.device_of(x):
            roll(x.contiguous(), out, shift_size)
        return out

    return run_kernels('roll_map', kernels,
                       lambda: out.copy_(roll_map_reference(x, shift_size, dtype)))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.shift_size, _ = inputs
    ctx.dtype = x.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    run = roll_map_reference if creates_graph() else roll_map_kernel
    return run(grad, -ctx.shift_size, ctx.dtype), None, None


_roll = differentiable(roll_map_kernel, _setup_context, _gradients)
