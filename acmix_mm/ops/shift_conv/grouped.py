"""shift_conv by oneDNN's or cuDNN's grouped convolution, in two steps or folded into one."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.caching import is_compiling
from acmix_mm.ops.shift_conv.folding import (
    BorderRegions,
    bias_map,
    convolved_bias,
    folded_kernels,
)


def shift_conv_two_step(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                        fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Mix the maps by one matrix product, then run one grouped convolution."""
    mixed = F.linear(maps.permute(0, 3, 4, 2, 1), fc_weight)
    bias = convolved_bias(fc_bias, shift_weight, maps.shape[-2:], dilation)
    return grouped_conv(mixed, shift_weight.to(mixed.dtype), bias, stride, dilation)


def shift_conv_folded(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                      fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Fold the two linear steps into one grouped convolution of all the maps."""
    kernels = folded_kernels(fc_weight, shift_weight)
    bias = convolved_bias(fc_bias, shift_weight, maps.shape[-2:], dilation)
    return grouped_conv(maps.permute(0, 3, 4, 2, 1), kernels, bias, stride, dilation)


def grouped_conv(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                 dilation: int) -> Tensor:
    """Grouped convolution of (batch, height, width, groups, channels), zero-padded.

    Args:
        groups: the input.
        kernels: (out channels, channels, k, k).
        bias: from :func:`convolved_bias`, or None.
        stride: distance between the positions of the output.
        dilation: distance between the taps of the kernel.

    Returns:
        (batch, out channels, out height, out width).
    """
    # torch.compile would lose the derivatives of the backward pass. It decides itself what to save.
    run = convolve if is_compiling() else _GroupedConv.apply
    return run(groups, kernels, bias, stride, dilation)


def convolve(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
             dilation: int) -> Tensor:
    """The convolution without a backward pass of its own."""
    arguments = conv2d_arguments(groups, kernels, stride, dilation)
    out = F.conv2d(as_images(groups), kernels, **arguments)
    if bias is None:
        return out
    # In place, Inductor's code for the gradients does not compile.
    return out + bias_map(bias, groups.shape[1:3], stride).to(out.dtype)


class _GroupedConv(torch.autograd.Function):
    """The convolution with a backward pass that needs less memory.

    oneDNN's grouped convolution is twice as fast in this channels-last layout. The copy it takes is
    made again in the backward pass instead of being saved: the input is a view of the projections,
    which are saved anyway. The backward pass consists of differentiable operations.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                dilation: int) -> Tensor:
        ctx.save_for_backward(groups, kernels)
        ctx.geometry = conv2d_arguments(groups, kernels, stride, dilation)
        ctx.regions = None
        if bias is None:
            return F.conv2d(as_images(groups), kernels, **ctx.geometry)
        ctx.regions = BorderRegions(bias.shape, groups.shape[1:3], stride)
        inner, difference = ctx.regions.split(bias)
        out = F.conv2d(as_images(groups), kernels, inner, **ctx.geometry)
        return ctx.regions.add(out, difference)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        # Under autocast, the forward pass has cast float32 inputs.
        groups, kernels = (each.to(grad_out.dtype) for each in ctx.saved_tensors)
        grad_groups, grad_kernels, grad_bias = convolution_gradients(
            grad_out, groups, kernels, ctx.geometry, ctx.needs_input_grad[:3])
        if grad_bias is not None:
            grad_bias = ctx.regions.gradient(grad_out, grad_bias)
        return grad_groups, grad_kernels, grad_bias, None, None


def convolution_gradients(grad_images: Tensor, groups: Tensor, kernels: Tensor,
                          arguments: dict[str, Any], needed: Sequence[bool],
                          ) -> tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """The gradients of a grouped convolution that are needed, by oneDNN or cuDNN.

    Args:
        grad_images: gradient of the output, (batch, out channels, out height, out width).
        groups: the input, (batch, height, width, groups, channels).
        kernels: (out channels, channels, k, k).
        arguments: from :func:`conv2d_arguments`.
        needed: for the groups, the kernels, and one bias per output channel.
    """
    stride, padding, dilation = (2 * [arguments[key]] for key in ('stride', 'padding', 'dilation'))
    images, count = as_images(groups), arguments['groups']

    def gradients(weight: Tensor, groups: int, needed: Sequence[bool]) -> list[Optional[Tensor]]:
        return torch.ops.aten.convolution_backward(
            grad_images, images, weight, [len(weight)], stride, padding, dilation, False, [0, 0],
            groups, needed)

    joined = _groups_joined(kernels, count)
    if joined == 1 or not needed[1]:
        grad_groups, grad_kernels, grad_bias = gradients(kernels, count, needed)
    else:
        grad_groups, _, _ = gradients(kernels, count, [needed[0], False, False])
        # Of this weight, only the shape is read.
        wide = kernels.new_empty(len(kernels), joined * kernels.shape[1], *kernels.shape[2:])
        _, blocks, grad_bias = gradients(wide, count // joined, [False, True, needed[2]])
        assert blocks is not None
        blocks = blocks.unflatten(0, (-1, joined, len(kernels) // count))
        # Inputs of one group and outputs of another do not belong together.
        own = blocks.unflatten(3, (joined, -1)).diagonal(0, 1, 3)
        grad_kernels = own.movedim(-1, 1).reshape(kernels.shape)
    if grad_groups is not None:
        grad_groups = grad_groups.permute(0, 2, 3, 1).reshape(groups.shape)
    return grad_groups, grad_kernels, grad_bias


def _groups_joined(kernels: Tensor, groups: int) -> int:
    """How many groups are treated as one for the gradient of the kernels.

    oneDNN computes it in blocks of 16 inputs by 16 outputs, which small groups leave mostly empty.
    """
    if kernels.device.type == 'cpu' and len(kernels) <= 4 * groups and groups % 4 == 0:
        return 4
    return 1


def conv2d_arguments(groups: Tensor, kernels: Tensor, stride: int, dilation: int) -> dict[str, Any]:
    """The arguments of ``conv2d`` besides tensors."""
    return dict(stride=stride, padding=dilation * (kernels.shape[-1] // 2), dilation=dilation,
                groups=groups.shape[3])


def as_images(groups: Tensor) -> Tensor:
    """(batch, height, width, groups, channels) as (batch, groups · channels, height, width)."""
    return groups.flatten(3).permute(0, 3, 1, 2)
