"""compose_paths by Triton kernels for NVIDIA GPUs."""

import functools
from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable, differentiable_gradients
from acmix_mm.ops.backend import require_triton, run_kernels
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.path_weights.gradients import compose_paths_gradients
from acmix_mm.ops.path_weights.reference import compose_paths_reference
from acmix_mm.ops.projected_shift_conv.operations import group_size

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compose_paths_triton(weight: Tensor, *arguments: Any) -> Five:
    require_triton('compose_paths', weight)
    return _compose(weight, *arguments)


def _empty_weights(weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor, shift_weight: Tensor,
                   fc_bias: Optional[Tensor], attention_rate: Optional[Tensor],
                   convolution_rate: Optional[Tensor], attention_bias: Optional[Tensor],
                   dtype: torch.dtype, is_grouped: bool) -> Five:
    """The fields of PathWeights; empty ones for None."""
    channels, kernel_size, in_channels = len(shift_weight), shift_weight.shape[-1], weight.shape[1]
    head_dims = len(weight) // fc_weight.shape[1]
    empty = functools.partial(weight.new_empty, dtype=dtype)
    mixed = head_dims * len(fc_weight)
    depth = group_size(head_dims) * len(fc_weight) if is_grouped else in_channels
    kernels = empty(channels, kernel_size, kernel_size, depth).permute(0, 3, 1, 2)
    has_taps = any(each is not None for each in (bias, fc_bias, attention_bias))
    return (empty(weight.shape), empty(0 if bias is None else len(weight)),
            empty(mixed, in_channels) if is_grouped else empty(0), kernels,
            empty(channels, len(fc_weight), dtype=torch.float32) if has_taps
            else empty(0, dtype=torch.float32))


@custom_op(_empty_weights)
def compose_paths_kernels(weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor,
                          shift_weight: Tensor, fc_bias: Optional[Tensor],
                          attention_rate: Optional[Tensor], convolution_rate: Optional[Tensor],
                          attention_bias: Optional[Tensor], dtype: torch.dtype,
                          is_grouped: bool) -> Five:
    inputs = (weight, bias, fc_weight, shift_weight, fc_bias, attention_rate, convolution_rate,
              attention_bias)

    def kernels() -> Five:
        from acmix_mm.ops.path_weights.triton_kernels import compose
        outs = _empty_weights(*inputs, dtype, is_grouped)
        with torch.cuda.device_of(weight):
            compose(contiguous(inputs), [present(each) for each in outs],
                    group(inputs, is_grouped))
        return outs

    def torch_backend() -> Five:
        # They may be views of each other.
        results = _empty_weights(*inputs, dtype, is_grouped)
        for empty, each in zip(results, compose_paths_reference(*inputs, dtype, is_grouped)):
            empty.copy_(each)
        return results

    return run_kernels('compose_paths', kernels, torch_backend)


def _empty_gradients(*arguments: Any) -> Eight:
    def empty(like: Optional[Tensor]) -> Tensor:
        return arguments[5].new_empty(0) if like is None else like.new_empty(like.shape)

    first, second, third, fourth, fifth, sixth, seventh, eighth = map(empty, arguments[5:13])
    return first, second, third, fourth, fifth, sixth, seventh, eighth


@custom_op(_empty_gradients)
def compose_paths_kernels_backward(
        grad_weight: Tensor, grad_bias: Optional[Tensor], grad_mixing: Optional[Tensor],
        grad_kernels: Tensor, grad_taps: Optional[Tensor], weight: Tensor, bias: Optional[Tensor],
        fc_weight: Tensor, shift_weight: Tensor, fc_bias: Optional[Tensor],
        attention_rate: Optional[Tensor], convolution_rate: Optional[Tensor],
        attention_bias: Optional[Tensor], is_grouped: bool) -> Eight:
    grads = grad_weight, grad_bias, grad_mixing, grad_kernels, grad_taps
    inputs = (weight, bias, fc_weight, shift_weight, fc_bias, attention_rate, convolution_rate,
              attention_bias)

    def kernels() -> Eight:
        from acmix_mm.ops.path_weights.triton_kernels import compose_backward
        results = _empty_gradients(*grads, *inputs)
        dense = [*contiguous(grads[:3]),
                 grad_kernels.contiguous(memory_format=torch.channels_last), *contiguous(grads[4:])]
        with torch.cuda.device_of(weight):
            compose_backward(dense, contiguous(inputs), [present(each) for each in results],
                             group(inputs, is_grouped))
        return results

    def torch_backend() -> Eight:
        results = _empty_gradients(*grads, *inputs)
        for empty, each in zip(results, compose_paths_gradients(grads, inputs, is_grouped)):
            if each is not None:
                empty.copy_(each)
        return results

    return run_kernels('compose_paths', kernels, torch_backend)


def contiguous(tensors: Sequence[Optional[Tensor]]) -> list[Optional[Tensor]]:
    return [None if each is None else each.contiguous() for each in tensors]


def present(tensor: Tensor) -> Optional[Tensor]:
    """None for an empty tensor, which stands for it."""
    return tensor if tensor.numel() else None


def group(inputs: tuple, is_grouped: bool) -> int:
    """Channels of a head in a group of the convolution; 0 for a dense one."""
    return group_size(len(inputs[0]) // inputs[2].shape[1]) if is_grouped else 0


def _setup_context(ctx: Any, inputs: tuple, output: Five) -> None:
    *tensors, ctx.dtype, ctx.is_grouped = inputs
    ctx.save_for_backward(*tensors)
    # No zeros are made for the gradients of empty results.
    ctx.set_materialize_grads(False)
    ctx.results = [(each.shape, each.dtype) for each in output]


def _gradients(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    inputs = ctx.saved_tensors
    is_recorded = creates_graph()
    filled = [inputs[0].new_zeros(shape, dtype=dtype)
              if grad is None and (is_recorded or shape.numel()) else grad
              for grad, (shape, dtype) in zip(grads, ctx.results)]
    if is_recorded:
        return differentiable_gradients(compose_paths_reference, filled, *inputs, ctx.dtype,
                                        ctx.is_grouped)
    found = compose_paths_kernels_backward(*filled, *inputs, ctx.is_grouped)
    return *(None if each is None else grad for each, grad in zip(inputs, found)), None, None


_compose = differentiable(compose_paths_kernels, _setup_context, _gradients)
