"""Self-attention within (shifted) windows, the attention path of ACmix in a Swin host.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path); the windows and their
shift are those of Swin, arXiv 2103.14030, section 3.2.
"""

from typing import Callable, Optional

import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    is_exporting,
    preferred_backend,
    register_backends,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.window_attention.chunked import (
    window_attention_and_map_chunked,
    window_attention_chunked,
)
from acmix_mm.ops.window_attention.masks import MASKED_LOGIT
from acmix_mm.ops.window_attention.padding import padding_first, padding_values
from acmix_mm.ops.window_attention.reference import window_attention_reference
from acmix_mm.ops.window_attention.sdpa import window_attention_sdpa
from acmix_mm.ops.window_attention.triton import (
    attend_projections_triton,
    has_kernel,
    window_attention_triton,
)

__all__ = ['MASKED_LOGIT', 'pads_in_place', 'projected_window_attention', 'rolls_in_place',
           'window_attention', 'window_attention_and_map']


def window_attention(qkv: Tensor, bias: Tensor, window_size: tuple[int, int], *,
                     shift_size: int = 0, padding: Optional[Tensor] = None,
                     is_rolled: bool = False, scale: Optional[float] = None, dropout_p: float = 0.0,
                     backend: Optional[str] = None) -> Tensor:
    """Attend within each window of a map: softmax(q · kᵀ · scale + bias) · v.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype.
        bias: position bias between the positions of a window in row-major order,
            (num_heads, area, area) with area = window height · window width, any floating dtype.
        window_size: (height, width) of a window.
        shift_size: number of pixels by which the map is rolled. Positions from opposite edges of
            the map do not attend to each other.
        padding: queries, keys and values of a position outside of the map, (3, num_heads,
            head_dims): those of the input zero, that is, the bias of the projections. If given, the
            map is padded at the bottom and right to whole windows and rolled by ``-shift_size``
            along both axes; the output is rolled back, without the padding. If None, windows divide
            the map, which has already been rolled; so is the output.
        is_rolled: whether a map to be padded has been rolled by ``-shift_size``, without padding;
            so is the output.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        backend: ``'reference'``, ``'sdpa'``, ``'chunked'`` or ``'triton'``. By default and without
            dropout, ``'triton'`` on a GPU that can run it and ``'chunked'`` on a CPU; otherwise and
            in an export ``'sdpa'``. Only ``'triton'`` and ``'chunked'`` pad without copying the
            map, and only ``'triton'`` rolls without copying it; see :func:`pads_in_place` and
            :func:`rolls_in_place`.

    Returns:
        (batch, height, width, num_heads · head_dims), in the dtype of ``qkv``.

    Raises:
        ValueError: an argument is invalid, the backend ``'chunked'`` or ``'triton'`` is given
            dropout, or the backend ``'triton'`` cannot run on the arguments.
    """
    run, arguments = _prepare(qkv, bias, window_size, shift_size, padding, is_rolled, scale,
                              dropout_p, backend)
    return run(*arguments)


def window_attention_and_map(qkv: Tensor, bias: Tensor, window_size: tuple[int, int], *,
                             shift_size: int, padding: Optional[Tensor], is_rolled: bool,
                             scale: float, dropout_p: float = 0.0,
                             backend: Optional[str] = None) -> tuple[Tensor, Tensor]:
    """:func:`window_attention`, for a map that another operator reads, too.

    In the backward pass, ``'chunked'`` adds to the other's gradient in place. Otherwise autograd
    would add both gradients, each as large as the map, into a third.

    Returns:
        The output, and ``qkv``, which the other operator should read. Its gradient must be a new
        tensor, as that of a convolution or a product is, and that of a sum is not.
    """
    run, arguments = _prepare(qkv, bias, window_size, shift_size, padding, is_rolled, scale,
                              dropout_p, backend)
    if run is window_attention_chunked:
        return window_attention_and_map_chunked(*arguments)
    return run(*arguments), qkv


