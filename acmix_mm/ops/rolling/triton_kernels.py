"""The Triton kernel of roll_map."""

import triton
import triton.language as tl
from torch import Tensor

# Positions of a row, and most channels, that a program moves.
COLUMNS = 32
MAX_CHANNELS = 128


def roll(x: Tensor, out: Tensor, shift_size: int) -> None:
    """Write the rolled map to ``out``; both are (batch, height, width, channels), contiguous."""
    batch, height, width, channels = x.shape
    block = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    steps = triton.cdiv(width, COLUMNS)
    roll_kernel[(batch * height * steps, triton.cdiv(channels, block))](
        x, out, height, width, shift_size % height, shift_size % width, steps, CHANNELS=channels,
        BLOCK_CHANNELS=block, COLUMNS=COLUMNS)


# Training on images of several sizes would compile the kernels again for some of them.
@triton.jit(do_not_specialize=('height', 'width', 'shift_y', 'shift_x', 'steps'))
def roll_kernel(x, out, height, width, shift_y, shift_x, steps, CHANNELS: tl.constexpr,
                BLOCK_CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0) // steps, tl.program_id(0) % steps * COLUMNS
    column += tl.arange(0, COLUMNS)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (column < width)[:, None] & (channels < CHANNELS)[None, :]
    place = (row.to(tl.int64) * width + column)[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x + place, mask=mask, other=0.0)
    image, row, column = row // height, row % height + shift_y, column + shift_x
    row = image * height + tl.where(row < height, row, row - height)
    column = tl.where(column < width, column, column - width)
    place = (row.to(tl.int64) * width + column)[:, None] * CHANNELS + channels[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), mask=mask)
