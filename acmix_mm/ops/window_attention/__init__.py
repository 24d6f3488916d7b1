"""Self-attention within (shifted) windows, the attention path of ACmix in a Swin host.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path); the windows and their
shift are those of Swin, arXiv 2103.14030, section 3.2.
"""

from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.window_attention.chunked import window_attention_chunked
from acmix_mm.ops.window_attention.masks import MASKED_LOGIT
from acmix_mm.ops.window_attention.reference import window_attention_reference
from acmix_mm.ops.window_attention.sdpa import window_attention_sdpa

__all__ = ['MASKED_LOGIT', 'window_attention']


def window_attention(qkv: Tensor, bias: Tensor, window_size: tuple[int, int], *,
                     shift_size: int = 0, scale: Optional[float] = None, dropout_p: float = 0.0,
                     backend: Optional[str] = None) -> Tensor:
    """Attend within each window of a map: softmax(q · kᵀ · scale + bias) · v.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype. In a shifted block, the map is already rolled by ``-shift_size`` along
            both axes.
        bias: position bias between the positions of a window in row-major order,
            (num_heads, area, area) with area = window height · window width.
        window_size: (height, width) of a window; each divides that of the map.
        shift_size: number of pixels by which the map has been rolled. Positions from opposite
            edges of the map do not attend to each other.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        backend: ``'reference'``, ``'sdpa'`` or ``'chunked'``. By default ``'chunked'`` on a CPU
            without dropout, otherwise and in an export ``'sdpa'``.

    Returns:
        (batch, height, width, num_heads · head_dims), in the dtype of ``qkv``.

    Raises:
        ValueError: an argument is invalid, or the backend ``'chunked'`` is given dropout.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError('window_attention takes qkv of shape (batch, height, width, 3, num_heads, '
                         f'head_dims), got {tuple(qkv.shape)}.')
    height, width, num_heads, head_dims = (qkv.shape[axis] for axis in (1, 2, 4, 5))
    if height % window_size[0] or width % window_size[1]:
        raise ValueError(f'A map of {height}×{width} does not divide into windows of '
                         f'{window_size[0]}×{window_size[1]}; pad it first.')
    area = window_size[0] * window_size[1]
    if bias.shape != (num_heads, area, area):
        raise ValueError(f'window_attention takes a bias of shape {(num_heads, area, area)} for '
                         f'these windows and heads, got {tuple(bias.shape)}.')
    if not 0 <= shift_size < min(window_size):
        raise ValueError(f'shift_size must lie in [0, {min(window_size)}), got {shift_size}.')
    if scale is None:
        scale = head_dims**-0.5
    automatic = 'chunked' if qkv.device.type == 'cpu' and not dropout_p else 'sdpa'
    run = select_backend('window_attention', backend, qkv.device, automatic=automatic,
                         exporting='sdpa')
    return run(qkv, bias.to(qkv.dtype), window_size, shift_size, scale, dropout_p)


register_backends('window_attention', Backend('reference', window_attention_reference),
                  Backend('sdpa', window_attention_sdpa),
                  Backend('chunked', window_attention_chunked))
