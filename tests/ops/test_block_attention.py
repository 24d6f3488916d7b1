"""Block attention: its pattern, and its backends against dense attention under its mask."""

import functools
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from helpers.operators import TOLERANCE, compare, largest_tensor, sliding_tensors
from helpers.stack import needs_custom_ops

from acmix_mm.ops import BlockPattern, block_attention
from acmix_mm.ops.block_attention.pattern import block_tables

RANDOM = BlockPattern(4, 3)
BIGBIRD = BlockPattern(4, 3, 4, has_window=True)
PATTERNS = {
    'random': RANDOM,
    'one block': BlockPattern(2, 1, seed=5),
    'bigbird': BIGBIRD,
    'window': BlockPattern(2, 0, has_window=True),
    'many tokens': BlockPattern(2, 2, 12, has_window=True),
    'tokens without window': BlockPattern(2, 1, 5),
}
EACH = pytest.mark.parametrize('name', PATTERNS)
# Smaller than a block, not divided by blocks, and divided.
SIZES = [(1, 1), (2, 3), (9, 14), (13, 5), (8, 12)]


def mask_by_loops(pattern, height, width, stride):
    """Which positions each query attends to, by the description of the pattern."""
    side = pattern.block_size
    rows, columns = -(-height // side), -(-width // side)
    drawn = pattern.blocks(rows, columns)
    tokens = pattern.tokens(height, width, stride)
    places = list(itertools.product(range(height), range(width)))
    queries = [each for each in places if each[0] % stride == each[1] % stride == 0]
    mask = torch.zeros(len(queries), len(places), dtype=torch.bool)
    for i, (row, column) in enumerate(queries):
        block = row // side, column // side
        for j, (other_row, other_column) in enumerate(places):
            other = other_row // side, other_column // side
            is_near = max(abs(block[0] - other[0]), abs(block[1] - other[1])) <= 1
            mask[i, j] = (
                (pattern.has_window and is_near)
                or other[0] * columns + other[1] in drawn[block[0] * columns + block[1]]
                or (row, column) in tokens or (other_row, other_column) in tokens)
    return mask


def dense_attention(qkv, positions, mask, stride):
    """Dense attention under a mask, on keys minus positions."""
    q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
    q = q[:, :, ::stride, ::stride]
    size = q.shape[2:4]
    logits = q.flatten(2, 3) @ (k - positions).flatten(2, 3).mT / q.shape[-1]**0.5
    out = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v.flatten(2, 3)
    return out.transpose(1, 2).flatten(2).unflatten(1, size)


@EACH
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', SIZES)
def test_equals_dense_attention_under_the_mask(name, size, stride):
    pattern = PATTERNS[name]
    mask = mask_by_loops(pattern, *size, stride)
    assert pattern.num_pairs(*size, stride) == mask.sum()
    tensors = [each.double() for each in sliding_tensors(2, 2, 3, *size)]
    results = []
    for run in (functools.partial(dense_attention, mask=mask),
                functools.partial(block_attention, pattern=pattern, backend='sdpa'),
                functools.partial(block_attention, pattern=pattern, backend='reference')):
        leaves = [each.clone().requires_grad_() for each in tensors]
        out = run(*leaves, stride=stride)
        cotangent = torch.arange(out.numel()).view_as(out).double().sin()
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for others in results[1:]:
        for expected, actual in zip(results[0], others):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('name', ['random', 'bigbird'])
@pytest.mark.parametrize(('stride', 'heads_last'), [(1, True), (2, False)])
def test_sdpa_equals_reference(dtype, name, stride, heads_last):
    run = functools.partial(block_attention, pattern=PATTERNS[name], stride=stride)
    compare(run, sliding_tensors(2, 2, 16, 9, 14, heads_last), 'sdpa', dtype)


@EACH
def test_blocks(name):
    pattern = PATTERNS[name]
    for rows, columns in ((1, 1), (2, 2), (3, 5), (6, 4)):
        blocks = pattern.blocks(rows, columns)
        assert len(blocks) == rows * columns
        for own, others in enumerate(blocks):
            # A block is listed once, so no key counts twice.
            assert len(set(others)) == len(others)
            assert all(0 <= each < rows * columns for each in others)
            window = [each for each in range(rows * columns)
                      if abs(each // columns - own // columns) <= 1
                      and abs(each % columns - own % columns) <= 1] if pattern.has_window else []
            assert others[:len(window)] == window
            assert len(others) == min(len(window) + pattern.random_blocks, rows * columns)


def test_blocks_are_drawn_uniformly():
    """Every block outside the window is drawn about equally often."""
    counts = torch.zeros(5, 16)
    for seed in range(1000):
        drawn = BlockPattern(4, 2, seed=seed, has_window=True).blocks(4, 4)
        for row, block in enumerate((0, 1, 5, 10, 15)):
            for each in drawn[block]:
                counts[row, each] += 1
    for row, window in zip(counts / 1000, (4, 6, 9, 9, 4)):
        assert (row == 1).sum() == window
        rest = row[row < 1]
        assert len(rest) == 16 - window
        assert (rest - 2 / (16 - window)).abs().max() < 0.05


def test_seed():
    """The seed alone decides, not torch's or Python's generators."""
    drawn = RANDOM.blocks(6, 7)
    torch.manual_seed(3)
    random.seed(3)
    assert RANDOM.blocks(6, 7) == drawn
    assert RANDOM._replace(seed=1).blocks(6, 7) != drawn


def test_blocks_are_the_same_everywhere():
    """A trained network depends on them."""
    assert RANDOM.blocks(2, 3) == [[3, 5, 0], [2, 4, 3], [3, 2, 5], [2, 4, 1], [4, 1, 2], [1, 0, 2]]


def test_tables_are_cached():
    tables = block_tables(BIGBIRD, 9, 14, 1, torch.device('cpu'))
    assert block_tables(BlockPattern(4, 3, 4, has_window=True), 9, 14, 1,
                        torch.device('cpu')) is tables
    assert block_tables(BIGBIRD._replace(seed=1), 9, 14, 1, torch.device('cpu')) is not tables


@pytest.mark.parametrize(('count', 'size', 'stride', 'expected'), [
    (4, (8, 12), 1, [(2, 3), (2, 9), (6, 3), (6, 9)]),
    (4, (8, 12), 2, [(2, 2), (2, 8), (6, 2), (6, 8)]),
    (2, (4, 9), 1, [(2, 2), (2, 6)]),
    (2, (9, 4), 1, [(2, 2), (6, 2)]),
    (4, (1, 5), 1, [(0, 1), (0, 3)]),
    (16, (1, 1), 1, [(0, 0)]),
    (0, (8, 8), 1, []),
])
def test_global_positions(count, size, stride, expected):
    assert BlockPattern(4, 1, count).tokens(*size, stride) == expected


@pytest.mark.parametrize('pattern', [RANDOM, BIGBIRD], ids=['random', 'bigbird'])
def test_memory_is_linear(pattern):
    """The largest tensors are the keys or values of all blocks, and grow with the map."""
    sizes = {}
    for side in (24, 48):
        tensors = [each.requires_grad_() for each in sliding_tensors(1, 2, 8, side, side)]
        sizes[side] = largest_tensor(
            lambda tensors=tensors: block_attention(*tensors, pattern).sum().backward())
        # Behind these positions of each block are the global ones.
        positions = 16 * max(map(len, pattern.blocks(6, 6))) + pattern.global_tokens
        assert sizes[side] == side**2 // 16 * positions * 16


def test_seen_blocks_alone_have_gradients():
    qkv, positions = sliding_tensors(1, 1, 4, 16, 16)
    qkv.requires_grad_()
    block_attention(qkv, positions, RANDOM)[0, 5, 9].sum().backward()
    grads = qkv.grad[0, :, :, 2].abs().sum((2, 3))
    seen = F.max_pool2d(grads[None, None], 4).flatten().nonzero().flatten()
    assert sorted(RANDOM.blocks(4, 4)[1 * 4 + 2]) == seen.tolist()


@needs_custom_ops
@pytest.mark.parametrize('pattern', [RANDOM, BIGBIRD], ids=['random', 'bigbird'])
def test_compiles_to_one_graph_at_several_sizes(pattern):
    torch._dynamo.reset()
    run = functools.partial(block_attention, pattern=pattern)
    compiled = torch.compile(run, backend='eager', fullgraph=True)
    for size in ((9, 14), (10, 15), (12, 8)):
        tensors = sliding_tensors(1, 2, 4, *size)
        torch.testing.assert_close(compiled(*tensors), run(*tensors))


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='tiled'), 'has no backend .tiled.; it has reference, sdpa'),
    (dict(qkv=torch.zeros(1, 5, 6, 2, 2, 4)), 'takes qkv of shape'),
    (dict(positions=torch.zeros(6, 5, 4)), r'positions must be of shape \(5, 6, 4\)'),
    (dict(stride=3), 'block_size must be a multiple of the stride, got 4 for a stride of 3'),
    (dict(pattern=BlockPattern(0, 3)), 'block_size must be an integer of at least 1, got 0'),
    (dict(pattern=BlockPattern(4, 0)), 'random_blocks must be an integer of at least 1, got 0'),
    (dict(pattern=BlockPattern(4, -1, has_window=True)), 'at least 0, got -1'),
    (dict(pattern=BlockPattern(4, 3, 1.5)), 'global_tokens must be an integer .* got 1.5'),
    (dict(pattern=BlockPattern(4, 3, seed=None)), 'seed must be an integer, got None'),
])
def test_invalid_arguments(change, message):
    given = dict(zip(('qkv', 'positions'), sliding_tensors(1, 2, 4, 5, 6)), pattern=RANDOM)
    with pytest.raises(ValueError, match=message):
        block_attention(**{**given, **change})
