"""projected_shift_conv as one matrix product to k² maps, and a grouped convolution of them."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size
from acmix_mm.ops.projected_shift_conv.operations import group_size
from acmix_mm.ops.projected_shift_conv.precision import at_least_float32, without_autocast


def projected_shift_conv_grouped(x: Tensor, weight: Tensor, bias: Optional[Tensor],
                                 fc_weight: Tensor, shift_weight: Tensor,
                                 fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    kernel_size = shift_weight.shape[-1]
    with without_autocast(x.device):
        weight, bias = compose(at_least_float32(weight), at_least_float32(bias),
                               at_least_float32(fc_weight), at_least_float32(fc_bias))
        head_dims = len(weight) // len(fc_weight)
        group = group_size(head_dims)
        kernels = block_diagonal(at_least_float32(shift_weight), head_dims, group)
    bias = None if bias is None else bias.to(x.dtype)
    mixed = F.linear(x.permute(0, 2, 3, 1), weight.to(x.dtype), bias).permute(0, 3, 1, 2)
    kernels = kernels.to(mixed.dtype, memory_format=torch.channels_last)
    return F.conv2d(mixed, kernels, stride=stride, padding=dilation * (kernel_size // 2),
                    dilation=dilation, groups=head_dims // group)


def compose(weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor,
            fc_bias: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """Compose projections and fully connected layer.

    Args:
        weight: (num_maps · head_dims, in_channels).
        bias: (num_maps · head_dims,), or None.
        fc_weight: (k², num_maps).
        fc_bias: (k²,), or None.

    Returns:
        Weight and bias of one linear layer to (head_dims, k²) channels.
    """
    num_shifts, num_maps = fc_weight.shape
    weight = weight.unflatten(0, (num_maps, -1)).transpose(0, 1)
    composed = torch.bmm(fc_weight.expand(len(weight), num_shifts, num_maps), weight).flatten(0, 1)
    mixed_bias = fc_bias
    if bias is not None:
        mixed_bias = F.linear(bias.view(num_maps, -1).t(), fc_weight, fc_bias).flatten()
    elif fc_bias is not None:
        mixed_bias = fc_bias.repeat(len(weight))
    return composed, mixed_bias


def block_diagonal(shift_weight: Tensor, head_dims: int, group: int) -> Tensor:
    """Shift kernels of convolutions in groups of several channels of a head.

    Args:
        shift_weight: (head_dims · num_heads, k², k, k).
        head_dims: channels of a head.
        group: number of them in a group.

    Returns:
        (head_dims · num_heads, group · k², k, k), zero where input and output channel differ.
    """
    kernels = shift_weight.view(head_dims // group, group, -1, 1, *shift_weight.shape[1:])
    kernels = kernels * identity(group, kernels.dtype, kernels.device)
    return kernels.flatten(3, 4).flatten(0, 2)


@cached_by_size
def identity(group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity matrix, to be multiplied with (…, group, heads, group, k², k, k)."""
    return torch.eye(group, dtype=dtype, device=device).view(group, 1, group, 1, 1, 1)
