"""Triton kernels of add_paths, forward and backward.

Maps are in the memory order (batch, height, width, channels); the sum, and its gradient, may have
their channels first. The gradient of the taps follows from sums over the positions of each row
whose taps lie on the map, which the second kernel sums over rows.
"""

from collections.abc import Sequence
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from acmix_mm.ops.path_sum.reference import side

# Positions of a row, and most channels, that a program has at once.
COLUMNS = 64
MAX_CHANNELS = 64
# Training on images of several sizes would compile the kernels again for some of them.
SIZES = ('height', 'width', 'in_height', 'in_width', 'shift_y', 'shift_x', 'steps', 'rows')


def add(convolution: Tensor, attention: Tensor, taps: Optional[Tensor], out: Tensor,
        size: Sequence[int], stride: int, dilation: int, shift_size: int,
        channels_first: bool) -> None:
    """Write the sum of both paths to ``out``; see :func:`acmix_mm.ops.add_paths`.

    Args:
        convolution: (batch, height, width, channels), contiguous.
        attention: the same.
        taps: (channels, k²), float32, or None.
        out: output, (batch, height, width, channels), contiguous in the memory order that
            ``channels_first`` gives.
        size: see there.
        stride: see there.
        dilation: see there.
        shift_size: see there.
        channels_first: see there.
    """
    batch, height, width, channels = out.shape
    steps = triton.cdiv(width, COLUMNS)
    grid = (batch * height * steps, triton.cdiv(channels, block_channels(channels)))
    add_kernel[grid](convolution, attention, taps, out, height, width, *size, shift_size % height,
                     shift_size % width, steps, COLUMNS=COLUMNS, CHANNELS_FIRST=channels_first,
                     **constants(out, taps, stride, dilation))


