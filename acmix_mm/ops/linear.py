"""Linear layers, on a CPU by the faster of torch's two libraries."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.backend import is_exporting
from acmix_mm.ops.caching import is_compiling

# From about as many multiply-adds on, oneDNN is faster.
MIN_MULTIPLY_ADDS = 2**23


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """The same as ``torch.nn.functional.linear``, by oneDNN on a CPU with AVX-512.

    Torch multiplies float32 matrices by MKL, which keeps to AVX2 on AMD's processors. It convolves
    by oneDNN, which does not: a pointwise convolution in channels last is the same product, in half
    the time.

    Args:
        x: (…, in_channels), any floating dtype.
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.

    Returns:
        (…, out_channels).
    """
    if not _is_faster_by_onednn(x, weight):
        return F.linear(x, weight, bias)
    # oneDNN is fastest if all positions lie in one row.
    row = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(row, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def _is_faster_by_onednn(x: Tensor, weight: Tensor) -> bool:
    # A compiler or another runtime chooses itself.
    if is_compiling() or is_exporting():
        return False
    # MKL reads a transposed map as it is; oneDNN's output would be transposed, too.
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and x.is_contiguous()
            and torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability() == 'AVX512'
            and x.numel() * len(weight) >= MIN_MULTIPLY_ADDS)
