"""Self-attention from every position of a map to all of its positions."""

from typing import Optional

import torch
from torch import Tensor

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.checks import check_projections
from acmix_mm.ops.global_attention.reference import global_attention_reference
from acmix_mm.ops.global_attention.sdpa import global_attention_sdpa


def global_attention(qkv: Tensor, positions: Tensor, *, stride: int = 1,
                     scale: Optional[float] = None, dropout_p: float = 0.0,
                     backend: Optional[str] = None) -> Tensor:
    """Attend from every stride-th position to all positions.

    out_i = Σ_j softmax_j(scale · q_i · (k_j + p_i − p_j)) · v_j, j over the whole map: the equation
    of :func:`acmix_mm.ops.sliding_window_attention` without its neighbourhood.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype and strides.
        positions: position encoding p, (height, width, head_dims), shared by all heads; float32, or
            wider if ``qkv`` is. Keys are rounded to the dtype of ``qkv`` after subtracting it.
        stride: distance between queries.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        backend: ``'reference'`` or ``'sdpa'``; by default the latter, whose memory is linear in the
            size of the map, except with dropout on a CPU, where torch has no fused attention.

    Returns:
        (batch, ⌈height / stride⌉, ⌈width / stride⌉, num_heads · head_dims), in the dtype of
        ``qkv``.

    Raises:
        ValueError: an argument is invalid.
    """
    check_projections('global_attention', qkv, positions)
    if scale is None:
        scale = qkv.shape[5]**-0.5
    positions = positions.to(torch.promote_types(qkv.dtype, torch.float32))
    run = select_backend('global_attention', backend, qkv.device, automatic='sdpa',
                         exporting='sdpa')
    return run(qkv, positions, stride, scale, dropout_p).flatten(3)


register_backends('global_attention', Backend('reference', global_attention_reference),
                  Backend('sdpa', global_attention_sdpa))
