"""Reference implementation of attention over a whole map, optionally under a mask."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def global_attention_reference(qkv: Tensor, positions: Tensor, stride: int, scale: float,
                               dropout_p: float) -> Tensor:
    """Follow the equation; memory grows with the square of the map."""
    return dense_attention(qkv, positions, None, stride, scale, dropout_p)


def dense_attention(qkv: Tensor, positions: Tensor, is_attended: Optional[Tensor], stride: int,
                    scale: float, dropout_p: float) -> Tensor:
    """Attend from every stride-th position to all positions that a mask allows.

    Args:
        qkv: see :func:`acmix_mm.ops.global_attention`, as for the following arguments.
        positions: position encoding.
        is_attended: mask (queries, positions), bool, in row-major order; None for all pairs.
        stride: distance between queries.
        scale: factor of the logits.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (batch, out height, out width, num_heads, head_dims).
    """
    own = qkv[:, ::stride, ::stride, 0]
    q = own.flatten(1, 2).transpose(1, 2)
    k, v = qkv[:, :, :, 1:].flatten(1, 2).permute(2, 0, 3, 1, 4)
    relative = positions[::stride, ::stride].flatten(0, 1)[:, None] - positions.flatten(0, 1)
    relative = relative.to(qkv.dtype)
    logits = scale * (torch.einsum('bnid,bnjd->bnij', q, k) +
                      torch.einsum('bnid,ijd->bnij', q, relative))
    if is_attended is not None:
        logits = logits.masked_fill(~is_attended, -torch.inf)
    weights = F.dropout(logits.softmax(-1), dropout_p)
    out = torch.einsum('bnij,bnjd->bnid', weights, v)
    return out.transpose(1, 2).unflatten(1, own.shape[1:3])
