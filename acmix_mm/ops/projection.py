"""Stage I of ACmix: the queries, keys and values of every head, shared by both paths."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor


def project(x: Tensor, weight: Tensor, bias: Optional[Tensor], num_heads: int,
            for_convolution: bool) -> Tensor:
    """Project a map to queries, keys and values.

    Paper: arXiv 2111.14556, section 4.1, stage I.

    On a CPU, the grouped convolution of the convolution path is fastest if the maps that share a
    channel index lie side by side, over all heads. Permuting the small weight gives that layout
    for free; permuting the map would take three copies of it, one forward and two backward. The
    Triton kernels read the usual layout.

    Args:
        x: (…, in_channels), any floating dtype.
        weight: (3 · num_heads · head_dims, in_channels).
        bias: (3 · num_heads · head_dims,), or None.
        num_heads: number of heads of queries, keys and values each.
        for_convolution: whether the convolution path reads the result.

    Returns:
        (…, 3, num_heads, head_dims); the strides depend on the device.
    """
    shape = (3, num_heads, weight.shape[0] // (3 * num_heads))
    if not for_convolution or x.device.type != 'cpu':
        return F.linear(x, weight, bias).unflatten(-1, shape)
    weight = weight.unflatten(0, shape).permute(2, 0, 1, 3).flatten(0, 2)
    if bias is not None:
        bias = bias.view(shape).permute(2, 0, 1).flatten()
    return F.linear(x, weight, bias).unflatten(-1, (-1, 3, num_heads)).movedim(-3, -1)
