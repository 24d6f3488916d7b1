"""Stage I of ACmix: the queries, keys and values of every head, shared by both paths."""

from collections.abc import Sequence
from typing import Optional

from torch import Tensor

from acmix_mm.ops.linear import linear


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
        return linear(x, weight, bias).unflatten(-1, shape)
    weight, bias = _heads_last(weight, bias, shape)
    return linear(x, weight, bias).unflatten(-1, (-1, 3, num_heads)).movedim(-3, -1)


def _heads_last(weight: Tensor, bias: Optional[Tensor],
                shape: Sequence[int]) -> tuple[Tensor, Optional[Tensor]]:
    """Reorder output channels from (3, num_heads, head_dims) to (head_dims, 3, num_heads)."""
    weight = weight.unflatten(0, shape).permute(2, 0, 1, 3).flatten(0, 2)
    return weight, None if bias is None else bias.view(*shape).permute(2, 0, 1).flatten()
