"""compose_paths in torch, from the compositions of projected_shift_conv."""

from typing import Optional

import torch
from torch import Tensor

from acmix_mm.ops.projected_shift_conv import composed, grouped
from acmix_mm.ops.projected_shift_conv.operations import group_size
from acmix_mm.ops.projected_shift_conv.precision import at_least_float32, without_autocast


def compose_paths_reference(weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor,
                            shift_weight: Tensor, fc_bias: Optional[Tensor],
                            attention_rate: Optional[Tensor], convolution_rate: Optional[Tensor],
                            attention_bias: Optional[Tensor], dtype: torch.dtype,
                            is_grouped: bool) -> tuple[Tensor, ...]:
    """Return the fields of :class:`acmix_mm.ops.path_weights.PathWeights`; empty ones for None."""
    with without_autocast(weight.device):
        weight, fc_weight, shift_weight = (
            at_least_float32(each) for each in (weight, fc_weight, shift_weight))
        bias, fc_bias, attention_bias = (
            at_least_float32(each) for each in (bias, fc_bias, attention_bias))
        if convolution_rate is not None:
            shift_weight = convolution_rate * shift_weight
        mixing = None
        if is_grouped:
            mixing, mixed_bias = grouped.compose(weight, bias, fc_weight, fc_bias)
            head_dims = len(weight) // fc_weight.shape[1]
            kernels = grouped.block_diagonal(shift_weight, head_dims, group_size(head_dims))
            taps = None if mixed_bias is None else taps_of_maps(mixed_bias, shift_weight)
        else:
            kernels, taps = composed.compose(weight, bias, fc_weight, shift_weight, fc_bias)
        if attention_bias is not None:
            # The tap in the centre lies on the map everywhere.
            num_taps = shift_weight.shape[1]
            centre = torch.arange(num_taps, device=weight.device) == num_taps // 2
            added = scaled(attention_rate, attention_bias)[:, None] * centre
            taps = added if taps is None else taps + added
        weight = scale_values(weight, attention_rate)
        bias = None if bias is None else scale_values(bias, attention_rate)
        kernels = kernels.to(dtype, memory_format=torch.channels_last)
    # Slices, so that autograd knows where the empty ones come from.
    weight = weight.to(dtype)
    others = (weight[:0, 0] if each is None else each.to(dtype) for each in (bias, mixing))
    return weight, *others, kernels, weight[:0, 0].to(fc_weight.dtype) if taps is None else taps


def taps_of_maps(values: Tensor, shift_weight: Tensor) -> Tensor:
    """What each tap adds for a value of each map that the shifts move, (channels, k²).

    Args:
        values: (head_dims · k²,).
        shift_weight: (channels, k², k, k).
    """
    num_shifts = shift_weight.shape[1]
    values = values.view(-1, 1, 1, num_shifts)
    shifts = shift_weight.reshape(len(values), -1, num_shifts, num_shifts)
    return values.matmul(shifts).view(-1, num_shifts)


def scaled(rate: Optional[Tensor], values: Tensor) -> Tensor:
    return values if rate is None else rate * values


def scale_values(rows: Tensor, rate: Optional[Tensor]) -> Tensor:
    """Multiply the last third of the rows, which project to values, by a rate."""
    if rate is None:
        return rows
    others, values = rows.split([len(rows) // 3 * 2, len(rows) // 3])
    return torch.cat([others, rate * values])
