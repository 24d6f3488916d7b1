"""What the ACmix layers of all hosts share: the light fully connected layer, the shifts, and the
rates of the two paths.

Its parameters are modules of their own, not ``nn.Conv2d``: a network that re-initialises all its
convolutions would otherwise wipe out the shift kernels, as the authors' ResNet does.
"""

import math
from typing import Optional

import torch
from torch import Tensor, nn

from acmix_mm.ops import shift_conv, shift_sum

MIXES = ('acmix', 'attn', 'conv')
COMBINATIONS = ('rates', 'convex', 'sum')
SHIFTS = ('learned', 'random', 'fixed', 'tensor')


class TwoPaths(nn.Module):
    """Base of the ACmix layers: which paths they have, how these are added, and how maps shift.

    Paper: arXiv 2111.14556, section 4; its ablations of both in section 5.4. A layer that has a
    convolution path names its parts ``fc`` and ``dep_conv``.
    """

    def set_paths(self, mix: str, combine: str) -> None:
        """Say which paths there are and how they are added, before anything else is built.

        Args:
            mix: ``'acmix'`` for both paths; ``'attn'`` or ``'conv'`` for that path alone, without
                rates.
            combine: how two paths are added: ``'rates'``, rate1 · attention + rate2 · convolution
                with both learned; ``'convex'``, rate1 · attention + (1 - rate1) · convolution;
                ``'sum'``, without rates. Learned ones start at one half.

        Raises:
            ValueError: an argument is none of these.
        """
        for name, value, allowed in (('mix', mix, MIXES), ('combine', combine, COMBINATIONS)):
            if value not in allowed:
                raise ValueError(f'{name} must be one of {", ".join(allowed)}, got {value!r}.')
        self.mix = mix
        self.combine = combine

    def add_rates(self) -> None:
        """Register the rates that are learned."""
        names = {'rates': ('rate1', 'rate2'), 'convex': ('rate1',), 'sum': ()}[self.combine]
        for name in names if self.mix == 'acmix' else ():
            self.register_parameter(name, nn.Parameter(torch.empty(1)))
        self.reset_rates()

    def reset_rates(self) -> None:
        """Set the learned rates to one half."""
        for name in ('rate1', 'rate2'):
            if hasattr(self, name):
                nn.init.constant_(getattr(self, name), 0.5)

    @property
    def attention_rate(self) -> Optional[Tensor]:
        """What the attention path is multiplied by, (1,), α in the paper; None is one."""
        return getattr(self, 'rate1', None)

    @property
    def convolution_rate(self) -> Optional[Tensor]:
        """What the convolution path is multiplied by, (1,), β in the paper; None is one."""
        rate = self.attention_rate
        return 1 - rate if rate is not None and self.combine == 'convex' else getattr(
            self, 'rate2', None)

    @property
    def can_stand_in(self) -> bool:
        """Whether the layer can be its convolution path alone, with any kernel for every head."""
        has_path = self.mix == 'conv' or (self.mix == 'acmix' and self.combine != 'sum')
        return has_path and self.dep_conv.is_learned and not self.dep_conv.is_shared

    def shift_and_sum(self, maps: Tensor, **geometry: int) -> Tensor:
        """The convolution path, times its rate.

        Args:
            maps: queries, keys and values, as :func:`acmix_mm.ops.shift_conv` takes them.
            geometry: ``stride`` and ``dilation``.

        Returns:
            (batch, embed_dims, out height, out width).
        """
        # The rate scales small weights in place of the map.
        rate, kernels = self.convolution_rate, self.dep_conv.kernels
        if kernels is None:
            bias = self.fc.bias
            out = shift_sum(maps, scaled(rate, self.fc.matrix), scaled(rate, bias), **geometry)
            return out.repeat_interleave(self.dep_conv.num_heads, 1)
        return shift_conv(maps, self.fc.matrix, scaled(rate, kernels), self.fc.bias, **geometry)


def scaled(rate: Optional[Tensor], weight: Optional[Tensor]) -> Optional[Tensor]:
    """A rate, None for one, times a weight, None for none."""
    return weight if rate is None or weight is None else rate * weight


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


class Shifts(nn.Module):
    """The shifts of the k² maps into which the fc mixes, each by its own offset of the k×k grid.

    Paper: arXiv 2111.14556, section 4.2. ``weight``, where there is one, is (head_dims · groups,
    k², k, k): kernel j of every channel starts as the pure shift of map j, one at tap j and zero
    elsewhere.

    Args:
        head_dims: channels of a head.
        num_heads: output heads.
        kernel_size: k, odd.
        shift: ``'learned'``: kernels that start as shifts; ``'random'``: that start as the weights
            of ``nn.Conv2d`` do; ``'fixed'``: that stay shifts; ``'tensor'``: no kernels, the maps
            are moved.
        groups: groups of kernels: one for every output head (None), or 1, shared by them all.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, head_dims: int, num_heads: int, kernel_size: int, shift: str = 'learned',
                 groups: Optional[int] = None) -> None:
        super().__init__()
        if shift not in SHIFTS:
            raise ValueError(f'shift must be one of {", ".join(SHIFTS)}, got {shift!r}.')
        if groups not in (None, 1, num_heads):
            raise ValueError('shift_groups must be 1, or None for one group for each of the '
                             f'{num_heads} heads, got {groups}.')
        self.num_heads = num_heads
        self.shift = shift
        self.is_learned = shift in ('learned', 'random')
        self.is_shared = groups == 1 < num_heads
        if shift == 'tensor':
            return
        weight = torch.empty(head_dims * (groups or num_heads), kernel_size**2, kernel_size,
                             kernel_size)
        if shift == 'fixed':
            self.register_buffer('weight', weight, persistent=False)
        else:
            self.weight = nn.Parameter(weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put the kernels at their start."""
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
        """Kernels of all output channels, (head_dims · num_heads, k², k, k); None where maps are
        moved.
        """
        if self.shift == 'tensor':
            return None
        # Output channels go (head_dims, num_heads).
        return self.weight.repeat_interleave(self.num_heads, 0) if self.is_shared else self.weight
