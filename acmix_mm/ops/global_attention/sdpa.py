"""Global attention by ``scaled_dot_product_attention``.

q_i · p_i is the same for all keys and cancels in the softmax. What remains is attention to the keys
k − p without a mask, for which torch has fused kernels that never store the weights of all pairs.
"""

import torch.nn.functional as F
from torch import Tensor


def global_attention_sdpa(qkv: Tensor, positions: Tensor, stride: int, scale: float,
                          dropout_p: float) -> Tensor:
    """Like every backend, returns (batch, out height, out width, num_heads, head_dims)."""
    q, k, v = qkv.unbind(3)
    q = q[:, ::stride, ::stride]
    size = q.shape[1:3]
    k = (k - positions.unsqueeze(2)).to(k.dtype)
    out = F.scaled_dot_product_attention(matrices(q), matrices(k), matrices(v),
                                         dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).unflatten(1, size)


def matrices(maps: Tensor) -> Tensor:
    """Turn (batch, height, width, num_heads, head_dims) into (batch, num_heads, height · width,
    head_dims).
    """
    heads = maps.flatten(1, 2).transpose(1, 2)
    # Torch's fused attention needs adjacent channels; without them, it would store all weights.
    return heads if heads.stride(3) == 1 else heads.contiguous()
