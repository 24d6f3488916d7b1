"""projected_shift_conv as one dense convolution of the input."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size
from acmix_mm.ops.projected_shift_conv.precision import at_least_float32, without_autocast


def projected_shift_conv_composed(x: Tensor, weight: Tensor, bias: Optional[Tensor],
                                  fc_weight: Tensor, shift_weight: Tensor,
                                  fc_bias: Optional[Tensor], stride: int,
                                  dilation: int) -> Tensor:
    geometry: dict[str, Any] = dict(stride=stride, dilation=dilation,
                                    padding=dilation * (shift_weight.shape[-1] // 2))
    with without_autocast(x.device):
        kernels, bias_taps = compose(
            at_least_float32(weight), at_least_float32(bias), at_least_float32(fc_weight),
            at_least_float32(shift_weight), at_least_float32(fc_bias))
        if bias_taps is None:
            bias_map = None
        else:
            bias_map = map_of_taps(bias_taps, x.shape[2:], shift_weight.shape[-1], stride, dilation)
    out = F.conv2d(x, kernels.to(x.dtype), **geometry)
    # F.conv2d would add a bias in a pass of its own as well.
    return out if bias_map is None else out.add_(bias_map)


def compose(weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor, shift_weight: Tensor,
            fc_bias: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """Compose projections, fully connected layer and shift kernels.

    The products are batched, and written so that each takes one kernel without a copy.

    Args:
        weight: (num_maps · head_dims, in_channels).
        bias: (num_maps · head_dims,), or None.
        fc_weight: (k², num_maps).
        shift_weight: (head_dims · num_heads, k², k, k).
        fc_bias: (k²,), or None.

    Returns:
        The kernels, (head_dims · num_heads, in_channels, k, k), in the memory format channels last;
        and what each tap of them adds to the output for the biases, (head_dims · num_heads, k²), or
        None.
    """
    channels, num_shifts, kernel_size, _ = shift_weight.shape
    num_maps = fc_weight.shape[1]
    weight = weight.unflatten(0, (num_maps, -1)).transpose(0, 1)
    head_dims, _, in_channels = weight.shape
    shifts = shift_weight.flatten(2).transpose(1, 2)
    folded = torch.bmm(shifts, fc_weight.expand(channels, num_shifts, num_maps))
    # (head_dims, num_heads · k², num_maps)
    folded = folded.view(head_dims, -1, num_maps)
    kernels = torch.bmm(folded, weight)
    kernels = kernels.view(channels, kernel_size, kernel_size, in_channels).permute(0, 3, 1, 2)
    taps = None
    if bias is not None:
        taps = torch.bmm(folded, bias.view(num_maps, head_dims, 1).transpose(0, 1))
        taps = taps.view(channels, kernel_size**2)
    if fc_bias is not None:
        of_fc = shifts.matmul(fc_bias)
        taps = of_fc if taps is None else taps + of_fc
    return kernels, taps


def map_of_taps(taps: Tensor, size: Sequence[int], kernel_size: int, stride: int,
                dilation: int) -> Tensor:
    """Convolve a map of ones of ``size``, zero-padded, with kernels (channels, k²).

    Returns:
        (channels, out height, out width), in the memory format channels last.
    """
    rows, columns = (taps_inside(extent, kernel_size, stride, dilation, taps.dtype, taps.device)
                     for extent in size)
    is_inside = rows[:, None, :, None] * columns[:, None, :]
    return is_inside.flatten(2).matmul(taps.t()).permute(2, 0, 1)


@cached_by_size
def taps_inside(extent: int, kernel_size: int, stride: int, dilation: int, dtype: torch.dtype,
                device: torch.device) -> Tensor:
    """One where a tap lies on the map, zero elsewhere, (out positions, k), along one axis."""
    taps = dilation * (torch.arange(kernel_size, device=device) - kernel_size // 2)
    positions = torch.arange(0, extent, stride, device=device)[:, None] + taps
    return ((positions >= 0) & (positions < extent)).to(dtype)