def add_backward(grad_out: Tensor, grad: Optional[Tensor], grad_taps: Optional[Tensor],
                 size: Sequence[int], stride: int, dilation: int, shift_size: int) -> None:
    """Write the gradient of each path to ``grad``, and that of the taps.

    Args:
        grad_out: (batch, height, width, channels), any strides.
        grad: output, contiguous, or None.
        grad_taps: output, (channels, k²), float32, contiguous, or None.
        size: see :func:`acmix_mm.ops.add_paths`.
        stride: see there.
        dilation: see there.
        shift_size: see there.
    """
    batch, height, width, channels = grad_out.shape
    in_height, in_width = size
    channels_first = not grad_out.is_contiguous() and grad_out.permute(0, 3, 1, 2).is_contiguous()
    if not channels_first:
        grad_out = grad_out.contiguous()
    options = constants(grad_out, grad_taps, stride, dilation)
    rows, blocks = batch * height, triton.cdiv(channels, block_channels(channels))
    kernel_size = options['KERNEL_SIZE']
    # Columns at an end of a row from which a tap may lie outside.
    edge = triton.cdiv(dilation * (kernel_size // 2), stride)
    sums = None if grad_taps is None else grad_out.new_empty(rows, kernel_size, channels,
                                                             dtype=torch.float32)
    add_backward_kernel[(rows, blocks)](
        grad_out, grad, sums, height, width, in_width, shift_size % height, shift_size % width,
        triton.cdiv(width, COLUMNS), COLUMNS=COLUMNS,
        EDGE=triton.next_power_of_2(max(edge, 1)), CHANNELS_FIRST=channels_first, **options)
    if grad_taps is not None:
        taps_gradient_kernel[(blocks, kernel_size**2)](sums, grad_taps, rows, height, in_height,
                                                       ROWS=32, **options)


def constants(maps: Tensor, taps: Optional[Tensor], stride: int, dilation: int) -> dict:
    """The constants that all kernels share."""
    channels = maps.shape[3]
    return dict(CHANNELS=channels, BLOCK_CHANNELS=block_channels(channels),
                KERNEL_SIZE=1 if taps is None else side(taps), STRIDE=stride, DILATION=dilation)


def block_channels(channels: int) -> int:
    """Channels that a program has at once."""
    return min(triton.next_power_of_2(channels), MAX_CHANNELS)


@triton.jit
def lies_inside(position, tap, extent, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
                DILATION: tl.constexpr):
    """Whether a tap of a position of the output lies on the map, along one axis."""
    inside = position * STRIDE + DILATION * (tap - KERNEL_SIZE // 2)
    return (inside >= 0) & (inside < extent)


@triton.jit
def place_of(image, row, column, channels, height, width, CHANNELS: tl.constexpr,
             CHANNELS_FIRST: tl.constexpr):
    """Indices of (positions of a row, channels) in a batch of maps, int64."""
    if CHANNELS_FIRST:
        place = (image * CHANNELS + channels[None, :]) * height * width
        return place + (row * width + column)[:, None]
    return ((image * height + row) * width + column)[:, None] * CHANNELS + channels[None, :]


@triton.jit(do_not_specialize=SIZES)
def add_kernel(convolution, attention, taps, out, height, width, in_height, in_width, shift_y,
               shift_x, steps, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
               COLUMNS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
               DILATION: tl.constexpr, CHANNELS_FIRST: tl.constexpr):
    row, first = tl.program_id(0) // steps, tl.program_id(0) % steps * COLUMNS
    image, row = (row // height).to(tl.int64), row % height
    column = first + tl.arange(0, COLUMNS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (column < width)[:, None] & (channels < CHANNELS)[None, :]
    place = place_of(image, row, column, channels, height, width, CHANNELS, False)
    sums = tl.load(convolution + place, mask=mask, other=0.0).to(tl.float32)
    sums += tl.load(attention + place, mask=mask, other=0.0).to(tl.float32)
    if taps is not None:
        for across in tl.static_range(KERNEL_SIZE):
            of_column = tl.zeros((BLOCK_CHANNELS,), tl.float32)
            for down in tl.static_range(KERNEL_SIZE):
                tap = taps + channels * KERNEL_SIZE * KERNEL_SIZE + down * KERNEL_SIZE + across
                values = tl.load(tap, mask=channels < CHANNELS, other=0.0)
                is_inside = lies_inside(row, down, in_height, KERNEL_SIZE, STRIDE, DILATION)
                of_column += tl.where(is_inside, values, 0.0)
            is_inside = lies_inside(column, across, in_width, KERNEL_SIZE, STRIDE, DILATION)
            sums += tl.where(is_inside[:, None], of_column[None, :], 0.0)
    row, column = row + shift_y, column + shift_x
    row = tl.where(row < height, row, row - height)
    column = tl.where(column < width, column, column - width)
    place = place_of(image, row, column, channels, height, width, CHANNELS, CHANNELS_FIRST)
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def add_backward_kernel(grad_out, grad, sums, height, width, in_width, shift_y, shift_x, steps,
                        CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
                        COLUMNS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
                        DILATION: tl.constexpr, EDGE: tl.constexpr,
                        CHANNELS_FIRST: tl.constexpr):
    """A program computes a row of the map that is not rolled."""
    image, row = (tl.program_id(0) // height).to(tl.int64), tl.program_id(0) % height
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channels < CHANNELS
    rolled_row = row + shift_y
    rolled_row = tl.where(rolled_row < height, rolled_row, rolled_row - height)
    total = tl.zeros((COLUMNS, BLOCK_CHANNELS), tl.float32)
    step = 0
    while step < steps:
        column = step * COLUMNS + tl.arange(0, COLUMNS)
        mask = (column < width)[:, None] & is_channel[None, :]
        rolled = column + shift_x
        rolled = tl.where(rolled < width, rolled, rolled - width)
        place = place_of(image, rolled_row, rolled, channels, height, width, CHANNELS,
                         CHANNELS_FIRST)
        values = tl.load(grad_out + place, mask=mask, other=0.0)
        if grad is not None:
            place = place_of(image, row, column, channels, height, width, CHANNELS, False)
            tl.store(grad + place, values, mask=mask)
        if sums is not None:
            total += values.to(tl.float32)
        step += 1
    if sums is not None:
        of_row = tl.sum(total, 0)
        # The columns at both ends of the row, each once, are subtracted where a tap is outside.
        edge = tl.arange(0, 2 * EDGE)
        column = tl.where(edge < EDGE, edge, width - 2 * EDGE + edge)
        mask = (column < width) & ((edge < EDGE) | (column >= EDGE))
        rolled = column + shift_x
        rolled = tl.where(rolled < width, rolled, rolled - width)
        place = place_of(image, rolled_row, rolled, channels, height, width, CHANNELS,
                         CHANNELS_FIRST)
        values = tl.load(grad_out + place, mask=mask[:, None] & is_channel[None, :], other=0.0)
        values = values.to(tl.float32)
        sums += tl.program_id(0).to(tl.int64) * KERNEL_SIZE * CHANNELS + channels
        for across in tl.static_range(KERNEL_SIZE):
            is_inside = lies_inside(column, across, in_width, KERNEL_SIZE, STRIDE, DILATION)
            outside = tl.sum(tl.where(is_inside[:, None], 0.0, values), 0)
            tl.store(sums + across * CHANNELS, of_row - outside, mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def taps_gradient_kernel(sums, grad_taps, rows, height, in_height, CHANNELS: tl.constexpr,
                         BLOCK_CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr,
                         STRIDE: tl.constexpr, DILATION: tl.constexpr, ROWS: tl.constexpr):
    """A program sums one tap over the rows in which it lies on the map."""
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channels < CHANNELS
    down, across = tl.program_id(1) // KERNEL_SIZE, tl.program_id(1) % KERNEL_SIZE
    total = tl.zeros((ROWS, BLOCK_CHANNELS), tl.float32)
    first = 0
    while first < rows:
        row = first + tl.arange(0, ROWS)
        is_inside = lies_inside(row % height, down, in_height, KERNEL_SIZE, STRIDE, DILATION)
        place = (row.to(tl.int64) * KERNEL_SIZE + across)[:, None] * CHANNELS + channels[None, :]
        mask = ((row < rows) & is_inside)[:, None] & is_channel[None, :]
        total += tl.load(sums + place, mask=mask, other=0.0)
        first += ROWS
    place = channels * KERNEL_SIZE * KERNEL_SIZE + tl.program_id(1)
    tl.store(grad_taps + place, tl.sum(total, 0), mask=is_channel)
