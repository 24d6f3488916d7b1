"""Parameters of ACmix that every host layer shares: the light fully connected layer, the shift
kernels, and the rates of the two paths.

They are modules of their own, not ``nn.Conv2d``: a network that re-initialises all its
convolutions would otherwise wipe out the shift kernels, as the authors' ResNet does.
"""

import math

import torch
from torch import Tensor, nn

MIXES = ('acmix', 'attn', 'conv')


def check_mix(mix: str) -> None:
    """Raise ValueError unless ``mix`` is one of ``MIXES``."""
    if mix not in MIXES:
        raise ValueError(f'mix must be one of {", ".join(MIXES)}, got {mix!r}.')


def initial_rate() -> nn.Parameter:
    """A learned rate, (1,): α or β in the paper, starting at one half."""
    return nn.Parameter(torch.full((1,), 0.5))


class FullyConnected(nn.Module):
    """The light layer that mixes num_maps maps into k², shared by all head channels.

    The maps are the heads of queries, keys and values, 3 · num_heads where all have equal width.
    ``weight`` is (k², num_maps, 1, 1), as the authors' 1×1 convolution stores it; ``bias`` is (k²,)
    or None.
    """

    def __init__(self, num_maps: int, kernel_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size**2, num_maps, 1, 1))
        self.bias = nn.Parameter(torch.empty(kernel_size**2)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw as ``nn.Conv2d`` does: uniform within ±1 / sqrt(num_maps)."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def matrix(self) -> Tensor:
        """The weight as (k², num_maps)."""
        return self.weight[:, :, 0, 0]


class ShiftKernels(nn.Module):
    """The learned kernels of shift-and-sum, (embed_dims, k², k, k), starting as pure shifts."""

    def __init__(self, embed_dims: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(embed_dims, kernel_size**2, kernel_size,
                                               kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kernel j of every output channel is one at tap j and zero elsewhere."""
        num_shifts, kernel_size = self.weight.shape[1:3]
        one_hot = torch.eye(num_shifts).unflatten(1, (kernel_size, kernel_size))
        with torch.no_grad():
            self.weight.copy_(one_hot)
