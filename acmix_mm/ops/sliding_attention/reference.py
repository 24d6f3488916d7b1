"""Reference implementation of sliding-window attention, as in the authors' code."""

import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.reflection import reflection_pad


def sliding_attention_reference(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                                dilation: int, scale: float) -> Tensor:
    """Copy every neighbourhood and follow the equation; takes kernel_size² times the memory.

    Like every backend, returns (batch, out height, out width, num_heads, head_dims).
    """
    q, k, v = qkv.permute(3, 0, 4, 5, 1, 2)
    positions = positions.permute(2, 0, 1)

    def neighbourhoods(maps: Tensor) -> Tensor:
        padded = reflection_pad(maps.reshape(-1, *positions.shape), dilation * (kernel_size // 2))
        copies = F.unfold(padded, kernel_size, dilation=dilation, stride=stride)
        return copies.view(*maps.shape[:-2], kernel_size**2, *own.shape[-2:])

    own = q[..., ::stride, ::stride]
    own_positions = positions[:, ::stride, ::stride]
    relative = own_positions[:, None] - neighbourhoods(positions)
    keys = neighbourhoods(k) + relative.to(k.dtype)
    logits = ((scale * own).unsqueeze(3) * keys).sum(2)
    weights = logits.softmax(2)
    out = (weights.unsqueeze(2) * neighbourhoods(v)).sum(3)
    return out.permute(0, 3, 4, 1, 2)
