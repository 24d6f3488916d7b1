"""Triton kernels of window attention, forward and backward.

A program computes one head of several windows, one after the other. The map is neither padded nor
rolled in memory: programs compute the positions that they read, and those outside of the map take
the values of padding. The gradient of the bias stays in registers, and is summed over the programs
in the end. The backward pass computes the softmax again.

The tile of a window has a power of two of keys. Up to 64 keys, a program has all queries of the
window. Larger windows are divided by queries or, for the gradients of keys and values, by keys.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix_mm.ops.backend import matmul_precision
from acmix_mm.ops.window_attention.masks import MASKED_LOGIT

LOG2_E = tl.constexpr(1.4426950408889634)
# The logits of keys beyond a window; finite, so that the softmax of rows beyond it is, too.
NO_KEY = -1e30
NO_KEY_LOGIT, MASKED = tl.constexpr(NO_KEY), tl.constexpr(MASKED_LOGIT)
# Keys of a tile: (rows per program, warps, most bytes of a row) that fit the registers and a GPU
# with 99 KiB of shared memory, found by compiling.
TILES = {16: (16, 1, 256), 32: (32, 2, 256), 64: (64, 4, 256), 128: (16, 4, 256),
         256: (16, 4, 128)}
# Registers of a thread in the backward pass, by bytes of a channel. Without a limit, the compiler
# leaves room for two programs on a multiprocessor, or fails to allocate registers at all.
MOST_REGISTERS = {2: 168, 4: 255}
# Enough programs to fill a GPU several times; more would write more sums of the bias's gradient.
PROGRAMS = 2048
# Training on images of several sizes would compile the kernels again for some of them.
SIZES = ('height', 'width', 'down', 'across', 'window_height', 'window_width', 'shift', 'offset',
         'back_y', 'back_x', 'windows', 'per_program', 'area')


def fits(window_size: Sequence[int], head_dims: int, dtype: torch.dtype) -> bool:
    """Whether the kernels support these windows and heads."""
    if window_size[0] * window_size[1] > max(TILES):
        return False
    _, _, most_bytes = TILES[block_keys(window_size)]
    return block_dims(head_dims) * dtype.itemsize <= most_bytes


def shape_of_biases(num_heads: int, window_size: Sequence[int], shift_size: int) -> list[int]:
    """Shape of what is added to the logits, in tiles: (kinds, num_heads, keys, keys).

    The kinds of windows in a shifted map are those of
    :func:`acmix_mm.ops.window_attention.masks.edge_masks`; otherwise there is one.
    """
    keys = block_keys(window_size)
    return [4 if shift_size else 1, num_heads, keys, keys]


def fill_biases(bias: Tensor, biases: Tensor, window_size: Sequence[int], shift_size: int) -> None:
    """Write what is added to the logits.

    Args:
        bias: (num_heads, area, area), any dtype and strides.
        biases: output, of the shape that :func:`shape_of_biases` returns, float32, contiguous.
        window_size: (height, width) of a window.
        shift_size: see :func:`acmix_mm.ops.window_attention`.
    """
    kinds, num_heads, keys, _ = biases.shape
    biases_kernel[(kinds * num_heads, keys // 16)](
        bias, biases, *bias.stride(), num_heads, bias.shape[1], *window_size, shift_size, KEYS=keys,
        ROWS=16)


def attend(qkv: Tensor, biases: Tensor, padding: Tensor, out: Tensor, window_size: Sequence[int],
           shift_size: int, is_rolled: bool, is_padded: bool, scale: float) -> None:
    """Attend within the windows of a map.

    Args:
        qkv: (batch, height, width, 3, num_heads, head_dims), float16, bfloat16 or float32,
            contiguous.
        biases: from :func:`fill_biases`.
        padding: queries, keys and values of positions outside of the map, (3, num_heads,
            head_dims), contiguous, any dtype.
        out: output, (batch, height, width, num_heads · head_dims), contiguous.
        window_size: (height, width) of a window.
        shift_size: see :func:`acmix_mm.ops.window_attention`.
        is_rolled: whether the map has been rolled by ``-shift_size``; if not, the kernels roll it.
        is_padded: whether it was padded to whole windows before; if not, the kernels pad it.
        scale: factor of the logits.
    """
    tiling = Tiling(qkv, window_size, shift_size, is_rolled, is_padded)
    attend_kernel[tiling.grid](qkv, biases, padding, out, *tiling.sizes, scale,
                               **tiling.constants)


def attend_backward(grad_out: Tensor, qkv: Tensor, biases: Tensor, padding: Tensor,
                    window_size: Sequence[int], shift_size: int, is_rolled: bool, is_padded: bool,
                    scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of all positions, (positions, 3, num_heads, head_dims), and of the bias.

    Those on the map come first. The gradient of the bias is in float32. See :func:`attend`;
    ``grad_out`` is contiguous, too.
    """
    tiling = Tiling(qkv, window_size, shift_size, is_rolled, is_padded)
    # Of the positions of all maps, and of those of the padding.
    positions, area = qkv.shape[:3].numel(), window_size[0] * window_size[1]
    grads = qkv.new_empty(positions + tiling.padded, *padding.shape)
    shares = qkv.new_empty(tiling.shares, *biases.shape[1:], dtype=torch.float32)
    # Of each softmax: the logarithm of its sum, and the mean that its gradient subtracts.
    sums = qkv.new_empty(2, 0 if tiling.blocks == 1 else tiling.windows, qkv.shape[4], area,
                         dtype=torch.float32)
    grad_queries_kernel[tiling.grid](qkv, biases, padding, grad_out, grads, shares, *sums,
                                     *tiling.sizes, scale, **tiling.backward_constants)
    if tiling.blocks > 1:
        grad_keys_kernel[tiling.grid](qkv, biases, padding, grad_out, grads, *sums, *tiling.sizes,
                                      scale, **tiling.backward_constants)
    return grads, shares[:, :, :area, :area].sum(0)


