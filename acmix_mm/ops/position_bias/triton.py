"""position_bias with a Triton kernel for its gradient, for NVIDIA GPUs.

Torch would sort all pairs of positions by their row of the table.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable
from acmix_mm.ops.backend import require_triton, run_kernels
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.position_bias.reference import position_bias_gradient, position_bias_reference


def position_bias_triton(table: Tensor, index: Tensor, window_size: list[int]) -> Tensor:
    require_triton('position_bias', table)
    return _read(table, index, window_size)


def _empty_bias(table: Tensor, index: Tensor, window_size: list[int]) -> Tensor:
    area = window_size[0] * window_size[1]
    return table.new_empty(area, area, table.shape[1]).permute(2, 0, 1)


@custom_op(_empty_bias)
def read_position_bias(table: Tensor, index: Tensor, window_size: list[int]) -> Tensor:
    return position_bias_reference(table, index, window_size)


@custom_op(lambda grad, table, *others: table.new_empty(table.shape))
def read_position_bias_backward(grad: Tensor, table: Tensor, index: Tensor,
                                window_size: list[int]) -> Tensor:
    def kernels() -> Tensor:
        from acmix_mm.ops.position_bias.triton_kernels import sum_offsets
        grad_table = table.new_empty(table.shape)
        with torch.cuda.device_of(grad):
            sum_offsets(grad, grad_table, window_size)
        return grad_table

    return run_kernels('position_bias', kernels,
                       lambda: position_bias_gradient(grad, table, index, window_size))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    table, index, ctx.window_size = inputs
    ctx.save_for_backward(table, index)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
    table, index = ctx.saved_tensors
    run = position_bias_gradient if creates_graph() else read_position_bias_backward
    return run(grad, table, index, ctx.window_size), None, None


_read = differentiable(read_position_bias, _setup_context, _gradients)
