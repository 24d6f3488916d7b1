"""Triton kernels of position_encoding, forward and backward.

The gradient of the weight follows from sums over each row, which the second kernel sums.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 32
# Training on images of several sizes would compile the kernels again for some of them.
SIZES = ('height', 'width')


def encode(weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Write the encoding to ``out``, (height, width, head_dims), float32, contiguous.

    Args:
        weight: (head_dims, 2), contiguous.
        bias: (head_dims,), contiguous.
        out: the output.
    """
    height, width, head_dims = out.shape
    encode_kernel[(height, triton.cdiv(width, COLUMNS))](
        weight, bias, out, height, width, **constants(head_dims))


def encode_backward(grad: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients of weight and bias.

    Args:
        grad: (height, width, head_dims), float32, contiguous.
        grad_weight: output, (head_dims, 2), contiguous.
        grad_bias: output, (head_dims,), contiguous.
    """
    height, width, head_dims = grad.shape
    sums = grad.new_empty(height, 2, head_dims)
    sum_row_kernel[(height,)](grad, sums, width, **constants(head_dims))
    sum_rows_kernel[(1,)](sums, grad_weight, grad_bias, height, **constants(head_dims))


def constants(head_dims: int) -> dict:
    """The constants of the kernels."""
    return dict(HEAD_DIMS=head_dims, BLOCK_DIMS=triton.next_power_of_2(head_dims), COLUMNS=COLUMNS)


@triton.jit
def coordinate(position, extent):
    """From -1 to 1 along an axis."""
    return position.to(tl.float32) * (2.0 / tl.maximum(extent - 1, 1).to(tl.float32)) - 1.0


@triton.jit(do_not_specialize=SIZES)
def encode_kernel(weight, bias, out, height, width, HEAD_DIMS: tl.constexpr,
                  BLOCK_DIMS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = dims < HEAD_DIMS
    by_x = tl.load(weight + 2 * dims, mask=is_dim, other=0.0).to(tl.float32)
    by_y = tl.load(weight + 2 * dims + 1, mask=is_dim, other=0.0).to(tl.float32)
    values = tl.load(bias + dims, mask=is_dim, other=0.0).to(tl.float32)
    values = values + by_y * coordinate(row, height)
    values = values[None, :] + coordinate(column, width)[:, None] * by_x[None, :]
    place = (row * width + column)[:, None] * HEAD_DIMS + dims[None, :]
    tl.store(out + place, values, mask=(column < width)[:, None] & is_dim[None, :])


@triton.jit(do_not_specialize=SIZES)
def sum_row_kernel(grad, sums, width, HEAD_DIMS: tl.constexpr, BLOCK_DIMS: tl.constexpr,
                   COLUMNS: tl.constexpr):
    """Sum a row, and its product with x."""
    dims = tl.arange(0, BLOCK_DIMS)
    total = tl.zeros((COLUMNS, BLOCK_DIMS), tl.float32)
    by_x = tl.zeros((COLUMNS, BLOCK_DIMS), tl.float32)
    first = 0
    while first < width:
        column = first + tl.arange(0, COLUMNS)
        place = (tl.program_id(0) * width + column)[:, None] * HEAD_DIMS + dims[None, :]
        values = tl.load(grad + place, other=0.0,
                         mask=(column < width)[:, None] & (dims < HEAD_DIMS)[None, :])
        total += values
        by_x += values * coordinate(column, width)[:, None]
        first += COLUMNS
    sums += tl.program_id(0) * 2 * HEAD_DIMS + dims
    tl.store(sums, tl.sum(total, 0), mask=dims < HEAD_DIMS)
    tl.store(sums + HEAD_DIMS, tl.sum(by_x, 0), mask=dims < HEAD_DIMS)


@triton.jit(do_not_specialize=SIZES)
def sum_rows_kernel(sums, grad_weight, grad_bias, height, HEAD_DIMS: tl.constexpr,
                    BLOCK_DIMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum what sum_row_kernel stores."""
    dims = tl.arange(0, BLOCK_DIMS)
    is_dim = dims < HEAD_DIMS
    total = tl.zeros((COLUMNS, BLOCK_DIMS), tl.float32)
    by_x = tl.zeros((COLUMNS, BLOCK_DIMS), tl.float32)
    by_y = tl.zeros((COLUMNS, BLOCK_DIMS), tl.float32)
    first = 0
    while first < height:
        row = first + tl.arange(0, COLUMNS)
        place = row[:, None] * 2 * HEAD_DIMS + dims[None, :]
        mask = (row < height)[:, None] & is_dim[None, :]
        values = tl.load(sums + place, mask=mask, other=0.0)
        total += values
        by_x += tl.load(sums + place + HEAD_DIMS, mask=mask, other=0.0)
        by_y += values * coordinate(row, height)[:, None]
        first += COLUMNS
    tl.store(grad_weight + 2 * dims, tl.sum(by_x, 0).to(grad_weight.dtype.element_ty), mask=is_dim)
    tl.store(grad_weight + 2 * dims + 1, tl.sum(by_y, 0).to(grad_weight.dtype.element_ty),
             mask=is_dim)
    tl.store(grad_bias + dims, tl.sum(total, 0).to(grad_bias.dtype.element_ty), mask=is_dim)
