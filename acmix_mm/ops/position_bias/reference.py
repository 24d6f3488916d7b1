"""position_bias in torch."""

import math

from torch import Tensor


def position_bias_reference(table: Tensor, index: Tensor, window_size: list[int]) -> Tensor:
    height, width = window_size
    area = height * width
    bias = table[index_of_window(index, window_size)]
    return bias.view(area, area, table.shape[1]).permute(2, 0, 1)


def position_bias_gradient(grad: Tensor, table: Tensor, index: Tensor,
                           window_size: list[int]) -> Tensor:
    """Return the gradient of ``table``, whose values are not read."""
    by_pair = grad.flatten(1).t().to(table.dtype)
    return table.new_zeros(table.shape).index_add(0, index_of_window(index, window_size), by_pair)


def index_of_window(index: Tensor, window_size: list[int]) -> Tensor:
    """The rows of the table for all pairs of positions in a smaller window, one axis."""
    height, width = window_size
    side = math.isqrt(len(index))
    index = index.unflatten(0, (side, side)).unflatten(2, (side, side))
    return index[:height, :width, :height, :width].reshape(-1)
