"""Involution in the place of a convolution: each position makes its own kernel."""

import math
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.padded_conv import PaddedConvolution, Size, one_side
from acmix_mm.ops import involution


class Involution2d(PaddedConvolution):
    """A drop-in for a padded ``nn.Conv2d`` of odd kernel between as many channels: same arguments,
    same output size.

    Paper: arXiv 2103.06255, section 3.1, equations 4 to 6, and algorithm 1. The kernel of a
    position is made from the channels there, by a 1×1 convolution to fewer channels, norm, ReLU and
    a 1×1 convolution to kernel_size² weights for each group of channels. With a stride it is made
    from the average of the stride × stride positions that the output stands for; at the bottom and
    right of a map that the stride does not divide, of those that there are. Beyond the edges the
    map is zero.

    Parameters have the names of algorithm 1: ``reduce`` (1×1 convolution without bias, norm, ReLU)
    and ``span``.

    Args:
        in_channels: channels of the input.
        out_channels: the same: involution mixes no channels.
        kernel_size: side of the kernel, odd. 1 is the plain 1×1 convolution and not built here; see
            :func:`involution_or_pointwise`.
        stride: distance of output positions, the same along both axes.
        padding: None, or ``dilation · (kernel_size // 2)``, what keeps the size at stride 1.
        dilation: distance of neighbours.
        groups: 1; the argument is there because builders of convolutions pass it. The groups that
            share a kernel are ``in_channels / group_channels``.
        bias: whether a learned bias is added to the output, as a convolution's; the paper has none.
        group_channels: channels of a group; divides ``in_channels``. If None the paper's 16 where
            that divides them, and else the largest smaller power of two that does.
        reduction: by what factor ``reduce`` makes channels fewer; divides ``in_channels``.
        norm: makes the norm of ``reduce`` from its channels.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size = 7,
                 stride: Size = 1, padding: Optional[Size] = None, dilation: Size = 1,
                 groups: int = 1, bias: bool = False, group_channels: Optional[int] = None,
                 reduction: int = 4,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        if in_channels != out_channels:
            raise ValueError(f'Involution mixes no channels: in_channels={in_channels} and '
                             f'out_channels={out_channels} must be equal; put a 1×1 convolution in '
                             'front of it, or leave this one a convolution.')
        if group_channels is None:
            group_channels = math.gcd(in_channels, 16)
        for name, value in (('group_channels', group_channels), ('reduction', reduction)):
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
        """Map (batch, channels, height, width), any size from 1×1, to (batch, channels,
        ⌈height / stride⌉, ⌈width / stride⌉), in the memory format of the input.
        """
        stride = self.stride[0]
        own = x
        if stride > 1:
            own = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
        kernels = self.span(self.reduce(own)).unflatten(1, (-1, *self.kernel_size))
        out = involution(x.to(kernels.dtype), kernels, stride=stride, dilation=self.dilation[0])
        return out if self.bias is None else out + self.bias[:, None, None].to(out.dtype)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, group_channels={self.group_channels}'


def involution_or_pointwise(in_channels: int, out_channels: int, kernel_size: Size, *args: Any,
                            group_channels: Optional[int] = None, reduction: int = 4,
                            **kwargs: Any) -> nn.Module:
    """Build :class:`Involution2d`, or ``nn.Conv2d`` where the kernel is 1×1.

    OpenMMLab's modules build both from one ``conv_cfg``; the 1×1 convolutions mix the channels,
    which involution does not.
    """
    if one_side('kernel_size', kernel_size) == 1:
        return nn.Conv2d(in_channels, out_channels, kernel_size, *args, **kwargs)
    return Involution2d(in_channels, out_channels, kernel_size, *args,
                        group_channels=group_channels, reduction=reduction, **kwargs)
