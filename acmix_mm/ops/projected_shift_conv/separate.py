"""projected_shift_conv as it is defined: projections, then shift_conv."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.shift_conv import shift_conv


def projected_shift_conv_reference(x: Tensor, weight: Tensor, bias: Optional[Tensor],
                                   fc_weight: Tensor, shift_weight: Tensor,
                                   fc_bias: Optional[Tensor], stride: int,
                                   dilation: int) -> Tensor:
    return shift_conv(_project(x, weight, bias, fc_weight), fc_weight, shift_weight, fc_bias,
                      stride=stride, dilation=dilation, backend='reference')


def projected_shift_conv_separate(x: Tensor, weight: Tensor, bias: Optional[Tensor],
                                  fc_weight: Tensor, shift_weight: Tensor,
                                  fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    return shift_conv(_project(x, weight, bias, fc_weight), fc_weight, shift_weight, fc_bias,
                      stride=stride, dilation=dilation)


def _project(x: Tensor, weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor) -> Tensor:
    """(batch, num_maps, head_dims, height, width)."""
    maps = F.linear(x.permute(0, 2, 3, 1), weight, bias)
    return maps.unflatten(3, (fc_weight.shape[1], -1)).permute(0, 3, 4, 1, 2)
