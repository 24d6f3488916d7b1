"""The Triton kernel of position_bias's gradient: a program sums all pairs of one offset."""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


def sum_offsets(grad: Tensor, grad_table: Tensor, window_size: Sequence[int]) -> None:
    """Write the gradient of the table.

    Args:
        grad: of the bias, (num_heads, area, area), any dtype and strides.
        grad_table: output, ((2 · side − 1)², num_heads), contiguous.
        window_size: (height, width) of the window, at most ``side`` each.
    """
    rows, num_heads = grad_table.shape
    across = math.isqrt(rows)
    sum_offsets_kernel[(rows, num_heads)](
        grad, grad_table, *grad.stride(), *window_size, across, num_heads,
        BLOCK=triton.next_power_of_2((across // 2 + 1)**2))


@triton.jit(do_not_specialize=('stride_q', 'stride_k', 'height', 'width'))
def sum_offsets_kernel(grad, grad_table, stride_n, stride_q, stride_k, height, width, across,
                       num_heads, BLOCK: tl.constexpr):
    """``across``: offsets along an axis of the table, 2 · side − 1."""
    row, head = tl.program_id(0), tl.program_id(1)
    query = tl.arange(0, BLOCK)
    key_y = query // width - (row // across - across // 2)
    key_x = query % width - (row % across - across // 2)
    mask = (query < height * width) & (key_y >= 0) & (key_y < height)
    mask &= (key_x >= 0) & (key_x < width)
    place = head * stride_n + query * stride_q + (key_y * width + key_x) * stride_k
    total = tl.sum(tl.load(grad + place, mask=mask, other=0.0).to(tl.float32), 0)
    tl.store(grad_table + row * num_heads + head, total.to(grad_table.dtype.element_ty))
