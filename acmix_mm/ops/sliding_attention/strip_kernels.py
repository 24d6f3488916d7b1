"""Triton kernels of sliding-window attention in strips, forward and backward.

A program computes a few strips of 2×8 queries of one head as one batched product: a strip sees few
enough keys that its softmax takes one pass. The gradients of keys and values need no padded maps: a
position that reflection padding repeats is seen, once more for each copy, by queries that see the
position itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix_mm.ops.backend import matmul_precision

LOG2_E = tl.constexpr(1.4426950408889634)
ROWS_OF_STRIP = tl.constexpr(2)
COLUMNS_OF_STRIP = tl.constexpr(8)
# Beyond these, the keys of a strip exceed the registers of a warp.
MAX_KERNEL_SIZE = 7
MAX_ROW_BYTES = 64
# Training on images of several sizes would compile the kernels again for some of them.
SIZES = ('height', 'width')


def covers(q: Tensor, kernel_size: int, stride: int, dilation: int) -> bool:
    """Whether these kernels take queries, (batch, height, width, num_heads, head_dims).

    The channels of a head, its heads and its positions must be adjacent in memory, as in the
    projections of a map whose channels come last.
    """
    batch, height, width, _, head_dims = q.shape
    step = q.stride(2)
    return (stride == dilation == 1 and 1 < kernel_size <= MAX_KERNEL_SIZE and
            min(height, width) > kernel_size // 2 and batch < 2**16 and
            block_dims(head_dims) * q.element_size() <= MAX_ROW_BYTES and
            q.stride() == (height * width * step, width * step, step, head_dims, 1))


def attend(qkv: Tensor, positions: Tensor, out: Tensor, log_sum: Tensor, kernel_size: int,
           scale: float) -> None:
    """As :func:`acmix_mm.ops.sliding_attention.triton_kernels.attend`, for what is covered."""
    q, k, v = qkv.unbind(3)
    keys = q.new_empty(q.shape)
    # Rounded once, after a subtraction in float32.
    torch.sub(k, positions.unsqueeze(2), out=keys)
    attend_kernel[grid(q)](q, keys, v, out, log_sum, q.stride(2), keys.stride(2), *q.shape[1:4],
                           scale, **constants(q, kernel_size))


def attend_backward(grad_out: Tensor, qkv: Tensor, positions: Tensor, out: Tensor,
                    log_sum: Tensor, grad_qkv: Tensor, kernel_size: int, scale: float) -> None:
    """Write the gradient to ``grad_qkv``, in the strides of ``qkv``."""
    q, k, v = qkv.unbind(3)
    grad_q, grad_k, grad_v = grad_qkv.unbind(3)
    # The gradient of the keys replaces them in the end: a program reads its own keys alone then.
    torch.sub(k, positions.unsqueeze(2), out=grad_k)
    mean = torch.empty_like(log_sum)
    sizes = q.stride(2), *q.shape[1:4], scale
    options = constants(q, kernel_size)
    grad_out = grad_out.contiguous()
    grad_queries_kernel[grid(q)](q, grad_k, v, out, grad_out, log_sum, mean, grad_q, *sizes,
                                 **options)
    grad_keys_kernel[grid(q)](q, grad_k, v, grad_out, log_sum, mean, grad_k, grad_v, *sizes,
                              **options)


def block_dims(head_dims: int) -> int:
    """Channels of a head, padded for ``tl.dot``."""
    return max(triton.next_power_of_2(head_dims), 16)


def strips(q: Tensor) -> int:
    """Strips per program, one for each of its warps."""
    return 4 if block_dims(q.shape[4]) * q.element_size() <= 32 else 2


def grid(q: Tensor) -> tuple[int, int, int]:
    """Heads of a tile run together."""
    batch, height, width, num_heads, _ = q.shape
    rows = strips(q) * ROWS_OF_STRIP.value
    return num_heads * triton.cdiv(width, COLUMNS_OF_STRIP.value), triton.cdiv(height, rows), batch


def constants(q: Tensor, kernel_size: int) -> dict:
    """The constants and options of a kernel."""
    return dict(HEAD_DIMS=q.shape[4], BLOCK_DIMS=block_dims(q.shape[4]), KERNEL_SIZE=kernel_size,
                STRIPS=strips(q),
                ROWS=triton.next_power_of_2(ROWS_OF_STRIP.value + kernel_size - 1),
                COLUMNS=triton.next_power_of_2(COLUMNS_OF_STRIP.value + kernel_size - 1),
                PRECISION=matmul_precision(), num_warps=strips(q))


@triton.jit
def reflect(position, extent):
    """Reflect positions at most once; those beyond, which no query on the map sees, become 0."""
    position = tl.where(position < 0, -position, position)
    return tl.maximum(tl.minimum(position, 2 * (extent - 1) - position), 0)


@triton.jit
def locate(num_heads, STRIPS: tl.constexpr):
    """Image, head, first row of each strip, (STRIPS, 1), and first column."""
    head, tile_x = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    strip = tl.program_id(1) * STRIPS + tl.arange(0, STRIPS)[:, None]
    return (tl.program_id(2).to(tl.int64), head, strip * ROWS_OF_STRIP,
            tile_x * COLUMNS_OF_STRIP + strip * 0)


@triton.jit
def offsets_of_own():
    """Row and column in a strip, (1, 16)."""
    own = tl.arange(0, ROWS_OF_STRIP * COLUMNS_OF_STRIP)[None, :]
    return own // COLUMNS_OF_STRIP, own % COLUMNS_OF_STRIP


@triton.jit
def offsets_around(KERNEL_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column of the positions around a strip, from its first position, (1, positions)."""
    index = tl.arange(0, ROWS * COLUMNS)[None, :]
    return index // COLUMNS - KERNEL_SIZE // 2, index % COLUMNS - KERNEL_SIZE // 2


