"""Involution as a replacement for a convolution: each position generates its own kernel."""

import math
from typing import Any, Callable, Optional, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import REST, OperatorLayer, check_positive
from acmix_mm.layers.padded_conv import PaddedConvolution, Size, layer_or_plain
from acmix_mm.ops import involution


class Involution2d(PaddedConvolution, OperatorLayer):
    """A drop-in replacement for a padded ``nn.Conv2d`` with an odd kernel and equal numbers of
    input and output channels.

    Paper: arXiv 2103.06255, section 3.1, equations 4 to 6, and algorithm 1. The kernel of a
    position is generated from the channels there: a 1×1 convolution to fewer channels, norm, ReLU,
    and a 1×1 convolution to kernel_size² weights for each group of channels. With a stride, it is
    generated from the average of the stride × stride positions that the output covers, or of as
    many as lie on the map at its bottom and right. Outside the map, the input is zero.

    Maps (batch, channels, height, width), from 1×1 on, to (batch, channels, ⌈height / stride⌉,
    ⌈width / stride⌉), in the memory format of the input.

    Parameters are named as in algorithm 1: ``reduce`` (1×1 convolution without bias, norm, ReLU)
    and ``span``.

    Args:
        in_channels: channels of the input.
        out_channels: must be equal, because involution does not mix channels.
        kernel_size: side of the kernel, odd. For 1, use :func:`involution_or_pointwise`.
        stride: stride, the same along both axes.
        padding: None or ``dilation · (kernel_size // 2)``, which keeps the size at stride 1.
        dilation: distance between neighbours.
        groups: must be 1. The groups that share a kernel are ``in_channels / group_channels``.
        bias: whether to add a learned bias to the output, as a convolution does; the paper has
            none.
        group_channels: channels of a group; divides ``in_channels``. By default the paper's 16 if
            that divides them, or the largest smaller power of two that does.
        reduction: factor by which ``reduce`` reduces the channels; divides ``in_channels``.
        norm: builds the norm of ``reduce`` from its number of channels.

    Raises:
        ValueError: an argument is invalid.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size = 7,
                 stride: Size = 1, padding: Optional[Size] = None, dilation: Size = 1,
                 groups: int = 1, bias: bool = False, group_channels: Optional[int] = None,
                 reduction: int = 4,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.set_geometry(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        if in_channels != out_channels:
            raise ValueError(f'Involution mixes no channels: in_channels={in_channels} and '
                             f'out_channels={out_channels} must be equal; put a 1×1 convolution in '
                             'front of it, or leave this one a convolution.')
        if group_channels is None:
            group_channels = math.gcd(in_channels, 16)
        for name, value in (('group_channels', group_channels), ('reduction', reduction)):
            check_positive(name, value)
            if in_channels % value:
                raise ValueError(f'{name} must divide in_channels, got {name}={value} for '
                                 f'{in_channels} channels.')
        self.group_channels = group_channels
        reduced = in_channels // reduction
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, reduced, 1, bias=False), norm(reduced),
                                    nn.ReLU(inplace=True))
        self.span = nn.Conv2d(
            reduced, in_channels // group_channels * self.kernel_size[0]**2, 1)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        averaged = x
        if stride > 1:
            averaged = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
        kernels = self.span(self.reduce(averaged)).unflatten(1, (-1, *self.kernel_size))
        out = involution(x.to(kernels.dtype), kernels, stride=stride, dilation=self.dilation[0])
        return out if self.bias is None else out + self.bias[:, None, None].to(out.dtype)

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        reduction = cast(nn.Conv2d, self.reduce[0])
        generation = reduction.weight.numel() + self.span.weight.numel()
        application = self.kernel_size[0]**2 * out.shape[1]
        return {REST: out[:, 0].numel() * (generation + application)}

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, group_channels={self.group_channels}'


def involution_or_pointwise(in_channels: int, out_channels: int, kernel_size: Size, *args: Any,
                            **kwargs: Any) -> nn.Module:
    """Build :class:`Involution2d`, or ``nn.Conv2d`` if the kernel is 1×1 or there are groups."""
    return layer_or_plain(Involution2d, in_channels, out_channels, kernel_size, *args, **kwargs)
