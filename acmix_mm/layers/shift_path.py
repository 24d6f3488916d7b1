"""The parameters of the convolution path: a fully connected layer over heads, and the shifts.

They are modules of their own rather than ``nn.Conv2d``, because a network that re-initialises all
of its convolutions would overwrite the shift kernels, as the authors' ResNet does.
"""

import math
from typing import Optional

import torch
from torch import Tensor, nn

SHIFTS = ('learned', 'random', 'fixed', 'tensor')


class FullyConnected(nn.Module):
    """Mixes num_maps maps into k² maps with the same weights for all channels of a head.

    The maps are the heads of queries, keys and values: 3 · num_heads if all have the same width.
    ``weight`` is (k², num_maps, 1, 1), as the authors' 1×1 convolution stores it; ``bias`` is (k²,)
    or None.
    """

    def __init__(self, num_maps: int, kernel_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size**2, num_maps, 1, 1))
        self.bias = nn.Parameter(torch.empty(kernel_size**2)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv2d`` does: uniform in ±1 / sqrt(num_maps)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def matrix(self) -> Tensor:
        """The weight as (k², num_maps)."""
        return self.weight.flatten(1)


class Shifts(nn.Module):
    """Shifts each of k² maps by its own offset in a k×k grid, with depthwise kernels.

    Paper: arXiv 2111.14556, section 4.2. ``weight``, if there is one, is (head_dims · groups, k²,
    k, k). Kernel j of every channel starts as the pure shift of map j: one at tap j, zero
    elsewhere.

    Args:
        head_dims: channels of a head.
        num_heads: number of output heads.
        kernel_size: k, odd.
        shift: ``'learned'`` for kernels that start as shifts, ``'random'`` for kernels initialised
            as in ``nn.Conv2d``, ``'fixed'`` for kernels that stay shifts, or ``'tensor'`` to move
            the maps without kernels.
        shift_groups: number of groups of kernels: None for one per output head, or 1 to share
            them between all heads.

    Raises:
        ValueError: ``shift`` or ``shift_groups`` is invalid.
    """

    def __init__(self, head_dims: int, num_heads: int, kernel_size: int, shift: str = 'learned',
                 shift_groups: Optional[int] = None) -> None:
        super().__init__()
        if shift not in SHIFTS:
            raise ValueError(f'shift must be one of {", ".join(SHIFTS)}, got {shift!r}.')
        if shift_groups not in (None, 1, num_heads):
            raise ValueError('shift_groups must be 1, or None for one group for each of the '
                             f'{num_heads} heads, got {shift_groups}.')
        self.head_dims = head_dims
        self.num_heads = num_heads
        self.shift = shift
        self.is_learned = shift in ('learned', 'random')
        self.is_shared = shift_groups == 1 < num_heads
        if shift == 'tensor':
            return
        weight = torch.empty(head_dims * (shift_groups or num_heads), kernel_size**2, kernel_size,
                             kernel_size)
        if shift == 'fixed':
            self.register_buffer('weight', weight, persistent=False)
        else:
            self.weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reset the kernels to their initial values."""
        if self.shift == 'tensor':
            return
        num_shifts, kernel_size = self.weight.shape[1:3]
        if self.shift == 'random':
            bound = 1 / math.sqrt(num_shifts * kernel_size**2)
            nn.init.uniform_(self.weight, -bound, bound)
            return
        one_hot = torch.eye(num_shifts).unflatten(1, (kernel_size, kernel_size))
        with torch.no_grad():
            self.weight.copy_(one_hot)

    @property
    def kernels(self) -> Optional[Tensor]:
        """The kernels of all output channels, (head_dims · num_heads, k², k, k), or None if maps
        are moved without kernels.
        """
        if self.shift == 'tensor':
            return None
        # Output channels are in the order (head_dims, num_heads).
        return self.weight.repeat_interleave(self.num_heads, 0) if self.is_shared else self.weight
