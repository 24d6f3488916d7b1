"""Differentiable functions that save only their inputs for the backward pass."""

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def recomputing(run: Callable[..., Tensor],
                run_backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Make a differentiable function of a forward and a backward pass.

    Args:
        run: takes tensors, then other arguments; returns a tensor.
        run_backward: takes the gradient of the output and the arguments of ``run``; returns the
            gradient of each tensor.
    """
    class Recomputing(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            tensors = [each for each in arguments if isinstance(each, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.others = arguments[len(tensors):]
            return run(*arguments)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
            grads = run_backward(grad_out, *ctx.saved_tensors, *ctx.others)
            return (*grads, *[None] * len(ctx.others))

    return Recomputing.apply
