"""Triton kernels of sliding-window attention, forward and backward.

These take any stride, dilation and size; strip_kernels.py is faster where it applies. A program
computes a tile of queries of one head. It reads the keys around the tile in chunks of a
few rows, with a streamed softmax (arXiv 2205.14135); pairs that are not neighbours are masked.
Beyond the inputs, the output and the gradients, no tensor has the size of the maps.

Dilation divides a map into dilation² interleaved phases. Queries attend to keys of their own phase
only, and within a phase, neighbours are adjacent. Positions outside the map are virtual: they are
read from the positions that reflection padding maps them to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix_mm.ops.backend import matmul_precision
from acmix_mm.ops.sliding_attention import strip_kernels

LOG2_E = tl.constexpr(1.4426950408889634)
# (largest size of a query in bytes, side of a tile of queries, keys per chunk) that fit a GPU with
# 99 KiB of shared memory, found by compiling.
TILINGS = ((64, 8, 64), (256, 8, 32), (512, 4, 32))
# Training on images of several sizes would compile the kernels again for some of them.
SIZES = ('height', 'width', 'out_height', 'out_width', 'tiles_down', 'tiles_across', 'batch',
         'blocks', 'copies_across', 'copies')
# Positions of a row, and most channels, that a program folds.
FOLDED_COLUMNS, MAX_FOLDED_CHANNELS = 32, 64


def fits(head_dims: int, dtype: torch.dtype) -> bool:
    """Whether the kernels support heads of this width; wider ones exceed the shared memory."""
    return row_bytes(head_dims, dtype) <= TILINGS[-1][0]


def attend(qkv: Tensor, positions: Tensor, out: Tensor, log_sum: Tensor, kernel_size: int,
           stride: int, dilation: int, scale: float) -> None:
    """Attend from every stride-th position to its neighbourhood.

    Args:
        qkv: (batch, height, width, 3, num_heads, head_dims), float16, bfloat16 or float32, any
            strides; fastest if the channels of a head are adjacent in memory.
        positions: subtracted from the keys, (height, width, head_dims), float32.
        out: output, (batch, out height, out width, num_heads, head_dims), contiguous.
        log_sum: output, the base-2 logarithm of the sum of each softmax, (batch, out height,
            out width, num_heads), float32, contiguous.
        kernel_size: side of the neighbourhood, odd.
        stride: distance between queries; must be 1 if ``dilation`` is not.
        dilation: distance between neighbours.
        scale: factor of the logits.
    """
    q, k, v = qkv.unbind(3)
    if strip_kernels.covers(q, kernel_size, stride, dilation):
        strip_kernels.attend(qkv, positions, out, log_sum, kernel_size, scale)
        return
    tiling = Tiling(q, kernel_size, stride, dilation)
    tiles = tiling.tiles(*out.shape[1:3])
    attend_kernel[tiling.programs(tiles)](
        q, k, v, positions.contiguous(), out, log_sum, *q.stride(), *q.shape[1:3], *out.shape[1:4],
        *tiles, scale, **tiling.constants(tiling.keys_across))


def attend_backward(grad_out: Tensor, qkv: Tensor, positions: Tensor, out: Tensor,
                    log_sum: Tensor, grad_qkv: Tensor, kernel_size: int, stride: int,
                    dilation: int, scale: float) -> None:
    """Write the gradient to ``grad_qkv``, in the strides of ``qkv``."""
    q, k, v = qkv.unbind(3)
    if strip_kernels.covers(q, kernel_size, stride, dilation):
        strip_kernels.attend_backward(grad_out, qkv, positions, out, log_sum, grad_qkv, kernel_size,
                                      scale)
        return
    grad_q = grad_qkv[:, :, :, 0]
    positions, grad_out = positions.contiguous(), grad_out.contiguous()
    batch, height, width, num_heads, head_dims = q.shape
    mean = torch.empty_like(log_sum)
    tiling = Tiling(q, kernel_size, stride, dilation)
    tiles = tiling.tiles(*out.shape[1:3])
    grad_queries_kernel[tiling.programs(tiles)](
        q, k, v, positions, out, grad_out, log_sum, mean, grad_q, *q.stride(), height, width,
        *out.shape[1:4], *tiles, scale, **tiling.constants(tiling.keys_across))

    reach = dilation * (kernel_size // 2)
    padded = q.new_empty(2, batch, height + 2 * reach, width + 2 * reach, num_heads, head_dims)
    tiles = tiling.tiles(*padded.shape[2:4])
    grad_keys_kernel[tiling.programs(tiles)](
        q, k, v, positions, grad_out, log_sum, mean, *padded, *q.stride(), height, width,
        *out.shape[1:4], *tiles, scale, **tiling.constants(tiling.queries_across))
    fold(padded, grad_qkv, reach, stride)


def fold(padded: Tensor, grad_qkv: Tensor, reach: int, stride: int) -> None:
    """Write the gradients of keys and values, and zero for queries without an output.

    Args:
        padded: those of a map with reflection padding, (2, batch, height + 2 · reach, width +
            2 · reach, num_heads, head_dims), contiguous.
        grad_qkv: output, (batch, height, width, 3, num_heads, head_dims), any strides.
        reach: width of the padding.
        stride: distance between queries.
    """
    batch, height, width, _, num_heads, head_dims = grad_qkv.shape
    channels = num_heads * head_dims
    block = min(triton.next_power_of_2(channels), MAX_FOLDED_CHANNELS)
    blocks = triton.cdiv(width, FOLDED_COLUMNS)
    down, across = (2 * (2 * reach // max(2 * (extent - 1), 1)) + 3 for extent in (height, width))
    fold_kernel[(batch * height * blocks, triton.cdiv(channels, block), 2 if stride == 1 else 3)](
        padded, grad_qkv, *grad_qkv.stride(), batch, height, width, blocks, across, down * across,
        CHANNELS=channels, HEAD_DIMS=head_dims, BLOCK_CHANNELS=block, COLUMNS=FOLDED_COLUMNS,
        REACH=reach, STRIDE=stride)


def row_bytes(head_dims: int, dtype: torch.dtype) -> int:
    """Size of a query in a tile, its channels padded for ``tl.dot``."""
    return max(triton.next_power_of_2(head_dims), 16) * dtype.itemsize


class Tiling:
    """Division of a map into tiles, one per program, and of their surroundings into chunks."""

    def __init__(self, q: Tensor, kernel_size: int, stride: int, dilation: int) -> None:
        self.batch, _, _, self.num_heads, self.head_dims = q.shape
        self.dtype = q.dtype
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        size = row_bytes(self.head_dims, q.dtype)
        self.tile, self.chunk = next(rest for most, *rest in TILINGS if size <= most)

    @property
    def keys_across(self) -> int:
        """Number of keys that the queries of a tile can see, along one axis."""
        return (self.tile - 1) * self.stride + self.kernel_size

    @property
    def queries_across(self) -> int:
        """Upper bound of the number of queries that can see the keys of a tile, along one axis."""
        return (self.tile + self.kernel_size - 2) // self.stride + 2

    def tiles(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles in the largest phase of a map."""
        step = self.tile * self.dilation
        return -(-height // step), -(-width // step)

    def programs(self, tiles: tuple[int, int]) -> tuple[int]:
        """The grid of a kernel."""
        return (self.num_heads * self.dilation**2 * tiles[0] * tiles[1] * self.batch,)

    def constants(self, across: int) -> dict:
        """The constants and options of a kernel that reads surroundings of side ``across``."""
        columns = triton.next_power_of_2(across)
        rows = max(self.chunk // columns, 1)
        return dict(
            HEAD_DIMS=self.head_dims, BLOCK_DIMS=max(triton.next_power_of_2(self.head_dims), 16),
            KERNEL_SIZE=self.kernel_size, STRIDE=self.stride, DILATION=self.dilation,
            TILE_SIDE=self.tile, ROWS=rows, COLUMNS=columns, CHUNKS=-(-across // rows),
            PRECISION=matmul_precision(), num_warps=4,
            num_stages=2 if self.dtype.itemsize == 2 else 1)


@triton.jit
def reflect(position, extent):
    """Reflect positions into an axis, as :func:`acmix_mm.ops.reflection.reflect` does."""
    period = tl.maximum(2 * (extent - 1), 1)
    position = position % period
    # The remainder of a negative number is negative, as in C.
    position = tl.where(position < 0, position + period, position)
    return tl.minimum(position, period - position)


@triton.jit
def locate(num_heads, tiles_down, tiles_across, stride_b, stride_n, stride_d,
           HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr, DILATION: tl.constexpr):
    """What a program works on; those of the heads of a tile run together.

    Returns:
        head, image, phase_y, phase_x, tile_y, tile_x; the indices of channels, (BLOCK_DIMS,), and
        which of them exist, (1, BLOCK_DIMS); the offset of the head in the maps, and those of its
        channels.
    """
    rest = tl.program_id(0)
    head, rest = rest % num_heads, rest // num_heads
    tile_x, rest = rest % tiles_across, rest // tiles_across
    tile_y, rest = rest % tiles_down, rest // tiles_down
    phase_x, rest = rest % DILATION, rest // DILATION
    phase_y, image = rest % DILATION, (rest // DILATION).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIMS)
    return (head, image, phase_y, phase_x, tile_y, tile_x, dims, (dims < HEAD_DIMS)[None, :],
            image * stride_b + head * stride_n, dims * stride_d)


@triton.jit
def load_rows(maps, offsets, dims, mask):
    """Load (positions, BLOCK_DIMS) of a map, zero where ``mask`` is false."""
    return tl.load(maps + offsets[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(k, positions, key_y, key_x, stride_y, stride_x, map_dims, width, dims, mask,
              HEAD_DIMS: tl.constexpr):
    """Load keys and subtract their position encoding in float32: (positions, BLOCK_DIMS)."""
    keys = load_rows(k, key_y * stride_y + key_x * stride_x, map_dims, mask).to(tl.float32)
    encoding = load_rows(positions, (key_y * width + key_x) * HEAD_DIMS, dims, mask)
    return (keys - encoding).to(k.dtype.element_ty)


@triton.jit
def load_queries(q, head, image, phase_y, phase_x, tile_y, tile_x, stride_y, stride_x, map_dims,
                 out_height, out_width, num_heads, is_dim, STRIDE: tl.constexpr,
                 DILATION: tl.constexpr, TILE_SIDE: tl.constexpr):
    """Load the queries of a tile.

    Returns:
        Row and column in the tile, which queries exist, and which of their channels; their offsets
        in the maps and in the output; the queries, (TILE_SIDE², BLOCK_DIMS).
    """
    own = tl.arange(0, TILE_SIDE * TILE_SIDE)
    own_y, own_x = own // TILE_SIDE, own % TILE_SIDE
    out_y = phase_y + DILATION * (tile_y * TILE_SIDE + own_y)
    out_x = phase_x + DILATION * (tile_x * TILE_SIDE + own_x)
    is_own = (out_y < out_height) & (out_x < out_width)
    own_mask = is_own[:, None] & is_dim
    place = out_y * STRIDE * stride_y + out_x * STRIDE * stride_x
    place_out = ((image * out_height + out_y) * out_width + out_x) * num_heads + head
    return (own_y, own_x, is_own, own_mask, place, place_out,
            load_rows(q, place, map_dims, own_mask))


@triton.jit
def are_near(down, across, KERNEL_SIZE: tl.constexpr):
    """Whether a key is a neighbour, from its offset to the first neighbour of the query."""
    return (down >= 0) & (down < KERNEL_SIZE) & (across >= 0) & (across < KERNEL_SIZE)


@triton.jit
def load_chunk(chunk, queries, own_y, own_x, k, v, positions, phase_y, phase_x, tile_y, tile_x,
               stride_y, stride_x, map_dims, height, width, dims, is_dim, scale,
               HEAD_DIMS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
               DILATION: tl.constexpr, TILE_SIDE: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Load a chunk of the keys and values around a tile and compute its logits.

    Returns:
        Keys and values, (keys, BLOCK_DIMS), and the logits times log2(e), (queries, keys): minus
        infinity if a key is not a neighbour.
    """
    index = tl.arange(0, ROWS * COLUMNS)
    row, column = chunk * ROWS + index // COLUMNS, index % COLUMNS
    key_y = tile_y * TILE_SIDE * STRIDE + row - KERNEL_SIZE // 2
    key_x = tile_x * TILE_SIDE * STRIDE + column - KERNEL_SIZE // 2
    key_y = reflect(phase_y + DILATION * key_y, height)
    key_x = reflect(phase_x + DILATION * key_x, width)
    keys = load_keys(k, positions, key_y, key_x, stride_y, stride_x, map_dims, width, dims, is_dim,
                     HEAD_DIMS)
    values = load_rows(v, key_y * stride_y + key_x * stride_x, map_dims, is_dim)
    near = are_near(row[None, :] - own_y[:, None] * STRIDE,
                    column[None, :] - own_x[:, None] * STRIDE, KERNEL_SIZE)
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
    return keys, values, tl.where(near, logits, -float('inf'))


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(q, k, v, positions, out, log_sum, stride_b, stride_y, stride_x, stride_n,
                  stride_d, height, width, out_height, out_width, num_heads, tiles_down,
                  tiles_across, scale, HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
                  KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
                  TILE_SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    head, image, phase_y, phase_x, tile_y, tile_x, dims, is_dim, map_base, map_dims = locate(
        num_heads, tiles_down, tiles_across, stride_b, stride_n, stride_d, HEAD_DIMS, BLOCK_DIMS,
        DILATION)
    own_y, own_x, is_own, own_mask, _place, place_out, queries = load_queries(
        q + map_base, head, image, phase_y, phase_x, tile_y, tile_x, stride_y, stride_x, map_dims,
        out_height, out_width, num_heads, is_dim, STRIDE, DILATION, TILE_SIDE)

    highest = tl.full((TILE_SIDE * TILE_SIDE,), -1e30, tl.float32)
    total = tl.zeros((TILE_SIDE * TILE_SIDE,), tl.float32)
    mean = tl.zeros((TILE_SIDE * TILE_SIDE, BLOCK_DIMS), tl.float32)
    for chunk in range(CHUNKS):
        _, values, logits = load_chunk(
            chunk, queries, own_y, own_x, k + map_base, v + map_base, positions, phase_y, phase_x,
            tile_y, tile_x, stride_y, stride_x, map_dims, height, width, dims, is_dim, scale,
            HEAD_DIMS, KERNEL_SIZE, STRIDE, DILATION, TILE_SIDE, ROWS, COLUMNS, PRECISION)
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        mean = mean * shrink[:, None]
        mean += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        highest = new_highest

    tl.store(log_sum + place_out, highest + tl.log2(total), mask=is_own)
    tl.store(out + place_out[:, None] * HEAD_DIMS + dims[None, :],
             (mean / total[:, None]).to(out.dtype.element_ty), mask=own_mask)


@triton.jit(do_not_specialize=SIZES)
def grad_queries_kernel(q, k, v, positions, out, grad_out, log_sum, mean, grad_q, stride_b,
                        stride_y, stride_x, stride_n, stride_d, height, width, out_height,
                        out_width, num_heads, tiles_down, tiles_across, scale,
                        HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
                        KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
                        TILE_SIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                        CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """Also stores output · grad_out, the weighted mean that the gradient of softmax subtracts."""
    head, image, phase_y, phase_x, tile_y, tile_x, dims, is_dim, map_base, map_dims = locate(
        num_heads, tiles_down, tiles_across, stride_b, stride_n, stride_d, HEAD_DIMS, BLOCK_DIMS,
        DILATION)
    own_y, own_x, is_own, own_mask, place, place_out, queries = load_queries(
        q + map_base, head, image, phase_y, phase_x, tile_y, tile_x, stride_y, stride_x, map_dims,
        out_height, out_width, num_heads, is_dim, STRIDE, DILATION, TILE_SIDE)
    grads = load_rows(grad_out, place_out * HEAD_DIMS, dims, own_mask)
    outs = load_rows(out, place_out * HEAD_DIMS, dims, own_mask)
    own_mean = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
    tl.store(mean + place_out, own_mean, mask=is_own)
    own_log_sum = tl.load(log_sum + place_out, mask=is_own, other=0.0)

    grad = tl.zeros((TILE_SIDE * TILE_SIDE, BLOCK_DIMS), tl.float32)
    for chunk in range(CHUNKS):
        keys, values, logits = load_chunk(
            chunk, queries, own_y, own_x, k + map_base, v + map_base, positions, phase_y, phase_x,
            tile_y, tile_x, stride_y, stride_x, map_dims, height, width, dims, is_dim, scale,
            HEAD_DIMS, KERNEL_SIZE, STRIDE, DILATION, TILE_SIDE, ROWS, COLUMNS, PRECISION)
        weights = tl.exp2(logits - own_log_sum[:, None])
        grad_logits = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
        grad_logits = weights * (grad_logits - own_mean[:, None])
        grad += tl.dot(grad_logits.to(keys.dtype), keys, input_precision=PRECISION)

    tl.store(grad_q + map_base + place[:, None] + map_dims[None, :],
             (grad * scale).to(grad_q.dtype.element_ty), mask=own_mask)


@triton.jit(do_not_specialize=SIZES)
def grad_keys_kernel(q, k, v, positions, grad_out, log_sum, mean, grad_k, grad_v, stride_b,
                     stride_y, stride_x, stride_n, stride_d, height, width, out_height, out_width,
                     num_heads, tiles_down, tiles_across, scale, HEAD_DIMS: tl.constexpr,
                     BLOCK_DIMS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
                     DILATION: tl.constexpr, TILE_SIDE: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """A program computes a tile of keys, virtual ones included, from the queries that see them."""
    head, image, phase_y, phase_x, tile_y, tile_x, dims, is_dim, map_base, map_dims = locate(
        num_heads, tiles_down, tiles_across, stride_b, stride_n, stride_d, HEAD_DIMS, BLOCK_DIMS,
        DILATION)

    own = tl.arange(0, TILE_SIDE * TILE_SIDE)
    own_y, own_x = tile_y * TILE_SIDE + own // TILE_SIDE, tile_x * TILE_SIDE + own % TILE_SIDE
    padded_y, padded_x = phase_y + DILATION * own_y, phase_x + DILATION * own_x
    reach = DILATION * (KERNEL_SIZE // 2)
    is_own = (padded_y < height + 2 * reach) & (padded_x < width + 2 * reach)
    own_mask = is_own[:, None] & is_dim
    key_y = reflect(padded_y - reach, height)
    key_x = reflect(padded_x - reach, width)
    keys = load_keys(k + map_base, positions, key_y, key_x, stride_y, stride_x, map_dims, width,
                     dims, own_mask, HEAD_DIMS)
    values = load_rows(v + map_base, key_y * stride_y + key_x * stride_x, map_dims, own_mask)

    # The first query that sees the first key, or one before it. The added multiple of the stride
    # keeps the numerator positive, since the division rounds towards zero.
    first_y = (tile_y * TILE_SIDE + 1 + KERNEL_SIZE * (STRIDE - 1)) // STRIDE - KERNEL_SIZE
    first_x = (tile_x * TILE_SIDE + 1 + KERNEL_SIZE * (STRIDE - 1)) // STRIDE - KERNEL_SIZE
    sum_k = tl.zeros((TILE_SIDE * TILE_SIDE, BLOCK_DIMS), tl.float32)
    sum_v = tl.zeros((TILE_SIDE * TILE_SIDE, BLOCK_DIMS), tl.float32)
    for chunk in range(CHUNKS):
        index = tl.arange(0, ROWS * COLUMNS)
        row = first_y + chunk * ROWS + index // COLUMNS
        column = first_x + index % COLUMNS
        out_y, out_x = phase_y + DILATION * row, phase_x + DILATION * column
        is_query = (row >= 0) & (out_y < out_height) & (column >= 0) & (out_x < out_width)
        query_mask = is_query[:, None] & is_dim
        queries = load_rows(q + map_base, out_y * STRIDE * stride_y + out_x * STRIDE * stride_x,
                            map_dims, query_mask)
        place_out = ((image * out_height + out_y) * out_width + out_x) * num_heads + head
        grads = load_rows(grad_out, place_out * HEAD_DIMS, dims, query_mask)
        their_log_sum = tl.load(log_sum + place_out, mask=is_query, other=0.0)
        their_mean = tl.load(mean + place_out, mask=is_query, other=0.0)

        near = is_query[None, :] & are_near(own_y[:, None] - row[None, :] * STRIDE,
                                            own_x[:, None] - column[None, :] * STRIDE, KERNEL_SIZE)
        logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.exp2(tl.where(near, logits - their_log_sum[None, :], -float('inf')))
        sum_v += tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION)
        grad_logits = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
        grad_logits = weights * (grad_logits - their_mean[None, :])
        sum_k += tl.dot(grad_logits.to(queries.dtype), queries, input_precision=PRECISION)

    padded_width = width + 2 * reach
    place_key = (image * (height + 2 * reach) + padded_y) * padded_width + padded_x
    place_key = (place_key * num_heads + head) * HEAD_DIMS
    tl.store(grad_k + place_key[:, None] + dims[None, :],
             (sum_k * scale).to(grad_k.dtype.element_ty), mask=own_mask)
    tl.store(grad_v + place_key[:, None] + dims[None, :], sum_v.to(grad_v.dtype.element_ty),
             mask=own_mask)


@triton.jit
def find_copy(position, turn, extent, REACH: tl.constexpr):
    """A position that reflects to another, once or repeatedly, and whether the padding has it.

    Args:
        position: from zero to ``extent``.
        turn: zero for the position itself; otherwise the number of ends at which it is reflected,
            negative if the last one is the first.
        extent: length of the axis without its padding.
        REACH: width of the padding.
    """
    is_odd = turn % 2 != 0
    period = tl.maximum(2 * (extent - 1), 1)
    copy = tl.where(is_odd, -position, position) + ((turn + 1) >> 1) * period
    # Those at both ends are their own reflections.
    is_other = (turn % 2 == 0) | ((position > 0) & (position < extent - 1))
    return copy, is_other & (copy >= -REACH) & (copy < extent + REACH)


@triton.jit(do_not_specialize=SIZES)
def fold_kernel(padded, grad_qkv, stride_b, stride_y, stride_x, stride_part, stride_n, stride_d,
                batch, height, width, blocks, copies_across, copies, CHANNELS: tl.constexpr,
                HEAD_DIMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
                REACH: tl.constexpr, STRIDE: tl.constexpr):
    """Programs of the grid's third axis write keys, values, and queries without an output."""
    rest, part = tl.program_id(0), tl.program_id(2)
    column, rest = rest % blocks * COLUMNS + tl.arange(0, COLUMNS), rest // blocks
    row, image = rest % height, (rest // height).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (column < width)[:, None] & (channels < CHANNELS)[None, :]
    place = grad_qkv + image * stride_b + row * stride_y + (column * stride_x)[:, None]
    place += (channels // HEAD_DIMS * stride_n + channels % HEAD_DIMS * stride_d)[None, :]
    sums = tl.zeros((COLUMNS, BLOCK_CHANNELS), tl.float32)
    if part == 2:
        has_output = (row % STRIDE == 0) & (column % STRIDE == 0)
        tl.store(place, sums.to(grad_qkv.dtype.element_ty), mask=mask & ~has_output[:, None])
    else:
        padded_width = width + 2 * REACH
        padded += (part * batch + image) * (height + 2 * REACH) * padded_width * CHANNELS
        copies_down = copies // copies_across
        index = 0
        while index < copies:
            turn_y, turn_x = index // copies_across, index % copies_across
            copy_y, is_row = find_copy(row, turn_y - copies_down // 2, height, REACH)
            copy_x, is_column = find_copy(column, turn_x - copies_across // 2, width, REACH)
            if is_row:
                copy = (copy_y + REACH) * padded_width + copy_x + REACH
                sums += tl.load(padded + copy[:, None] * CHANNELS + channels[None, :],
                                mask=mask & is_column[:, None], other=0.0).to(tl.float32)
            index += 1
        tl.store(place + (part + 1) * stride_part, sums.to(grad_qkv.dtype.element_ty), mask=mask)
