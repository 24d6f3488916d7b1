"""Reference implementation of block attention: dense attention under the pattern's mask."""

import torch
from torch import Tensor

from acmix_mm.ops.block_attention.pattern import BlockPattern
from acmix_mm.ops.global_attention.reference import dense_attention


def block_attention_reference(qkv: Tensor, positions: Tensor, pattern: BlockPattern, stride: int,
                              scale: float, dropout_p: float) -> Tensor:
    """Memory grows with the square of the map."""
    height, width = qkv.shape[1:3]
    queries = torch.arange(height * width).view(height, width)[::stride, ::stride].flatten()
    is_attended = pattern.attended(height, width, queries, stride).to(qkv.device)
    return dense_attention(qkv, positions, is_attended, stride, scale, dropout_p)
