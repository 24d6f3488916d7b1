"""Self-attention between blocks of positions: window, random blocks and global tokens.

Paper: arXiv 2007.14062 (BigBird), section 2 and appendix D, arranged in two dimensions.
"""

from typing import Optional

import torch
from torch import Tensor

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.block_attention.pattern import BlockPattern
from acmix_mm.ops.block_attention.reference import block_attention_reference
from acmix_mm.ops.block_attention.sdpa import block_attention_sdpa
from acmix_mm.ops.checks import check_projections

__all__ = ['BlockPattern', 'block_attention']


def block_attention(qkv: Tensor, positions: Tensor, pattern: BlockPattern, *, stride: int = 1,
                    scale: Optional[float] = None, dropout_p: float = 0.0,
                    backend: Optional[str] = None) -> Tensor:
    """Attend from every stride-th position to the positions that a pattern of blocks allows.

    out_i = Σ_j softmax_j(scale · q_i · (k_j + p_i − p_j)) · v_j, j over the positions that
    :class:`acmix_mm.ops.BlockPattern` describes, each once: the equation of
    :func:`acmix_mm.ops.sliding_window_attention` with another neighbourhood.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype and strides. Blocks need not divide the map.
        positions: position encoding p, (height, width, head_dims), shared by all heads; float32, or
            wider if ``qkv`` is. Keys are rounded to the dtype of ``qkv`` after subtracting it.
        pattern: which positions attend to which.
        stride: distance between queries; divides the side of a block.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        backend: ``'reference'`` or ``'sdpa'``; by default the latter, whose memory is linear in the
            size of the map.

    Returns:
        (batch, ⌈height / stride⌉, ⌈width / stride⌉, num_heads · head_dims), in the dtype of
        ``qkv``.

    Raises:
        ValueError: an argument is invalid.
    """
    check_projections('block_attention', qkv, positions)
    pattern.check(stride)
    if scale is None:
        scale = qkv.shape[5]**-0.5
    positions = positions.to(torch.promote_types(qkv.dtype, torch.float32))
    run = select_backend('block_attention', backend, qkv.device, automatic='sdpa',
                         exporting='sdpa')
    return run(qkv, positions, pattern, stride, scale, dropout_p).flatten(3)


register_backends('block_attention', Backend('reference', block_attention_reference),
                  Backend('sdpa', block_attention_sdpa))
