"""Block attention by ``scaled_dot_product_attention`` on the keys gathered for each block.

``flex_attention`` would not copy the keys, but has no backward pass on a CPU. As in global
attention, keys are k − p.
"""

from operator import index

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.block_attention.pattern import BlockPattern, block_tables, divide, join
from acmix_mm.ops.global_attention.sdpa import matrices


def block_attention_sdpa(qkv: Tensor, positions: Tensor, pattern: BlockPattern, stride: int,
                         scale: float, dropout_p: float) -> Tensor:
    """Like every backend, returns (batch, out height, out width, num_heads, head_dims)."""
    height, width, num_heads = qkv.shape[1], qkv.shape[2], qkv.shape[4]
    grid = pattern.grid(height, width)
    # torch.compile makes a graph for each size of the map.
    tables = block_tables(pattern, index(height), index(width), stride, qkv.device)
    q, k, v = qkv.unbind(3)
    q = q[:, ::stride, ::stride]
    k = (k - positions.unsqueeze(2)).to(k.dtype)

    def gather(maps: Tensor) -> Tensor:
        """What each block attends to, (batch · num_heads, blocks, keys, head_dims)."""
        blocks = divide(maps, pattern.block_size, grid)
        keys = blocks.index_select(1, tables.blocks.flatten())
        keys = keys.unflatten(1, tables.blocks.shape).flatten(2, 3)
        if not pattern.global_tokens:
            return keys
        tokens = matrices(maps).index_select(2, tables.tokens).flatten(0, 1)
        return torch.cat([keys, tokens[:, None].expand(-1, keys.shape[1], -1, -1)], 2)

    side = pattern.block_size // stride
    mask = None if tables.mask is None else tables.mask[None, :, None]
    out = F.scaled_dot_product_attention(divide(q, side, grid), gather(k), gather(v), mask,
                                         dropout_p=dropout_p, scale=scale)
    out = join(out, side, grid, num_heads)[:, :q.shape[1], :q.shape[2]]
    if not pattern.global_tokens:
        return out
    # Global positions attend to all.
    own = F.scaled_dot_product_attention(
        matrices(q).index_select(2, tables.queries), matrices(k), matrices(v),
        dropout_p=dropout_p, scale=scale)
    return out.flatten(1, 2).index_copy(1, tables.queries, own.transpose(1, 2)).view(q.shape)
