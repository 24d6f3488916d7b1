"""Tiled attention for exports: a fixed number of strips of tiles, in torch's own operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.reflection import reflect
from acmix_mm.ops.sliding_attention.tiles import tile_and_span, tile_mask
from acmix_mm.ops.symbolic import divide

# The surroundings and logits of one strip are in memory at a time. A loop over a number of strips
# that depends on the size could not be exported.
STRIPS = 8


def sliding_attention_dense(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                            dilation: int, scale: float) -> Tensor:
    """Compute the logits of whole strips, masked pairs included; see the backend ``'tiled'``."""
    batch, height, width, _, num_heads, _ = qkv.shape
    # Gathered in this order, tiles are matrices without being transposed, which would be slower
    # than all that is computed.
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).flatten(1, 2).flatten(2, 3)
    tile, span = tile_and_span(kernel_size, stride, dilation)
    out_height, out_width = ((extent + stride - 1) // stride for extent in (height, width))
    rows, columns = ((extent + tile - 1) // tile for extent in (out_height, out_width))
    # At least two, because torch.export specialises axes of length one. The last strips have tiles
    # beyond the map; reflection gives them some positions on it.
    tiles = rows * columns // STRIPS + 2

    def indices_of_tiles(side: int, step: int, before: int) -> Tensor:
        which, place = divide(torch.arange(STRIPS * tiles * side**2, device=qkv.device), side**2)
        row, column = (
            reflect(tile * stride * each + step * offset - before, extent)
            for each, offset, extent in zip(
                divide(which, columns), divide(place, side), (height, width)))
        return row * width + column

    def matrices(maps: Tensor, index: Tensor, strip: int, area: int) -> Tensor:
        index = index.narrow(0, strip * tiles * area, tiles * area)
        return maps.index_select(1, index).unflatten(1, (tiles, area))

    own = indices_of_tiles(tile, stride, 0)
    around = indices_of_tiles(span, 1, dilation * (kernel_size // 2))
    mask = tile_mask(tile, span, kernel_size, stride, dilation, qkv.dtype, qkv.device)
    keys = (k - positions.flatten(0, 1)).to(k.dtype)
    out = torch.cat([F.scaled_dot_product_attention(
        matrices(q, own, strip, tile**2), matrices(keys, around, strip, span**2),
        matrices(v, around, strip, span**2), mask, scale=scale) for strip in range(STRIPS)], 1)
    row, column = divide(torch.arange(out_height * out_width, device=out.device), out_width)
    (row, down), (column, across) = divide(row, tile), divide(column, tile)
    index = (row * columns + column) * tile**2 + down * tile + across
    out = out.flatten(1, 2).index_select(1, index)
    return out.unflatten(0, (batch, num_heads)).transpose(1, 2).unflatten(
        1, (out_height, out_width))