@triton.jit
def are_near(KERNEL_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which positions around a strip are neighbours of its own: (1, 16, positions)."""
    own_y, own_x = offsets_of_own()
    row, column = offsets_around(KERNEL_SIZE, ROWS, COLUMNS)
    down = row[:, None, :] - own_y[:, :, None]
    across = column[:, None, :] - own_x[:, :, None]
    reach: tl.constexpr = KERNEL_SIZE // 2
    return (down >= -reach) & (down <= reach) & (across >= -reach) & (across <= reach)


@triton.jit
def load(maps, place, dims, mask):
    """Load (strips, positions, BLOCK_DIMS) of a map."""
    return tl.load(maps + place[:, :, None] + dims[None, None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(q, keys, v, out, log_sum, stride_x, key_stride_x, height, width, num_heads,
                  scale, HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
                  KERNEL_SIZE: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr,
                  COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    image, head, first_y, first_x = locate(num_heads, STRIPS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = (dims < HEAD_DIMS)[None, None, :]
    pixels = image * height * width
    base = pixels * stride_x + head * HEAD_DIMS
    key_base = pixels * key_stride_x + head * HEAD_DIMS
    own_y, own_x = offsets_of_own()
    own_y, own_x = first_y + own_y, first_x + own_x
    is_own = (own_y < height) & (own_x < width)
    own_mask = is_own[:, :, None] & is_dim
    own = own_y * width + own_x
    queries = load(q + base, own * stride_x, dims, own_mask)

    row, column = offsets_around(KERNEL_SIZE, ROWS, COLUMNS)
    around = reflect(first_y + row, height) * width + reflect(first_x + column, width)
    around_keys = load(keys + key_base, around * key_stride_x, dims, is_dim)
    values = load(v + base, around * stride_x, dims, is_dim)
    logits = tl.dot(queries, tl.permute(around_keys, 0, 2, 1), input_precision=PRECISION)
    logits = tl.where(are_near(KERNEL_SIZE, ROWS, COLUMNS), logits * (scale * LOG2_E),
                      -float('inf'))
    highest = tl.max(logits, 2)
    weights = tl.exp2(logits - highest[:, :, None])
    total = tl.sum(weights, 2)
    mean = tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)

    sums = pixels * num_heads + head
    tl.store(log_sum + sums + own * num_heads, highest + tl.log2(total), mask=is_own)
    place = out + sums * HEAD_DIMS + (own * num_heads * HEAD_DIMS)[:, :, None]
    tl.store(place + dims[None, None, :], (mean / total[:, :, None]).to(out.dtype.element_ty),
             mask=own_mask)


@triton.jit(do_not_specialize=SIZES)
def grad_queries_kernel(q, keys, v, out, grad_out, log_sum, mean, grad_q, stride_x, height, width,
                        num_heads, scale, HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
                        KERNEL_SIZE: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr,
                        COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """Also stores output · grad_out, the weighted mean that the gradient of softmax subtracts."""
    image, head, first_y, first_x = locate(num_heads, STRIPS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = (dims < HEAD_DIMS)[None, None, :]
    pixels = image * height * width
    base = pixels * stride_x + head * HEAD_DIMS
    sums = pixels * num_heads + head
    own_y, own_x = offsets_of_own()
    own_y, own_x = first_y + own_y, first_x + own_x
    is_own = (own_y < height) & (own_x < width)
    own_mask = is_own[:, :, None] & is_dim
    own = own_y * width + own_x
    queries = load(q + base, own * stride_x, dims, own_mask)
    place_out = own * num_heads * HEAD_DIMS
    grads = load(grad_out + sums * HEAD_DIMS, place_out, dims, own_mask)
    outs = load(out + sums * HEAD_DIMS, place_out, dims, own_mask)
    own_mean = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 2)
    tl.store(mean + sums + own * num_heads, own_mean, mask=is_own)
    own_log_sum = tl.load(log_sum + sums + own * num_heads, mask=is_own, other=0.0)

    row, column = offsets_around(KERNEL_SIZE, ROWS, COLUMNS)
    around = reflect(first_y + row, height) * width + reflect(first_x + column, width)
    around_keys = load(keys + base, around * stride_x, dims, is_dim)
    values = load(v + base, around * stride_x, dims, is_dim)
    logits = tl.dot(queries, tl.permute(around_keys, 0, 2, 1), input_precision=PRECISION)
    logits = logits * (scale * LOG2_E) - own_log_sum[:, :, None]
    weights = tl.exp2(tl.where(are_near(KERNEL_SIZE, ROWS, COLUMNS), logits, -float('inf')))
    grad = tl.dot(grads, tl.permute(values, 0, 2, 1), input_precision=PRECISION)
    grad = weights * (grad - own_mean[:, :, None])
    grad = tl.dot(grad.to(around_keys.dtype), around_keys, input_precision=PRECISION) * scale
    place = grad_q + base + (own * stride_x)[:, :, None] + dims[None, None, :]
    tl.store(place, grad.to(grad_q.dtype.element_ty), mask=own_mask)


@triton.jit
def times_seen(query, key, extent, REACH: tl.constexpr):
    """How often a query sees a key along an axis, its copies in the padding included."""
    times = tl.where(tl.abs(query - key) <= REACH, 1, 0)
    times += tl.where((key > 0) & (query + key <= REACH), 1, 0)
    return times + tl.where((key < extent - 1) & (2 * (extent - 1) - query - key <= REACH), 1, 0)


@triton.jit(do_not_specialize=SIZES)
def grad_keys_kernel(q, keys, v, grad_out, log_sum, mean, grad_k, grad_v, stride_x, height, width,
                     num_heads, scale, HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
                     KERNEL_SIZE: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """A program computes strips of keys from the queries around them; ``grad_k`` may be ``keys``.
    """
    image, head, first_y, first_x = locate(num_heads, STRIPS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = (dims < HEAD_DIMS)[None, None, :]
    pixels = image * height * width
    base = pixels * stride_x + head * HEAD_DIMS
    sums = pixels * num_heads + head
    own_y, own_x = offsets_of_own()
    own_y, own_x = first_y + own_y, first_x + own_x
    own_mask = ((own_y < height) & (own_x < width))[:, :, None] & is_dim
    own = (own_y * width + own_x) * stride_x
    own_keys = load(keys + base, own, dims, own_mask)
    values = load(v + base, own, dims, own_mask)

    row, column = offsets_around(KERNEL_SIZE, ROWS, COLUMNS)
    row, column = first_y + row, first_x + column
    is_query = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = is_query[:, :, None] & is_dim
    around = row * width + column
    queries = load(q + base, around * stride_x, dims, mask)
    grads = load(grad_out + sums * HEAD_DIMS, around * num_heads * HEAD_DIMS, dims, mask)
    # exp2 of minus infinity is zero: positions outside the map are no queries.
    their_log_sum = tl.load(log_sum + sums + around * num_heads, mask=is_query, other=float('inf'))
    their_mean = tl.load(mean + sums + around * num_heads, mask=is_query, other=0.0)

    logits = tl.dot(own_keys, tl.permute(queries, 0, 2, 1), input_precision=PRECISION)
    logits = logits * (scale * LOG2_E) - their_log_sum[:, None, :]
    weights = tl.exp2(tl.where(are_near(KERNEL_SIZE, ROWS, COLUMNS), logits, -float('inf')))
    reach: tl.constexpr = KERNEL_SIZE // 2
    times = times_seen(row[:, None, :], own_y[:, :, None], height, reach)
    times *= times_seen(column[:, None, :], own_x[:, :, None], width, reach)
    weights *= times.to(tl.float32)
    sum_v = tl.dot(weights.to(grads.dtype), grads, input_precision=PRECISION)
    grad = tl.dot(values, tl.permute(grads, 0, 2, 1), input_precision=PRECISION)
    grad = weights * (grad - their_mean[:, None, :])
    sum_k = tl.dot(grad.to(queries.dtype), queries, input_precision=PRECISION) * scale
    place = own[:, :, None] + dims[None, None, :]
    tl.store(grad_k + base + place, sum_k.to(grad_k.dtype.element_ty), mask=own_mask)
    tl.store(grad_v + base + place, sum_v.to(grad_v.dtype.element_ty), mask=own_mask)
