"""Tiles of queries and their surroundings, for tiled attention."""

import itertools
from collections.abc import Iterator
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size
from acmix_mm.ops.reflection import reflected_range

# Logits of a block of tiles: 2 MiB in float32, which stays in the cache of a CPU.
BLOCK_LOGITS = 2**19


def tile_and_span(kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """Sides of a tile of queries, and of the surroundings that its queries can see."""
    # Surroundings grow with the dilation; larger tiles share them among more queries.
    tile = 8 if dilation == 1 else 16
    return tile, (tile - 1) * stride + dilation * (kernel_size - 1) + 1


@cached_by_size
def tile_mask(tile: int, span: int, kernel_size: int, stride: int, dilation: int,
              dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tile², span²): zero between a query and its neighbours, minus infinity elsewhere."""
    offset = (torch.arange(span, device=device) -
              stride * torch.arange(tile, device=device)[:, None])
    near = (offset % dilation == 0) & (offset >= 0) & (offset <= dilation * (kernel_size - 1))
    masked = ~(near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = torch.zeros(masked.shape, dtype=dtype, device=device)
    return mask.masked_fill_(masked, -torch.inf)


def blocks_of_tiles(q: Tensor, kernel_size: int, stride: int, dilation: int) -> Iterator['Tiles']:
    """Divide a map into blocks: tiles of one row, as many as :data:`BLOCK_LOGITS` allows."""
    batch, height, width, num_heads, _ = q.shape
    tile, span = tile_and_span(kernel_size, stride, dilation)
    rows, columns = (-(-extent // (tile * stride)) for extent in (height, width))
    logits_of_tile = max(batch, 1) * num_heads * tile**2 * span**2
    at_once = max(BLOCK_LOGITS // logits_of_tile, 1)
    mask = tile_mask(tile, span, kernel_size, stride, dilation, q.dtype, q.device)
    axis: dict[str, Any] = dict(tile=tile, stride=stride, span=span,
                                reach=dilation * (kernel_size // 2), device=q.device)
    down = [TilesOfAxis(row, 1, height, **axis) for row in range(rows)]
    across = [TilesOfAxis(column, min(at_once, columns - column), width, **axis)
              for column in range(0, columns, at_once)]
    for each_down, each_across in itertools.product(down, across):
        yield Tiles(q, each_down, each_across, mask)


class TilesOfAxis:
    """Adjacent tiles along one axis, and their surroundings.

    Attributes:
        own: slice of the tiles among the queries.
        where: indexes the surroundings on the axis: a slice, or int64 positions if some lie beyond
            its ends and are reflected.
        parts: pairs of slices, of the surroundings and of the axis, to add one onto the other: the
            part on the axis, then each reflected position that a query can see.

    Args:
        first: index of the first tile.
        tiles: number of tiles.
        extent: length of the axis.
        tile: queries per tile.
        stride: distance between queries.
        span: length of a tile's surroundings.
        reach: distance from the first of the surroundings to the first query.
        device: of the index.
    """

    def __init__(self, first: int, tiles: int, extent: int, tile: int, stride: int, span: int,
                 reach: int, device: torch.device) -> None:
        self.tiles, self.tile, self.span, self.step = tiles, tile, span, tile * stride
        self.length = (tiles - 1) * self.step + span
        self.own = slice(first * tile, (first + tiles) * tile)
        start = first * self.step - reach
        stop = start + self.length
        inside = slice(max(start, 0), min(stop, extent))
        self.where: Union[slice, Tensor] = inside
        self.parts = [(slice(inside.start - start, inside.stop - start), inside)]
        if inside != slice(start, stop):
            # Numbers are read on the CPU: a tensor on meta has none.
            reflected = reflected_range(start, stop, extent, torch.device('cpu'))
            self.where = reflected.to(device)
            for index, (position, image) in enumerate(zip(range(start, min(stop, extent + reach)),
                                                          reflected.tolist())):
                if not 0 <= position < extent:
                    self.parts.append((slice(index, index + 1), slice(image, image + 1)))


class Tiles:
    """Adjacent tiles of one row, as stacks of matrices.

    Maps are (batch, height, width, num_heads, head_dims). Matrices are (batch · columns ·
    num_heads, positions, head_dims).
    """

    def __init__(self, q: Tensor, down: TilesOfAxis, across: TilesOfAxis, mask: Tensor) -> None:
        self.batch, self.num_heads, self.head_dims = q.shape[0], *q.shape[3:]
        self.down, self.across, self.mask = down, across, mask
        self.tile, self.span, self.columns = down.tile, down.span, across.tiles

    def own(self, maps: Tensor) -> Tensor:
        """Read the tiles, with zeros beyond the edge of the map."""
        rows = maps[:, self.down.own, self.across.own]
        bottom, right = self.tile - rows.shape[1], self.columns * self.tile - rows.shape[2]
        if bottom or right:
            rows = F.pad(rows, (0, 0, 0, 0, 0, right, 0, bottom))
        tiles = rows.unflatten(2, (self.columns, self.tile)).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(-1, self.tile**2, self.head_dims)

    def put(self, matrices: Tensor, maps: Tensor) -> None:
        """Write the tiles; the inverse of :meth:`own`."""
        tiles = matrices.view(self.batch, self.columns, self.num_heads, self.tile, self.tile,
                              self.head_dims)
        rows = maps[:, self.down.own, self.across.own]
        whole = tiles.permute(0, 3, 1, 4, 2, 5).flatten(2, 3)
        rows.copy_(whole[:, :rows.shape[1], :rows.shape[2]])

    def around(self, maps: Tensor, positions: Optional[Tensor] = None) -> Tensor:
        """Read the surroundings of the tiles, minus ``positions`` if given."""
        where_down, where_across = self.down.where, self.across.where
        if isinstance(where_down, Tensor) and isinstance(where_across, Tensor):
            where_down = where_down[:, None]
        rows = maps[:, where_down, where_across]
        if positions is not None:
            rows = (rows - positions[where_down, where_across].unsqueeze(2)).to(rows.dtype)
        spans = rows.unfold(2, self.span, self.across.step).permute(0, 2, 3, 1, 5, 4)
        return spans.reshape(-1, self.span**2, self.head_dims)

    def add(self, matrices: Tensor, maps: Tensor) -> None:
        """Add surroundings onto a map; the transpose of :meth:`around`."""
        spans = matrices.view(self.batch, self.columns, self.num_heads, self.span, self.span,
                              self.head_dims).permute(0, 3, 1, 2, 5, 4)
        step, length = self.across.step, self.across.length
        rows = maps.new_zeros(self.batch, self.span, length, self.num_heads, self.head_dims)
        # Tiles this far apart have disjoint surroundings, which can be added at once.
        apart = -(-self.span // step)
        for first in range(min(apart, self.columns)):
            disjoint = rows[:, :, first * step:].unfold(2, self.span, apart * step)
            disjoint.add_(spans[:, :, first::apart])
        for from_row, to_row in self.down.parts:
            for from_column, to_column in self.across.parts:
                maps[:, to_row, to_column] += rows[:, from_row, from_column]
