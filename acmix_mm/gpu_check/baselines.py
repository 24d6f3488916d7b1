"""What operators are measured against: attention and convolution of torch, cuDNN and NATTEN."""

import functools
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# flex_attention skips blocks of 128 queries and 128 keys; pixels are ordered in tiles of that many.
TILE_HEIGHT, TILE_WIDTH = 8, 16
BLOCK = TILE_HEIGHT * TILE_WIDTH


def neighbourhood_flex(height: int, width: int, kernel_size: int, device: str) -> Callable:
    """Sliding attention by flex_attention, compiled; neighbours outside the map are left out.

    Returns:
        A function of queries, keys and values, (batch, num_heads, height · width, head_dims), whose
        pixels are ordered in tiles of 8×16.

    Raises:
        ImportError: torch has no flex_attention.
    """
    from torch.nn.attention.flex_attention import flex_attention
    mask = neighbourhood_mask(height, width, kernel_size, device)
    run = torch.compile(flex_attention, dynamic=False) if device != 'cpu' else flex_attention
    return functools.partial(run, block_mask=mask)


def neighbourhood_mask(height: int, width: int, kernel_size: int, device: str) -> object:
    """The ``BlockMask`` of a neighbourhood, made block by block: a dense one would have
    (height · width)² elements.

    Args:
        height: a multiple of 8.
        width: a multiple of 16.
        kernel_size: at most 17, so that neighbours lie in adjacent tiles.
        device: of the mask.
    """
    from torch.nn.attention.flex_attention import BlockMask
    across = width // TILE_WIDTH
    tiles = torch.arange(height // TILE_HEIGHT * across, device=device)
    near = (tiles[:, None] // across - tiles // across).abs() <= 1
    near &= (tiles[:, None] % across - tiles % across).abs() <= 1
    counts = near.sum(1, dtype=torch.int32)
    indices = near.int().argsort(dim=1, descending=True, stable=True).int()

    def is_neighbour(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        (query_y, query_x), (key_y, key_x) = (place_in_tiles(each, across) for each in (query, key))
        reach = kernel_size // 2
        return ((query_y - key_y).abs() <= reach) & ((query_x - key_x).abs() <= reach)
    return BlockMask.from_kv_blocks(counts[None, None], indices[None, None], BLOCK_SIZE=BLOCK,
                                    mask_mod=is_neighbour)


def place_in_tiles(index: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """Row and column of a pixel, from its index; ``across`` is the number of tiles in a row."""
    tile, within = index // BLOCK, index % BLOCK
    return (tile // across * TILE_HEIGHT + within // TILE_WIDTH,
            tile % across * TILE_WIDTH + within % TILE_WIDTH)


def window_flex(device: str) -> Callable:
    """Window attention without shift by flex_attention, compiled.

    Returns:
        A function of queries, keys and values, (windows, num_heads, area, head_dims), and the bias,
        (num_heads, area, area).

    Raises:
        ImportError: torch has no flex_attention.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor,
                     key: Tensor) -> Tensor:
            return score + bias[head, query, key]
        return flex_attention(q, k, v, score_mod=add_bias)
    return torch.compile(attend, dynamic=False) if device != 'cpu' else attend


def natten(kernel_size: int) -> Callable:
    """NATTEN's neighbourhood attention, a function of (batch, height, width, heads, head_dims).

    Its neighbourhoods lie inside the map: at the border they are not centred on the query.

    Raises:
        ImportError: NATTEN is not installed.
    """
    from natten.functional import na2d
    return functools.partial(na2d, kernel_size=kernel_size)


def dense_conv(x: Tensor, kernels: Tensor) -> Tensor:
    """A 3×3 convolution of (batch, height, width, channels), in that layout."""
    kernels = kernels.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x.permute(0, 3, 1, 2), kernels, padding=1).permute(0, 2, 3, 1)
