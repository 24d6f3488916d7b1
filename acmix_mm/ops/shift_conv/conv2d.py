"""shift_conv for exports: the folded convolution by ``conv2d``, with a convolved bias map."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.shift_conv.folding import bias_taps, folded_kernels


def shift_conv_conv2d(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                      fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    geometry: dict[str, Any] = dict(stride=stride, dilation=dilation,
                                    padding=dilation * (shift_weight.shape[-1] // 2))
    kernels = folded_kernels(fc_weight, shift_weight).to(maps.dtype)
    out = F.conv2d(maps.transpose(1, 2).flatten(1, 2), kernels, groups=maps.shape[2], **geometry)
    if fc_bias is None:
        return out
    ones = maps.new_ones(1, 1, *maps.shape[-2:])
    return out + F.conv2d(ones, bias_taps(fc_bias, shift_weight).to(maps.dtype), **geometry)