def projected_window_attention(x: Tensor, weight: Tensor, bias: Optional[Tensor],
                               position_bias: Tensor, window_size: tuple[int, int], *,
                               shift_size: int = 0, scale: Optional[float] = None,
                               backend: Optional[str] = None) -> tuple[Tensor, Tensor]:
    """:func:`window_attention` of the projections of a map that another operator reads, too.

    In the backward pass, ``'triton'`` adds to the other's gradient in place, and sums the gradient
    of the projections' bias over the map and its padding at once.

    Args:
        x: a map that has been rolled by ``-shift_size`` without padding, (batch, height, width,
            in_channels), any floating dtype.
        weight: of the projections, (3 · channels, in_channels), of the dtype of ``x``.
        bias: of the projections, (3 · channels,), of the dtype of ``x``, or None.
        position_bias: see :func:`window_attention`.
        window_size: see there.
        shift_size: see there.
        scale: see there.
        backend: see there.

    Returns:
        The output, (batch, height, width, channels), rolled as ``x``; and ``x``, which the other
        operator should read. Its gradient must be a new tensor, as that of a convolution or a
        product is, and that of a sum is not.
    """
    qkv = F.linear(x, weight, bias).unflatten(3, (3, len(position_bias), -1))
    padding = padding_values(qkv, bias)
    run, arguments = _prepare(qkv, position_bias, window_size, shift_size, padding, True, scale,
                              0.0, backend)
    if run is window_attention_triton:
        *_, scale, _ = arguments
        return attend_projections_triton(x, weight, bias, qkv, position_bias, padding, window_size,
                                         shift_size, scale)
    return run(*arguments), x


def _prepare(qkv: Tensor, bias: Tensor, window_size: tuple[int, int], shift_size: int,
             padding: Optional[Tensor], is_rolled: bool, scale: Optional[float], dropout_p: float,
             backend: Optional[str]) -> tuple[Callable[..., Tensor], tuple]:
    """Check the arguments; return the backend and its arguments."""
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError('window_attention takes qkv of shape (batch, height, width, 3, num_heads, '
                         f'head_dims), got {tuple(qkv.shape)}.')
    height, width, num_heads, head_dims = (qkv.shape[axis] for axis in (1, 2, 4, 5))
    if padding is None and (height % window_size[0] or width % window_size[1]):
        raise ValueError(f'A map of {height}×{width} does not divide into windows of '
                         f'{window_size[0]}×{window_size[1]}; pad it first, or pass padding.')
    if padding is not None and padding.shape != qkv.shape[3:]:
        raise ValueError(f'window_attention takes padding of shape {tuple(qkv.shape[3:])} for this '
                         f'map, got {tuple(padding.shape)}.')
    area = window_size[0] * window_size[1]
    if bias.shape != (num_heads, area, area):
        raise ValueError(f'window_attention takes a bias of shape {(num_heads, area, area)} for '
                         f'these windows and heads, got {tuple(bias.shape)}.')
    if not 0 <= shift_size < min(window_size):
        raise ValueError(f'shift_size must lie in [0, {min(window_size)}), got {shift_size}.')
    if scale is None:
        scale = head_dims**-0.5
    run = select_backend('window_attention', backend, qkv.device, exporting='sdpa',
                         automatic=_automatic(qkv, window_size, head_dims, dropout_p))
    return run, (qkv, bias, padding, window_size, shift_size, is_rolled or padding is None, scale,
                 dropout_p)


def pads_in_place(x: Tensor, window_size: tuple[int, int], head_dims: int,
                  dropout_p: float = 0.0) -> bool:
    """Whether :func:`window_attention` pads without copying the map.

    If not, a layer should pad and roll the smaller input of its projections.

    Args:
        x: of the dtype and on the device of the map, any shape.
        window_size: (height, width) of a window.
        head_dims: channels of a head.
        dropout_p: probability of dropping an attention weight.
    """
    return _chosen(x, window_size, head_dims, dropout_p) in ('triton', 'chunked')


def rolls_in_place(x: Tensor, window_size: tuple[int, int], head_dims: int,
                   dropout_p: float = 0.0) -> bool:
    """Whether :func:`window_attention` rolls without copying the map; see :func:`pads_in_place`."""
    return _chosen(x, window_size, head_dims, dropout_p) == 'triton'


def _chosen(x: Tensor, window_size: tuple[int, int], head_dims: int,
            dropout_p: float) -> Optional[str]:
    chosen = preferred_backend('window_attention')
    if chosen is None and not is_exporting():
        chosen = _automatic(x, window_size, head_dims, dropout_p)
    return chosen


def _automatic(x: Tensor, window_size: tuple[int, int], head_dims: int, dropout_p: float) -> str:
    if dropout_p:
        return 'sdpa'
    if x.is_cuda and has_kernel(x, window_size, head_dims):
        return 'triton'
    return 'chunked' if x.device.type == 'cpu' else 'sdpa'


register_backends('window_attention',
                  Backend('reference', padding_first(window_attention_reference)),
                  Backend('sdpa', padding_first(window_attention_sdpa)),
                  Backend('chunked', window_attention_chunked),
                  Backend('triton', window_attention_triton, triton_unavailable))
