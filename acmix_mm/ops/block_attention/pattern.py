"""Which positions of a map attend to which, by blocks."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size, constant_in_graphs

# Tables are computed here, whatever torch's default device is: a tensor on meta has no values.
CPU = torch.device('cpu')


class BlockPattern(NamedTuple):
    """A pattern of attention between square blocks of positions.

    The map is divided into blocks from its top left corner; those at its bottom and right may be
    smaller. All queries of a block attend to the same blocks:

    - with ``has_window``, to their own block and the up to eight around it;
    - to ``random_blocks`` others, drawn without replacement from all blocks that are not in the
      window, or to all of these if there are fewer. They are drawn for each size of the map from
      ``seed`` alone, so they do not depend on the device or the process.

    Besides, some positions of the map are global: they attend to all positions, and all positions
    attend to them. These are existing positions (the paper's BigBird-ITC) rather than additional
    tokens (BigBird-ETC): a backbone's blocks exchange maps, so what an additional token gathers in
    one block could not be read in the next, while a position of the map carries it on. The paper
    takes the first tokens of a text; a map has no such place, and they are spread evenly.

    Attributes:
        block_size: side of a block.
        random_blocks: number of random blocks for each block.
        global_tokens: number of global positions, on a grid that is as square as their number
            allows. A map with fewer rows or columns than the grid has fewer of them.
        seed: seed of the random blocks.
        has_window: whether the window belongs to the pattern.
    """

    block_size: int
    random_blocks: int
    global_tokens: int = 0
    seed: int = 0
    has_window: bool = False

    def check(self, stride: int = 1) -> None:
        """Raise ValueError if the pattern is invalid, or a stride does not divide its blocks."""
        for name, least in (('block_size', 1), ('random_blocks', int(not self.has_window)),
                            ('global_tokens', 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f'{name} must be an integer of at least {least}, got {value!r}.')
        if not isinstance(self.seed, int):
            raise ValueError(f'seed must be an integer, got {self.seed!r}.')
        if self.block_size % stride:
            raise ValueError(f'block_size must be a multiple of the stride, got {self.block_size} '
                             f'for a stride of {stride}.')

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of blocks of a map."""
        rows, columns = (-(-extent // self.block_size) for extent in (height, width))
        return rows, columns

    def blocks(self, rows: int, columns: int) -> list[list[int]]:
        """For each block of a grid, in row-major order, the indices of those it attends to."""
        generator = random.Random(self.seed)
        attended = []
        for row, column in itertools.product(range(rows), range(columns)):
            window = [] if not self.has_window else [
                down * columns + across
                for down in range(max(row - 1, 0), min(row + 2, rows))
                for across in range(max(column - 1, 0), min(column + 2, columns))]
            others = rows * columns - len(window)
            drawn = generator.sample(range(others), min(self.random_blocks, others))
            # Numbers among the blocks outside the window become numbers among all blocks.
            for each in window:
                drawn = [block + (block >= each) for block in drawn]
            attended.append(window + drawn)
        return attended

    def tokens(self, height: int, width: int, stride: int) -> list[tuple[int, int]]:
        """Rows and columns of the global positions, all of which are queries."""
        if not self.global_tokens:
            return []
        sides = [side for side in range(1, math.isqrt(self.global_tokens) + 1)
                 if self.global_tokens % side == 0]
        down, across = sides[-1], self.global_tokens // sides[-1]
        if height > width:
            down, across = across, down
        rows, columns = (
            sorted({(2 * index + 1) * queries // (2 * count) * stride for index in range(count)})
            for count, queries in ((down, -(-height // stride)), (across, -(-width // stride))))
        return list(itertools.product(rows, columns))

    def num_pairs(self, height: int, width: int, stride: int = 1) -> int:
        """Number of pairs of a query and a position that it attends to."""
        tables = block_tables(self, height, width, stride, CPU)
        sides = [torch.arange(0, extent, stride, device=CPU) // self.block_size
                 for extent in (height, width)]
        down, across = (side.bincount() for side in sides)
        queries = (down[:, None] * across).flatten()
        keys = tables.keys_of_blocks()
        pairs = int((queries * keys).sum())
        for row, column in self.tokens(height, width, stride):
            block = row // self.block_size * len(across) + column // self.block_size
            pairs += height * width - int(keys[block])
        return pairs

    def attended(self, height: int, width: int, queries: Tensor, stride: int = 1) -> Tensor:
        """The positions that some queries attend to.

        Args:
            height: height of the map.
            width: width of the map.
            queries: indices of their positions in row-major order, (queries,), int64.
            stride: distance between queries.

        Returns:
            (queries, height · width), bool.
        """
        rows, columns = self.grid(height, width)
        sees = torch.zeros(rows * columns, rows * columns, dtype=torch.bool, device=CPU)
        for block, others in enumerate(self.blocks(rows, columns)):
            sees[block, others] = True
        position = torch.arange(height * width, device=CPU)
        block_of = (position // width // self.block_size * columns +
                    position % width // self.block_size)
        is_token = torch.zeros(height * width, dtype=torch.bool, device=CPU)
        for row, column in self.tokens(height, width, stride):
            is_token[row * width + column] = True
        queries = queries.cpu()
        return sees[block_of[queries]][:, block_of] | is_token | is_token[queries, None]


class BlockTables(NamedTuple):
    """Index tables of a pattern on a map.

    Attributes:
        blocks: for each block, the blocks that it attends to, (blocks, most), int64; lists that are
            shorter repeat their last block.
        mask: for each block, which of the positions of these blocks and of the global positions
            behind them are its keys, (blocks, most · block_size² + global positions), bool; None if
            all are.
        tokens: indices of the global positions on the map, (global positions,), int64.
        queries: their indices among the queries.
        block_area: number of positions of a block.
    """

    blocks: Tensor
    mask: Optional[Tensor]
    tokens: Tensor
    queries: Tensor
    block_area: int

    def keys_of_blocks(self) -> Tensor:
        """Number of positions that the queries of each block attend to, (blocks,), int64."""
        if self.mask is not None:
            return self.mask.sum(1)
        return self.blocks.new_full(self.blocks.shape[:1], self.blocks.shape[1] * self.block_area)


# A constant of the graph: torch.compile does not know the generator, and would unroll the loops.
@cached_by_size
@constant_in_graphs
def block_tables(pattern: BlockPattern, height: int, width: int, stride: int,
                 device: torch.device) -> BlockTables:
    """The index tables of a pattern on a map, all arguments being fixed numbers."""
    side = pattern.block_size
    rows, columns = pattern.grid(height, width)
    lists = pattern.blocks(rows, columns)
    places = pattern.tokens(height, width, stride)
    most = max(map(len, lists))
    blocks = torch.tensor([each + each[-1:] * (most - len(each)) for each in lists], device=CPU)
    mask = None
    if places or min(map(len, lists)) < most or height % side or width % side:
        lengths = torch.tensor([len(each) for each in lists], device=CPU)
        is_listed = torch.arange(most, device=CPU) < lengths[:, None]
        down, across = (torch.arange(count * side, device=CPU).view(count, side) < extent
                        for count, extent in ((rows, height), (columns, width)))
        on_map = (down[:, None, :, None] & across[:, None, :]).flatten(2).flatten(0, 1)
        keys = (on_map[blocks] & is_listed[..., None]).flatten(1)
        # A global position in one of the blocks is a key already.
        homes = torch.tensor([row // side * columns + column // side for row, column in places],
                             dtype=torch.int64, device=CPU)
        mask = torch.cat([keys, (blocks[..., None] != homes).all(1)], 1)
    out_width = -(-width // stride)
    tokens, queries = (torch.tensor(index, dtype=torch.int64, device=CPU) for index in (
        [row * width + column for row, column in places],
        [row // stride * out_width + column // stride for row, column in places]))
    return BlockTables(blocks.to(device), None if mask is None else mask.to(device),
                       tokens.to(device), queries.to(device), side**2)


def divide(maps: Tensor, side: int, grid: Sequence[int]) -> Tensor:
    """Divide a map into blocks.

    Args:
        maps: (batch, height, width, num_heads, head_dims).
        side: side of a block.
        grid: rows and columns of blocks; together, at least as large as the map.

    Returns:
        (batch · num_heads, rows · columns, side², head_dims), with zeros beyond the map.
    """
    rows, columns = grid
    bottom, right = rows * side - maps.shape[1], columns * side - maps.shape[2]
    if bottom or right:
        maps = torch.nn.functional.pad(maps, (0, 0, 0, 0, 0, right, 0, bottom))
    blocks = maps.unflatten(2, (columns, side)).unflatten(1, (rows, side))
    return blocks.permute(0, 5, 1, 3, 2, 4, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def join(blocks: Tensor, side: int, grid: Sequence[int], num_heads: int) -> Tensor:
    """The inverse of :func:`divide`, with what lies beyond the map: (batch, rows · side, columns ·
    side, num_heads, head_dims).
    """
    blocks = blocks.unflatten(2, (side, side)).unflatten(1, tuple(grid)).unflatten(
        0, (len(blocks) // num_heads, num_heads))
    return blocks.permute(0, 2, 4, 3, 5, 1, 6).flatten(3, 4).flatten(1, 2)
