"""The positions that attention reads, where these are not a neighbourhood of the query.

A pattern has no parameters. A layer with another pattern has the same projections, position
encoding and, with ACmix, convolution path, so that only the pattern differs.
"""

import inspect
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from acmix_mm.layers.point_attention import PointAttention, softmax
from acmix_mm.ops import BlockPattern, block_attention, global_attention


class AttentionPattern:
    """Attention from the positions of a map to those that :meth:`attended` names.

    A subclass implements all methods but :meth:`point`. Sizes are (height, width).
    """

    def check(self, stride: int) -> None:
        """Raise ValueError if the pattern is invalid, or does not support a stride."""

    def attend(self, qkv: Tensor, positions: Tensor, *, stride: int = 1,
               scale: Optional[float] = None, dropout_p: float = 0.0) -> Tensor:
        """Run the operator; see :func:`acmix_mm.ops.global_attention`."""
        raise NotImplementedError

    def num_pairs(self, size: tuple[int, int], stride: int) -> int:
        """Number of pairs of a query and a position that it attends to."""
        raise NotImplementedError

    def attended(self, size: tuple[int, int], stride: int, row: int, column: int) -> Tensor:
        """The positions that one position attends to, (height, width), bool, on the CPU."""
        raise NotImplementedError

    def point(self, q: Tensor, k: Tensor, positions: Tensor, stride: int, scale: float, row: int,
              column: int) -> PointAttention:
        """The attention weights of one position: softmax_j(scale · q_i · (k_j + p_i − p_j)).

        Args:
            q: its query, (num_heads, head_dims).
            k: all keys, (height, width, num_heads, head_dims).
            positions: their position encoding, (height, width, head_dims).
            stride: distance between the queries of the layer.
            scale: factor of the logits.
            row: row of the position.
            column: its column.
        """
        size = (k.shape[0], k.shape[1])
        attended = self.attended(size, stride, row, column).to(k.device)
        relative = positions[row, column] - positions
        logits = scale * torch.einsum('nd,rcnd->nrc', q, k + relative[:, :, None].to(k.dtype))
        weights = softmax(logits.masked_fill(~attended, -torch.inf))
        return PointAttention(weights, 1, int(attended.sum()), True)


class GlobalPattern(AttentionPattern):
    """Every position attends to all positions."""

    def attend(self, qkv: Tensor, positions: Tensor, *, stride: int = 1,
               scale: Optional[float] = None, dropout_p: float = 0.0) -> Tensor:
        return global_attention(qkv, positions, stride=stride, scale=scale, dropout_p=dropout_p)

    def num_pairs(self, size: tuple[int, int], stride: int) -> int:
        height, width = size
        return -(-height // stride) * -(-width // stride) * height * width

    def attended(self, size: tuple[int, int], stride: int, row: int, column: int) -> Tensor:
        return torch.ones(size, dtype=torch.bool, device='cpu')

    def __repr__(self) -> str:
        return 'GlobalPattern()'


class BlockedPattern(AttentionPattern):
    """Blocks of positions attend to each other.

    Args:
        blocks: which blocks; see :class:`acmix_mm.ops.BlockPattern`.
    """

    def __init__(self, blocks: BlockPattern) -> None:
        self.blocks = blocks

    def check(self, stride: int) -> None:
        self.blocks.check(stride)

    def attend(self, qkv: Tensor, positions: Tensor, *, stride: int = 1,
               scale: Optional[float] = None, dropout_p: float = 0.0) -> Tensor:
        return block_attention(qkv, positions, self.blocks, stride=stride, scale=scale,
                               dropout_p=dropout_p)

    def num_pairs(self, size: tuple[int, int], stride: int) -> int:
        return self.blocks.num_pairs(*size, stride)

    def attended(self, size: tuple[int, int], stride: int, row: int, column: int) -> Tensor:
        query = torch.tensor([row * size[1] + column], device='cpu')
        return self.blocks.attended(*size, query, stride).view(size)

    def __repr__(self) -> str:
        return repr(self.blocks)


def random_pattern(block_size: int = 4, random_blocks: int = 3, seed: int = 0) -> BlockedPattern:
    """Each block of queries attends to random blocks of keys.

    By default, these have 48 positions, about as many as a window of 7×7.

    Args:
        block_size: side of a block; a multiple of the layer's stride.
        random_blocks: number of blocks that each block attends to.
        seed: seed from which they are drawn, once for each size of the map.
    """
    return BlockedPattern(BlockPattern(block_size, random_blocks, seed=seed))


def bigbird_pattern(block_size: int = 4, random_blocks: int = 3, global_tokens: int = 16,
                    seed: int = 0) -> BlockedPattern:
    """Window, random blocks and global tokens: BigBird (arXiv 2007.14062) in two dimensions.

    Args:
        block_size: side of a block; a multiple of the layer's stride. The window is that of 3×3
            blocks.
        random_blocks: number of blocks that each block attends to outside its window.
        global_tokens: number of global positions. By default as many as a block has; the paper
            makes two blocks global.
        seed: seed from which the random blocks are drawn, once for each size of the map.
    """
    return BlockedPattern(BlockPattern(block_size, random_blocks, global_tokens, seed, True))


class PatternType(NamedTuple):
    """What the name of a token mixer stands for.

    Attributes:
        pattern: makes the pattern from its options.
        mix: see :class:`acmix_mm.layers.base.TwoPathLayer`.
    """

    pattern: Callable[..., AttentionPattern]
    mix: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options of the pattern."""
        return tuple(inspect.signature(self.pattern).parameters)

    def split(self, arguments: dict[str, Any]) -> tuple[AttentionPattern, dict[str, Any]]:
        """Make the pattern, and return it with the other arguments, which include ``mix``."""
        own = {name: value for name, value in arguments.items() if name in self.options}
        others = {name: value for name, value in arguments.items() if name not in own}
        return self.pattern(**own), {'mix': self.mix, **others}


# The token mixers with such a pattern, by the name of their type in configs.
PATTERN_TYPES = {
    'GlobalAttention': PatternType(GlobalPattern, 'attn'),
    'GlobalACmix': PatternType(GlobalPattern, 'acmix'),
    'RandomAttention': PatternType(random_pattern, 'attn'),
    'BigBirdAttention': PatternType(bigbird_pattern, 'attn'),
}
