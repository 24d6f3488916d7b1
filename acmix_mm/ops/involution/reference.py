"""Reference implementation of involution, as in the paper's algorithm 1."""

import torch.nn.functional as F
from torch import Tensor


def involution_reference(x: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
    """Copy every neighbourhood, multiply and sum; takes k² times the memory of the map."""
    groups, kernel_size, size = kernels.shape[1], kernels.shape[2], kernels.shape[4:]
    copies = F.unfold(x, kernel_size, dilation=dilation, padding=dilation * (kernel_size // 2),
                      stride=stride)
    copies = copies.unflatten(1, (groups, x.shape[1] // groups, kernel_size**2))
    copies = copies.unflatten(4, size)
    return (kernels.flatten(2, 3).unsqueeze(2) * copies).sum(3).flatten(1, 2)
