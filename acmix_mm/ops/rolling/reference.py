"""roll_map in torch."""

import torch
from torch import Tensor


def roll_map_reference(x: Tensor, shift_size: int, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).roll((shift_size, shift_size), (1, 2))
