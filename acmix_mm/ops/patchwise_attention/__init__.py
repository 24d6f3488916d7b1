"""Patch-wise self-attention, the attention path of ACmix in a SAN host, as two operators.

Paper: arXiv 2004.13621, section 3.2 (patch-wise self-attention with concatenation); the reflection
padding follows the authors' code. Two linear layers compute the attention weights of a position
from all the keys around it. Neither those keys nor the weights are ever held for a whole map,
where they would take kernel_size² times its memory.
"""

from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.checks import check_odd_kernel
from acmix_mm.ops.patchwise_attention.chunked import apply_chunked
from acmix_mm.ops.patchwise_attention.kernel_rows import apply_by_kernel_row
from acmix_mm.ops.patchwise_attention.reference import aggregate, apply_reference, compute_features


def patch_features(q: Tensor, k: Tensor, scale: Tensor, shift: Tensor, weight: Tensor,
                   kernel_size: int, *, backend: Optional[str] = None) -> Tensor:
    """Compute features of each position from its query and all the keys around it.

    out_i = weight · relu(scale · [q_i, k_j for all j] + shift), j over the neighbourhood of i in
    row-major order, with reflection padding at the edges of the map.

    Args:
        q: queries, (batch, channels, height, width), any floating dtype.
        k: keys, (batch, key channels, height, width).
        scale: (channels + key channels · kernel_size²,), where the neighbours vary fastest. Applied
            in its own precision, which may be higher than that of ``q``.
        shift: the same shape and dtype as ``scale``.
        weight: (features, channels + key channels · kernel_size²).
        kernel_size: side of the neighbourhood, odd.
        backend: ``'reference'`` or ``'chunked'``. By default the latter, in an export the former.

    Returns:
        (batch, features, height, width), in the dtype of ``q``.

    Raises:
        ValueError: an argument is invalid.
    """
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError('patch_features takes q and k of shape (batch, channels, height, width), '
                         'equal except for their channels, got '
                         f'{tuple(q.shape)} and {tuple(k.shape)}.')
    check_odd_kernel('patch_features', kernel_size)
    width = q.shape[1] + k.shape[1] * kernel_size**2
    if scale.shape != (width,) or shift.shape != (width,) or weight.shape[1:] != (width,):
        raise ValueError(f'These maps need scale and shift of shape {(width,)} and a weight of '
                         f'shape (features, {width}), got {tuple(scale.shape)}, '
                         f'{tuple(shift.shape)} and {tuple(weight.shape)}.')
    run = select_backend('patch_features', backend, q.device, automatic='chunked',
                         exporting='reference')
    return run(compute_features, kernel_size, k, q, scale, shift, weight)


def patch_aggregation(v: Tensor, features: Tensor, weight: Tensor, bias: Tensor,
                      kernel_size: int, *, backend: Optional[str] = None) -> Tensor:
    """Sum the values around each position, with weights that are linear in its features.

    out_i = Σ_j (weight_j · features_i + bias_j) · v_j, j over the neighbourhood of i in row-major
    order, with reflection padding at the edges of the map. Channel c has the weights of group
    c mod groups.

    Args:
        v: values, (batch, channels, height, width), any floating dtype.
        features: (batch, features, height, width).
        weight: (groups · kernel_size², features), where the neighbours vary fastest; groups
            divides the channels.
        bias: (groups · kernel_size²,).
        kernel_size: side of the neighbourhood, odd.
        backend: ``'reference'``, ``'chunked'`` or ``'kernel_rows'``. By default ``'chunked'``, in
            an export ``'kernel_rows'``.

    Returns:
        (batch, channels, height, width), in the dtype of ``v``.

    Raises:
        ValueError: an argument is invalid.
    """
    if v.dim() != 4 or features.dim() != 4 or (
            (v.shape[0], *v.shape[2:]) != (features.shape[0], *features.shape[2:])):
        raise ValueError('patch_aggregation takes v and features of shape (batch, channels, height,'
                         ' width), equal except for their channels, got '
                         f'{tuple(v.shape)} and {tuple(features.shape)}.')
    check_odd_kernel('patch_aggregation', kernel_size)
    rows, area = weight.shape[0], kernel_size**2
    if rows % area or v.shape[1] % max(rows // area, 1) or (
            weight.shape != (rows, features.shape[1]) or bias.shape != (rows,)):
        raise ValueError(f'These maps need a weight of shape (groups · {area}, '
                         f'{features.shape[1]}) and a bias to match, groups dividing {v.shape[1]}, '
                         f'got {tuple(weight.shape)} and {tuple(bias.shape)}.')
    run = select_backend('patch_aggregation', backend, v.device, automatic='chunked',
                         exporting='kernel_rows')
    return run(aggregate, kernel_size, v, features, weight, bias)


register_backends('patch_features', Backend('reference', apply_reference),
                  Backend('chunked', apply_chunked))
register_backends('patch_aggregation', Backend('reference', apply_reference),
                  Backend('chunked', apply_chunked), Backend('kernel_rows', apply_by_kernel_row))
