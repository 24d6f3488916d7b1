"""ACmix in the place of a convolution: local attention beside shift-and-sum."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import FullyConnected, Shifts, TwoPaths
from acmix_mm.layers.padded_conv import PaddedConvolution, Size, check_odd, one_side
from acmix_mm.ops import project, sliding_window_attention
from acmix_mm.ops.caching import cached_by_size


class ACmixConv2d(PaddedConvolution, TwoPaths):
    """A drop-in for a padded ``nn.Conv2d`` of odd kernel: same arguments, same output size.

    Paper: arXiv 2111.14556, section 4.1; out = rate1 · attention + rate2 · convolution (+ bias).
    Queries, keys and values are three 1×1 projections of the input; the attention path looks at
    the attn_kernel_size² positions around each output position, mirrored at the edges, and the
    convolution path at kernel_size². Stride leaves out output positions, and dilation spreads the
    neighbourhood of both paths. The authors' channel order is kept: attention's channels go
    (head, channel), the convolution path's (channel, head), and they are added as they are.

    Parameters have the authors' names: ``conv1``, ``conv2``, ``conv3`` (q, k, v), ``conv_p``
    (position encoding), ``fc``, ``dep_conv``, ``rate1``, ``rate2``; ``bias`` says, as in their
    code, whether the projections have one.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; ``num_heads`` divides them.
        kernel_size: side of the convolution path's kernel, odd. 1 is the plain 1×1 convolution
            and not built here; see :func:`acmix_or_pointwise`.
        stride: distance of output positions, the same along both axes.
        padding: None, or ``dilation · (kernel_size // 2)``, what keeps the size at stride 1.
        dilation: distance of taps and of attention's neighbours.
        groups: 1; the argument is there because builders of convolutions pass it.
        bias: whether the three projections have a bias.
        num_heads: attention heads.
        attn_kernel_size: side of attention's neighbourhood, odd.
        mix: ``'acmix'`` for both paths; ``'attn'`` or ``'conv'`` builds that path alone, and no
            rates.
        combine: how the paths are added; see :class:`acmix_mm.layers.base.TwoPaths`.
        shift: how the convolution path shifts; see :class:`acmix_mm.layers.base.Shifts`.
        shift_groups: groups of its kernels: one for every head (None), or 1.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size = 3,
                 stride: Size = 1, padding: Optional[Size] = None, dilation: Size = 1,
                 groups: int = 1, bias: bool = True, num_heads: int = 4,
                 attn_kernel_size: int = 7, mix: str = 'acmix', combine: str = 'rates',
                 shift: str = 'learned', shift_groups: Optional[int] = None) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self.set_paths(mix, combine)
        if out_channels % num_heads:
            raise ValueError(f'num_heads must divide out_channels, got {num_heads} heads for '
                             f'{out_channels} channels.')
        check_odd('attn_kernel_size', attn_kernel_size)

        self.num_heads = num_heads
        self.attn_kernel_size = attn_kernel_size
        head_dims = out_channels // num_heads
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        if mix != 'conv':
            self.conv_p = nn.Conv2d(2, head_dims, 1)
        if mix != 'attn':
            self.fc = FullyConnected(3 * num_heads, self.kernel_size[0], bias=False)
            self.dep_conv = Shifts(head_dims, num_heads, self.kernel_size[0], shift, shift_groups)
        self.add_rates()

    def init_weights(self) -> None:
        """Keep the initialisation of the constructor; OpenMMLab leaves layers alone that have it.
        """

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width), any size from 1×1, to (batch, out_channels,
        ⌈height / stride⌉, ⌈width / stride⌉), in the memory format of the input.
        """
        projections = (self.conv1, self.conv2, self.conv3)
        weight = torch.cat([conv.weight for conv in projections]).flatten(1)
        bias = None if self.conv1.bias is None else torch.cat([conv.bias for conv in projections])
        qkv = project(x.permute(0, 2, 3, 1), weight, bias, self.num_heads,
                      for_convolution=self.mix != 'attn')

        if self.mix != 'conv':
            out = attention = self.attend(qkv)
        if self.mix != 'attn':
            out = convolution = self.convolve(qkv)
        if self.mix == 'acmix':
            rate = self.attention_rate
            out = (convolution.add_(attention) if rate is None else
                   convolution.addcmul_(attention, rate.to(attention.dtype)))
        # As nn.Conv2d does: what follows may not look at strides, as mmcv's RoIAlign.
        return out.contiguous() if x.is_contiguous() else out

    def attend(self, qkv: Tensor) -> Tensor:
        """The attention path: (batch, height, width, 3, num_heads, head_dims) to channels."""
        grid = coordinates(*qkv.shape[1:3], qkv.dtype, qkv.device)
        positions = F.linear(grid, self.conv_p.weight.flatten(1), self.conv_p.bias)
        out = sliding_window_attention(qkv, positions, self.attn_kernel_size,
                                       stride=self.stride[0], dilation=self.dilation[0])
        return out.permute(0, 3, 1, 2)

    def convolve(self, qkv: Tensor) -> Tensor:
        """The convolution path, times its rate: (batch, height, width, 3, num_heads, head_dims) to
        channels.
        """
        return self.shift_and_sum(qkv.flatten(3, 4).permute(0, 3, 4, 1, 2),
                                  stride=self.stride[0], dilation=self.dilation[0])

    def extra_repr(self) -> str:
        return (f'{super().extra_repr()}, num_heads={self.num_heads}, '
                f'attn_kernel_size={self.attn_kernel_size}, mix={self.mix!r}')


def acmix_or_pointwise(in_channels: int, out_channels: int, kernel_size: Size, *args: Any,
                       num_heads: int = 4, attn_kernel_size: int = 7, mix: str = 'acmix',
                       combine: str = 'rates', shift: str = 'learned',
                       shift_groups: Optional[int] = None, **kwargs: Any) -> nn.Module:
    """Build :class:`ACmixConv2d`, or ``nn.Conv2d`` where the kernel is 1×1.

    OpenMMLab's modules build both from one ``conv_cfg``; a 1×1 convolution has no neighbourhood
    to attend to.
    """
    if one_side('kernel_size', kernel_size) == 1:
        return nn.Conv2d(in_channels, out_channels, kernel_size, *args, **kwargs)
    return ACmixConv2d(in_channels, out_channels, kernel_size, *args, num_heads=num_heads,
                       attn_kernel_size=attn_kernel_size, mix=mix, combine=combine, shift=shift,
                       shift_groups=shift_groups, **kwargs)


@cached_by_size
def coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """x and y of every position, (height, width, 2), from -1 to 1 over each axis."""
    # linspace takes no open size.
    x, y = (torch.arange(extent, device=device) * (2 / max(extent - 1, 1)) - 1
            for extent in (width, height))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).to(dtype)
