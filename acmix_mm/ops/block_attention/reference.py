"""Reference implementation of block attention: dense attention under the pattern's mask."""

from operator import index

import torch
from torch import Tensor

from acmix_mm.ops.block_attention.pattern import BlockPattern
from acmix_mm.ops.caching import constant_in_graphs
from acmix_mm.ops.global_attention.reference import dense_attention


def block_attention_reference(qkv: Tensor, positions: Tensor, pattern: BlockPattern, stride: int,
                              scale: float, dropout_p: float) -> Tensor:
    """Memory grows with the square of the map."""
    height, width = qkv.shape[1:3]
    mask = pattern_mask(pattern, index(height), index(width), stride, qkv.device)
    return dense_attention(qkv, positions, mask, stride, scale, dropout_p)


@constant_in_graphs
def pattern_mask(pattern: BlockPattern, height: int, width: int, stride: int,
                 device: torch.device) -> Tensor:
    """Which positions each query attends to, (queries, height · width), bool."""
    queries = torch.arange(height * width, device='cpu').view(height, width)
    queries = queries[::stride, ::stride].flatten()
    return pattern.attended(height, width, queries, stride).to(device)
