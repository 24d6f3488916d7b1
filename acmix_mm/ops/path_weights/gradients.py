"""The gradients of compose_paths in torch.

Indices of the sums: d, h for the depth and the head of a channel, s for a shift, t for a tap, m for
a map of the fc, i for an input channel.
"""

from collections.abc import Sequence
from typing import Any, Optional

from torch import Tensor, einsum

from acmix_mm.ops.path_weights.reference import scale_values
from acmix_mm.ops.projected_shift_conv.operations import group_size
from acmix_mm.ops.projected_shift_conv.precision import at_least_float32


def compose_paths_gradients(grads: Sequence[Any], tensors: Sequence[Any],
                            is_grouped: bool) -> list[Optional[Tensor]]:
    """Return the gradients of ``tensors``; None for None.

    Args:
        grads: of the fields of :class:`acmix_mm.ops.path_weights.PathWeights`.
        tensors: the tensors that :func:`acmix_mm.ops.compose_paths` takes, in that order.
        is_grouped: see there.
    """
    (weight, bias, fc_weight, shift_weight, fc_bias, attention_rate, convolution_rate,
     attention_bias) = tensors
    grad_weight, grad_bias, grad_mixing, grad_kernels, grad_taps = grads
    weight, fc_weight, shift_weight, grad_weight, grad_kernels = (
        at_least_float32(each)
        for each in (weight, fc_weight, shift_weight, grad_weight, grad_kernels))
    one = weight.new_ones(1)
    rate = one if convolution_rate is None else convolution_rate.to(weight.dtype)
    num_shifts, num_maps = fc_weight.shape
    num_heads, in_channels = num_maps // 3, weight.shape[1]
    by_map = weight.view(num_maps, -1, in_channels)
    shifts = shift_weight.reshape(-1, num_heads, num_shifts, num_shifts)
    head_dims = len(shifts)

    def of_shape(tensor: Optional[Tensor], *shape: int) -> Tensor:
        """Tensors that do not exist are zero."""
        if tensor is None:
            return weight.new_zeros(shape)
        return tensor.to(weight.dtype).reshape(shape)

    bias_by_map, grad_bias = (
        of_shape(each, num_maps, head_dims) for each in (bias, grad_bias))

    grad_rate = (grad_weight * weight).view(3, -1)[2].sum()
    grad_rate = grad_rate + (grad_bias * bias_by_map).view(3, -1)[2].sum()
    grad_weight, grad_bias = (scale_values(each, attention_rate)
                              for each in (grad_weight, grad_bias))
    grad_weight = grad_weight.view(by_map.shape)
    of_taps, fc_bias_or_zero = (of_shape(grad_taps, *shifts.shape[:3]),
                                of_shape(fc_bias, num_shifts))
    if is_grouped:
        mixed = of_shape(grad_mixing, head_dims, num_shifts, in_channels)
        # The biases of the maps that the shifts move, and their gradient.
        mixed_bias = einsum('sm,md->ds', fc_weight, bias_by_map) + fc_bias_or_zero
        grad_mixed_bias = einsum('dhst,dht->ds', rate * shifts, of_taps)
        grad_weight = grad_weight + einsum('sm,dsi->mdi', fc_weight, mixed)
        grad_bias = grad_bias + einsum('sm,ds->md', fc_weight, grad_mixed_bias)
        grad_fc = (einsum('dsi,mdi->sm', mixed, by_map) +
                   einsum('ds,md->sm', grad_mixed_bias, bias_by_map))
        grad_of_fc = grad_mixed_bias.sum(0)
        group = group_size(head_dims)
        blocks = grad_kernels.reshape(head_dims // group, group, num_heads, group, num_shifts, -1)
        grad_shifts = blocks.diagonal(0, 1, 3).movedim(-1, 1).reshape(shifts.shape)
        grad_shifts = grad_shifts + einsum('dht,ds->dhst', of_taps, mixed_bias)
    else:
        dense = grad_kernels.permute(0, 2, 3, 1).reshape(*shifts.shape[:3], in_channels)
        folded = einsum('dhst,sm->dhtm', rate * shifts, fc_weight)
        grad_weight = grad_weight + einsum('dhtm,dhti->mdi', folded, dense)
        grad_bias = grad_bias + einsum('dhtm,dht->md', folded, of_taps)
        grad_folded = (einsum('dhti,mdi->dhtm', dense, by_map) +
                       einsum('dht,md->dhtm', of_taps, bias_by_map))
        grad_shifts = (einsum('dhtm,sm->dhst', grad_folded, fc_weight) +
                       einsum('dht,s->dhst', of_taps, fc_bias_or_zero))
        grad_fc = einsum('dhst,dhtm->sm', rate * shifts, grad_folded)
        grad_of_fc = einsum('dhst,dht->s', rate * shifts, of_taps)
    grad_added = of_taps[:, :, num_shifts // 2].flatten()
    if attention_bias is not None:
        grad_rate = grad_rate + (grad_added * attention_bias).sum()
        if attention_rate is not None:
            grad_added = attention_rate * grad_added
    found = (grad_weight, grad_bias, grad_fc, rate * grad_shifts, grad_of_fc, grad_rate,
             (shifts * grad_shifts).sum(), grad_added)
    return [None if each is None else grad.reshape(each.shape).to(each.dtype)
            for grad, each in zip(found, tensors)]
