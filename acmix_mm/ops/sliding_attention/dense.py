"""Tiled attention for exports: all tiles of a map at once, in torch's own operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.reflection import reflect
from acmix_mm.ops.sliding_attention.tiles import tile_and_span, tile_mask
from acmix_mm.ops.symbolic import divide


def sliding_attention_dense(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                            dilation: int, scale: float) -> Tensor:
    """Compute the logits of the whole map, masked pairs included; see the backend ``'tiled'``."""
    q, k, v = qkv.unbind(3)
    batch, height, width = q.shape[:3]
    tile, span = tile_and_span(kernel_size, stride, dilation)
    out_height, out_width = ((extent + stride - 1) // stride for extent in (height, width))
    rows, columns = ((extent + tile - 1) // tile for extent in (out_height, out_width))

    def indices_of_tiles(side: int, step: int, before: int) -> Tensor:
        # One axis for all tiles: torch.export specialises axes of length one, and there may be a
        # single row or column of tiles.
        tiles, place = divide(torch.arange(rows * columns * side**2, device=qkv.device), side**2)
        row, column = (
            reflect(tile * stride * which + step * offset - before, extent)
            for which, offset, extent in zip(
                divide(tiles, columns), divide(place, side), (height, width)))
        return row * width + column

    def matrices(maps: Tensor, index: Tensor, area: int) -> Tensor:
        taken = maps.flatten(1, 2).index_select(1, index).flatten(0, 1)
        return taken.unflatten(0, (batch * rows * columns, area)).transpose(1, 2)

    around = indices_of_tiles(span, 1, dilation * (kernel_size // 2))
    mask = tile_mask(tile, span, kernel_size, stride, dilation, qkv.dtype, qkv.device)
    keys = (k - positions.unsqueeze(2)).to(k.dtype)
    out = F.scaled_dot_product_attention(
        matrices(q, indices_of_tiles(tile, stride, 0), tile**2),
        matrices(keys, around, span**2), matrices(v, around, span**2), mask, scale=scale)
    out = out.transpose(1, 2).flatten(0, 1).unflatten(0, (batch, rows * columns * tile**2))
    row, column = divide(torch.arange(out_height * out_width, device=out.device), out_width)
    (row, down), (column, across) = divide(row, tile), divide(column, tile)
    out = out.index_select(1, (row * columns + column) * tile**2 + down * tile + across)
    return out.unflatten(1, (out_height, out_width))
