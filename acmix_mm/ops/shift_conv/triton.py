"""shift_conv by Triton kernels for NVIDIA GPUs, folded or in two steps."""

from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph, differentiable, differentiable_gradients
from acmix_mm.ops.backend import require_triton, run_kernels
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.shift_conv.folding import BorderRegions, convolved_bias, folded_kernels
from acmix_mm.ops.shift_conv.grouped import (
    as_images,
    conv2d_arguments,
    convolution_gradients,
    convolve,
)


def shift_conv_triton(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                      fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    require_triton('shift_conv', maps)
    groups = maps.permute(0, 3, 4, 2, 1)
    if shift_weight.shape[0] <= 4 * maps.shape[2]:
        # The kernels compute four heads at once; up to four, folding is cheaper.
        kernels = folded_kernels(fc_weight, shift_weight)
    else:
        mixing = fc_weight.repeat(maps.shape[2], 1)[:, :, None, None]
        groups = _grouped_conv(groups, mixing, None, 1, 1, True)
        kernels = shift_weight
    bias = convolved_bias(fc_bias, shift_weight, maps.shape[-2:], dilation)
    out = _grouped_conv(groups, kernels, bias, stride, dilation, False)
    return out.flatten(3).permute(0, 3, 1, 2)


def _convolve(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
              dilation: int) -> Tensor:
    """The same convolution, in operations whose gradients can be differentiated."""
    out = convolve(groups, kernels.to(groups.dtype), bias, stride, dilation)
    return out.permute(0, 2, 3, 1).unflatten(3, (groups.shape[3], -1))


def _empty_output(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                  dilation: int, groups_last: bool) -> Tensor:
    batch, height, width = groups[:, ::stride, ::stride].shape[:3]
    num_groups, channels = groups.shape[3], kernels.shape[0] // groups.shape[3]
    if groups_last:
        return groups.new_empty(batch, height, width, channels, num_groups).transpose(3, 4)
    return groups.new_empty(batch, height, width, num_groups, channels)


def _empty_gradients(grad_out: Tensor, groups: Tensor, kernels: Tensor,
                     *geometry: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the groups has the strides of the gradient of the projections."""
    as_projected = groups.transpose(3, 4)
    return (as_projected.new_empty(as_projected.shape).transpose(3, 4),
            kernels.new_empty(kernels.shape))


@custom_op(_empty_output)
def convolve_triton(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                    dilation: int, groups_last: bool) -> Tensor:
    """Grouped convolution of (batch, height, width, groups, channels) in any strides.

    The output has the same axes. ``groups_last`` makes its groups contiguous in memory, as the next
    convolution prefers.
    """
    out = _empty_output(groups, kernels, bias, stride, dilation, groups_last)

    def run() -> Tensor:
        from acmix_mm.ops.shift_conv import triton_kernels
        with torch.cuda.device_of(groups):
            triton_kernels.convolve(groups, kernels, bias, out, stride, dilation)
        return out

    return run_kernels('shift_conv', run, lambda: out.copy_(
        _convolve(groups, kernels, bias, stride, dilation)))


@custom_op(_empty_gradients)
def convolve_triton_backward(grad_out: Tensor, groups: Tensor, kernels: Tensor, stride: int,
                             dilation: int) -> tuple[Tensor, Tensor]:
    grads = _empty_gradients(grad_out, groups, kernels)

    def run() -> tuple[Tensor, Tensor]:
        from acmix_mm.ops.shift_conv import triton_kernels
        with torch.cuda.device_of(groups):
            triton_kernels.convolve_maps_backward(grad_out, kernels, grads[0], stride, dilation)
            grads[1].copy_(triton_kernels.convolve_kernels_backward(
                grad_out, groups, kernels.shape[-1], stride, dilation))
        return grads

    def torch_backend() -> tuple[Tensor, Tensor]:
        computed = convolution_gradients(
            as_images(grad_out), groups, kernels.to(groups.dtype),
            conv2d_arguments(groups, kernels, stride, dilation), (True, True, False))
        for empty, grad in zip(grads, computed):
            assert grad is not None
            empty.copy_(grad)
        return grads

    return run_kernels('shift_conv', run, torch_backend)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    groups, kernels, bias, *ctx.geometry, _ = inputs
    ctx.save_for_backward(groups, kernels, bias)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
    groups, kernels, bias = ctx.saved_tensors
    if creates_graph():
        return *differentiable_gradients(_convolve, grad_out, groups, kernels, bias,
                                         *ctx.geometry), None
    grads = convolve_triton_backward(grad_out, groups, kernels, *ctx.geometry)
    grad_bias = None
    if ctx.needs_input_grad[2]:
        images = as_images(grad_out)
        regions = BorderRegions(bias.shape, groups.shape[1:3], ctx.geometry[0])
        grad_bias = regions.gradient(images, images.sum((0, 2, 3)))
    return *grads, grad_bias, None, None, None


_grouped_conv = differentiable(convolve_triton, _setup_context, _gradients)