def block_dims(head_dims: int) -> int:
    """Channels of a head, padded for ``tl.dot``."""
    return max(triton.next_power_of_2(head_dims), 16)


def block_keys(window_size: Sequence[int]) -> int:
    """Positions of a window, padded for ``tl.dot``."""
    # By comparison, because torch.compile may trace this with symbolic sizes.
    return min(keys for keys in TILES if window_size[0] * window_size[1] <= keys)


class Tiling:
    """Division of the windows of a map among programs."""

    def __init__(self, qkv: Tensor, window_size: Sequence[int], shift_size: int,
                 is_rolled: bool, is_padded: bool) -> None:
        batch, height, width, _, num_heads, head_dims = qkv.shape
        keys = block_keys(window_size)
        rows, warps, _ = TILES[keys]
        down, across = (-(-extent // side) for extent, side in zip((height, width), window_size))
        self.window_size, self.shift_size = window_size, shift_size
        self.windows = batch * down * across
        self.padded = self.windows * window_size[0] * window_size[1] - batch * height * width
        self.blocks = triton.cdiv(window_size[0] * window_size[1], rows)
        per_program = max(triton.cdiv(self.windows * num_heads * self.blocks, PROGRAMS), 1)
        self.shares = triton.cdiv(self.windows, per_program)
        # Heads of a window run together.
        self.grid = (num_heads * self.blocks * self.shares,)
        back = -shift_size if is_rolled and not is_padded else 0
        self.sizes = (height, width, down, across, *window_size, shift_size,
                      0 if is_padded else shift_size, back % max(height, 1), back % max(width, 1),
                      self.windows, per_program, num_heads)
        self.constants = dict(HEAD_DIMS=head_dims, BLOCK_DIMS=block_dims(head_dims), ROWS=rows,
                              KEYS=keys, PRECISION=matmul_precision(), num_warps=warps)
        self.backward_constants = dict(self.constants, maxnreg=MOST_REGISTERS[qkv.element_size()])


@triton.jit(do_not_specialize=SIZES)
def biases_kernel(bias, biases, stride_n, stride_q, stride_k, num_heads, area, window_height,
                  window_width, shift, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Add the masks of windows in a shifted map to the bias, in tiles."""
    kind, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    queries = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    keys = tl.arange(0, KEYS)
    is_pair = (queries < area)[:, None] & (keys < area)[None, :]
    place = head * stride_n + queries[:, None] * stride_q + keys[None, :] * stride_k
    values = tl.load(bias + place, mask=is_pair, other=0.0).to(tl.float32)
    first_y, first_x = window_height - shift, window_width - shift
    # Rows count in kinds 2 and 3, columns in kinds 1 and 3.
    side_y, side_x = (queries // window_width >= first_y), (queries % window_width >= first_x)
    other_y, other_x = (keys // window_width >= first_y), (keys % window_width >= first_x)
    is_masked = ((side_y[:, None] != other_y[None, :]) & (kind >= 2) |
                 (side_x[:, None] != other_x[None, :]) & (kind % 2 == 1))
    values += tl.where(is_masked, MASKED, 0.0)
    place = (tl.program_id(0) * KEYS + queries)[:, None] * KEYS + keys[None, :]
    tl.store(biases + place, tl.where(is_pair, values, NO_KEY_LOGIT))


@triton.jit
def own_places(block, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Places in a window that are the rows of a program's tile."""
    if ROWS == KEYS:
        return tl.arange(0, KEYS)
    return block * ROWS + tl.arange(0, ROWS)


@triton.jit
def describe(window, height, width, down, across, window_height, window_width, shift, offset):
    """Kind of a window, see shape_of_biases, and whether it may have padding."""
    row, column = window // across % down, window % across
    kind = tl.where(row == down - 1, 2, 0) + tl.where(column == across - 1, 1, 0)
    is_beyond = (((row + 1) * window_height + offset > height) |
                 ((column + 1) * window_width + offset > width))
    return tl.where(shift > 0, kind, 0), is_beyond


@triton.jit
def locate(places, window, height, width, down, across, window_height, window_width, offset,
           back_y, back_x, windows):
    """Index of places in a window, int64, in the batch of maps.

    Returns:
        The index, valid on the map; which places are on the map; and the index of their gradients,
        of which those of padding come after all maps.
    """
    extent_y, extent_x = down * window_height, across * window_width
    y = window // across % down * window_height + places // window_width + offset
    x = window % across * window_width + places % window_width + offset
    y, x = tl.where(y < extent_y, y, y - extent_y), tl.where(x < extent_x, x, x - extent_x)
    is_on_map = (y < height) & (x < width)
    image, pixels = (window // (down * across)).to(tl.int64), height * width
    # A map that was rolled without its padding is rolled back.
    stored_y, stored_x = y + back_y, x + back_x
    stored_y = tl.where(stored_y < height, stored_y, stored_y - height)
    stored_x = tl.where(stored_x < width, stored_x, stored_x - width)
    index = image * pixels + (stored_y * width + stored_x)

    right = extent_x - width
    padded = tl.where(y < height, y * right + x - width,
                      height * right + (y - height) * extent_x + x)
    padded += windows // (down * across) * pixels + image * (extent_y * extent_x - pixels)
    is_inside = is_on_map & (places < window_height * window_width)
    return index, is_inside, tl.where(is_on_map, index, padded)


@triton.jit
def load(maps, index, dims, mask):
    """Load (positions, channels), zero where masked."""
    return tl.load(maps + index[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def pad(maps, is_inside, padding, dims, is_dim):
    """Replace (positions, channels) outside of the map."""
    values = tl.load(padding + dims, mask=is_dim, other=0.0).to(maps.dtype)
    return tl.where(is_inside[:, None], maps, values[None, :])


@triton.jit
def store(maps, index, dims, values, mask):
    """Store (positions, channels)."""
    tl.store(maps + index[:, None] + dims[None, :], values.to(maps.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(qkv, biases, padding, out, height, width, down, across, window_height,
                  window_width, shift, offset, back_y, back_x, windows, per_program, num_heads,
                  scale, HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr, ROWS: tl.constexpr,
                  KEYS: tl.constexpr, PRECISION: tl.constexpr):
    head, rest = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    blocks = tl.cdiv(window_height * window_width, ROWS)
    queries, keys = own_places(rest % blocks, ROWS, KEYS), tl.arange(0, KEYS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = dims < HEAD_DIMS
    channels = num_heads * HEAD_DIMS
    qkv += head * HEAD_DIMS
    padding += head * HEAD_DIMS
    biases += head * KEYS * KEYS + queries[:, None] * KEYS + keys[None, :]
    # The interpreter cannot use tensors as the bounds of a range.
    window = rest // blocks * per_program
    last = tl.minimum(window + per_program, windows)
    while window < last:
        own, is_own, _ = locate(queries, window, height, width, down, across, window_height,
                                window_width, offset, back_y, back_x, windows)
        index, is_inside, _ = locate(keys, window, height, width, down, across, window_height,
                                     window_width, offset, back_y, back_x, windows)
        index *= 3 * channels
        own_mask, mask = is_own[:, None] & is_dim[None, :], is_inside[:, None] & is_dim[None, :]
        q = load(qkv, own * 3 * channels, dims, own_mask)
        k = load(qkv + channels, index, dims, mask)
        v = load(qkv + 2 * channels, index, dims, mask)
        kind, is_beyond = describe(window, height, width, down, across, window_height,
                                   window_width, shift, offset)
        if is_beyond:
            k = pad(k, is_inside, padding + channels, dims, is_dim)
            v = pad(v, is_inside, padding + 2 * channels, dims, is_dim)

        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits += tl.load(biases + kind * num_heads * KEYS * KEYS)
        weights = tl.exp2(logits * LOG2_E - (tl.max(logits, 1) * LOG2_E)[:, None])
        total = tl.sum(weights, 1)
        mean = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        store(out + head * HEAD_DIMS, own * channels, dims, mean * (1.0 / total)[:, None], own_mask)
        window += 1


@triton.jit(do_not_specialize=SIZES)
def grad_queries_kernel(qkv, biases, padding, grad_out, grad_qkv, grad_bias, log_sum, mean, height,
                        width, down, across, window_height, window_width, shift, offset, back_y,
                        back_x, windows, per_program, num_heads, scale, HEAD_DIMS: tl.constexpr,
                        BLOCK_DIMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                        PRECISION: tl.constexpr):
    """Gradients of queries and bias, and of keys and values if the program has all queries.

    If not, it stores what grad_keys_kernel reads of each softmax.
    """
    area = window_height * window_width
    head, rest = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    blocks = tl.cdiv(area, ROWS)
    queries, keys = own_places(rest % blocks, ROWS, KEYS), tl.arange(0, KEYS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = dims < HEAD_DIMS
    channels = num_heads * HEAD_DIMS
    qkv += head * HEAD_DIMS
    padding += head * HEAD_DIMS
    grad_qkv += head * HEAD_DIMS
    biases += head * KEYS * KEYS + queries[:, None] * KEYS + keys[None, :]
    sum_bias = tl.zeros((ROWS, KEYS), tl.float32)
    window = rest // blocks * per_program
    last = tl.minimum(window + per_program, windows)
    while window < last:
        own, is_own, target = locate(queries, window, height, width, down, across, window_height,
                                     window_width, offset, back_y, back_x, windows)
        index, is_inside, _ = locate(keys, window, height, width, down, across, window_height,
                                     window_width, offset, back_y, back_x, windows)
        index *= 3 * channels
        target *= 3 * channels
        own_mask, mask = is_own[:, None] & is_dim[None, :], is_inside[:, None] & is_dim[None, :]
        q = load(qkv, own * 3 * channels, dims, own_mask)
        grads = load(grad_out + head * HEAD_DIMS, own * channels, dims, own_mask)
        k = load(qkv + channels, index, dims, mask)
        v = load(qkv + 2 * channels, index, dims, mask)
        kind, is_beyond = describe(window, height, width, down, across, window_height,
                                   window_width, shift, offset)
        if is_beyond:
            k = pad(k, is_inside, padding + channels, dims, is_dim)
            v = pad(v, is_inside, padding + 2 * channels, dims, is_dim)

        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits += tl.load(biases + kind * num_heads * KEYS * KEYS)
        highest = tl.max(logits, 1) * LOG2_E
        weights = tl.exp2(logits * LOG2_E - highest[:, None])
        total = tl.sum(weights, 1)
        weights *= (1.0 / total)[:, None]
        grad = tl.dot(grads, tl.trans(v), input_precision=PRECISION)
        own_mean = tl.sum(weights * grad, 1)
        grad = weights * (grad - own_mean[:, None])
        sum_bias += grad
        grad = grad.to(q.dtype)
        grad_q = tl.dot(grad, k, input_precision=PRECISION) * scale
        # Padded queries have no output: their gradient is zero.
        target_mask = (queries < area)[:, None] & is_dim[None, :]
        store(grad_qkv, target, dims, grad_q, target_mask)
        if ROWS == KEYS:
            grad_k = tl.dot(tl.trans(grad), q, input_precision=PRECISION) * scale
            grad_v = tl.dot(tl.trans(weights.to(q.dtype)), grads, input_precision=PRECISION)
            store(grad_qkv + channels, target, dims, grad_k, target_mask)
            store(grad_qkv + 2 * channels, target, dims, grad_v, target_mask)
        else:
            place = (window.to(tl.int64) * num_heads + head) * area + queries
            tl.store(log_sum + place, highest + tl.log2(total), mask=queries < area)
            tl.store(mean + place, own_mean, mask=queries < area)
        window += 1

    grad_bias += ((rest // blocks).to(tl.int64) * num_heads + head) * KEYS * KEYS
    tl.store(grad_bias + queries[:, None] * KEYS + keys[None, :], sum_bias)


@triton.jit(do_not_specialize=SIZES)
def grad_keys_kernel(qkv, biases, padding, grad_out, grad_qkv, log_sum, mean, height, width, down,
                     across, window_height, window_width, shift, offset, back_y, back_x, windows,
                     per_program, num_heads, scale, HEAD_DIMS: tl.constexpr,
                     BLOCK_DIMS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                     PRECISION: tl.constexpr):
    """A program computes a block of keys from all queries; tiles are (keys, queries)."""
    area = window_height * window_width
    head, rest = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    blocks = tl.cdiv(area, ROWS)
    keys, queries = own_places(rest % blocks, ROWS, KEYS), tl.arange(0, KEYS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = dims < HEAD_DIMS
    channels = num_heads * HEAD_DIMS
    qkv += head * HEAD_DIMS
    padding += head * HEAD_DIMS
    grad_qkv += head * HEAD_DIMS
    biases += head * KEYS * KEYS + queries[None, :] * KEYS + keys[:, None]
    window = rest // blocks * per_program
    last = tl.minimum(window + per_program, windows)
    while window < last:
        own, is_own, target = locate(keys, window, height, width, down, across, window_height,
                                     window_width, offset, back_y, back_x, windows)
        index, is_inside, _ = locate(queries, window, height, width, down, across, window_height,
                                     window_width, offset, back_y, back_x, windows)
        own *= 3 * channels
        target *= 3 * channels
        own_mask, mask = is_own[:, None] & is_dim[None, :], is_inside[:, None] & is_dim[None, :]
        k = load(qkv + channels, own, dims, own_mask)
        v = load(qkv + 2 * channels, own, dims, own_mask)
        q = load(qkv, index * 3 * channels, dims, mask)
        grads = load(grad_out + head * HEAD_DIMS, index * channels, dims, mask)
        kind, is_beyond = describe(window, height, width, down, across, window_height,
                                   window_width, shift, offset)
        if is_beyond:
            k = pad(k, is_own, padding + channels, dims, is_dim)
            v = pad(v, is_own, padding + 2 * channels, dims, is_dim)
        place = (window.to(tl.int64) * num_heads + head) * area + queries
        # exp2 of minus infinity is zero: places beyond the window are no queries.
        their_log_sum = tl.load(log_sum + place, mask=queries < area, other=float('inf'))
        their_mean = tl.load(mean + place, mask=queries < area, other=0.0)

        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        logits += tl.load(biases + kind * num_heads * KEYS * KEYS)
        weights = tl.exp2(logits * LOG2_E - their_log_sum[None, :])
        grad_v = tl.dot(weights.to(q.dtype), grads, input_precision=PRECISION)
        grad = tl.dot(v, tl.trans(grads), input_precision=PRECISION)
        grad = weights * (grad - their_mean[None, :])
        grad_k = tl.dot(grad.to(q.dtype), q, input_precision=PRECISION) * scale
        target_mask = (keys < area)[:, None] & is_dim[None, :]
        store(grad_qkv + channels, target, dims, grad_k, target_mask)
        store(grad_qkv + 2 * channels, target, dims, grad_v, target_mask)
        window += 1
