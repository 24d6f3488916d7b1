"""Self-attention over the neighbourhood of each query, the attention path of ACmix in a ResNet.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path, local attention with a
k_a × k_a window); the position encoding and the reflection padding follow the authors' code.
"""

from typing import Optional

import torch
from torch import Tensor

from acmix_mm.ops.backend import Backend, register_backends, select_backend, triton_unavailable
from acmix_mm.ops.checks import check_odd_kernel, check_projections
from acmix_mm.ops.sliding_attention.dense import sliding_attention_dense
from acmix_mm.ops.sliding_attention.reference import sliding_attention_reference
from acmix_mm.ops.sliding_attention.tiled import sliding_attention_tiled
from acmix_mm.ops.sliding_attention.triton import has_kernel, sliding_attention_triton


def sliding_window_attention(qkv: Tensor, positions: Tensor, kernel_size: int, *, stride: int = 1,
                             dilation: int = 1, scale: Optional[float] = None,
                             backend: Optional[str] = None) -> Tensor:
    """Attend from every stride-th position to the kernel_size² positions around it.

    out_i = Σ_j softmax_j(scale · q_i · (k_j + p_i − p_j)) · v_j, j over the neighbourhood of i. Its
    positions are ``dilation`` apart, with reflection padding at the edges of the map.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype and strides.
        positions: position encoding p, (height, width, head_dims), shared by all heads; float32, or
            wider if ``qkv`` is. Keys are rounded to the dtype of ``qkv`` after subtracting it.
        kernel_size: side of the neighbourhood, odd.
        stride: distance between queries.
        dilation: distance between neighbours.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        backend: ``'reference'``, ``'tiled'``, ``'dense'`` or ``'triton'``. By default ``'triton'``
            on a GPU that can run it, ``'dense'`` in an export, otherwise ``'tiled'``.

    Returns:
        (batch, ⌈height / stride⌉, ⌈width / stride⌉, num_heads · head_dims), in the dtype of
        ``qkv``.

    Raises:
        ValueError: an argument is invalid, or the backend ``'triton'`` cannot run on them.
    """
    check_projections('sliding_window_attention', qkv, positions)
    check_odd_kernel('sliding_window_attention', kernel_size)
    if scale is None:
        scale = qkv.shape[5]**-0.5
    automatic = 'triton' if qkv.is_cuda and has_kernel(qkv, stride, dilation) else 'tiled'
    run = select_backend('sliding_window_attention', backend, qkv.device, automatic=automatic,
                         exporting='dense')
    # In half precision, neighbours far from the centre of a map would have the same coordinates.
    positions = positions.to(torch.promote_types(qkv.dtype, torch.float32))
    out = run(qkv, positions, kernel_size, stride, dilation, scale)
    return out.flatten(3)


register_backends('sliding_window_attention', Backend('reference', sliding_attention_reference),
                  Backend('tiled', sliding_attention_tiled),
                  Backend('dense', sliding_attention_dense),
                  Backend('triton', sliding_attention_triton, triton_unavailable))
