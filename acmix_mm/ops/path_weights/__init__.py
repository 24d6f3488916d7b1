"""The weights of both paths as GPUs run them: of the projections, and of one convolution.

Paper: arXiv 2111.14556, section 4.1. The convolution path is linear in the layer's input, see
:mod:`acmix_mm.ops.projected_shift_conv`, and attention is linear in the values: its rate scales
their projection.
"""

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.path_weights.reference import compose_paths_reference
from acmix_mm.ops.path_weights.triton import compose_paths_triton

__all__ = ['PathWeights', 'compose_paths', 'convolve_composed']


class PathWeights(NamedTuple):
    """What :func:`compose_paths` returns.

    Attributes:
        weight: of the projections, (3 · channels, in_channels).
        bias: of the projections, (3 · channels,), or None.
        mixing: weight of the linear layer before a grouped convolution, (head_dims · k²,
            in_channels), or None.
        kernels: of the convolution, in the memory format channels last.
        taps: what each tap of the kernels adds to an output whose tap lies on the map, (channels,
            k²), in at least float32, or None.
    """

    weight: Tensor
    bias: Optional[Tensor]
    mixing: Optional[Tensor]
    kernels: Tensor
    taps: Optional[Tensor]


def compose_paths(weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor, shift_weight: Tensor,
                  fc_bias: Optional[Tensor], attention_rate: Optional[Tensor],
                  convolution_rate: Optional[Tensor], attention_bias: Optional[Tensor],
                  dtype: torch.dtype, *, is_grouped: bool = False,
                  backend: Optional[str] = None) -> PathWeights:
    """Compose the weights of a layer of two paths for :func:`convolve_composed`.

    They are computed in at least float32, also under autocast, and rounded once.

    Args:
        weight: of the projections, (3 · channels, in_channels), any floating dtype.
        bias: of the projections, (3 · channels,), or None.
        fc_weight: (k², 3 · num_heads).
        shift_weight: (channels, k², k, k) with channels in the order (head_dims, num_heads); k odd.
        fc_bias: (k²,), or None.
        attention_rate: factor of the attention path, (1,), or None for one.
        convolution_rate: factor of the convolution path, (1,), or None for one.
        attention_bias: added to the output of attention before its rate, (channels,), or None.
        dtype: of the map, and of the results but ``taps``.
        is_grouped: whether to compose the fc with the projections only, for a grouped convolution,
            or all of the path into a dense one.
        backend: ``'reference'`` or ``'triton'``. By default ``'triton'`` on a GPU that can run it.

    Returns:
        See :class:`PathWeights`.

    Raises:
        ValueError: an argument is invalid.
    """
    channels, num_shifts, num_maps = len(shift_weight), *fc_weight.shape
    if len(weight) != 3 * channels or num_maps % 3 or channels % (num_maps // 3):
        raise ValueError('compose_paths takes a weight of 3 · channels rows, and an fc of 3 · '
                         f'num_heads maps, got {len(weight)} and {num_maps} for {channels} '
                         'channels.')
    if shift_weight.shape[1:].numel() != num_shifts**2:
        raise ValueError(f'{num_shifts} shifts of the fc need a shift_weight of shape (channels, '
                         f'k², k, k), got {tuple(shift_weight.shape)}.')
    automatic = 'triton' if weight.is_cuda and runs_triton(weight) else 'reference'
    run = select_backend('compose_paths', backend, weight.device, automatic=automatic,
                         exporting='reference')
    parts = run(weight, bias, fc_weight, shift_weight, fc_bias, attention_rate, convolution_rate,
                attention_bias, dtype, is_grouped)
    # Custom ops return tensors only; those that do not exist are empty.
    given: list[Any] = [each if each.numel() else None for each in parts]
    return PathWeights(*given)


def convolve_composed(x: Tensor, weights: PathWeights, stride: int = 1,
                      dilation: int = 1) -> Tensor:
    """Compute the convolution path without ``weights.taps``, which
    :func:`acmix_mm.ops.add_paths` adds.

    Args:
        x: (batch, height, width, in_channels), of the dtype of the weights.
        weights: from :func:`compose_paths`.
        stride: distance between the positions of the output.
        dilation: distance between the taps of the kernel.

    Returns:
        (batch, ⌈height / stride⌉, ⌈width / stride⌉, channels).
    """
    groups = 1
    if weights.mixing is not None:
        x = F.linear(x, weights.mixing)
        groups = x.shape[3] // weights.kernels.shape[1]
    out = F.conv2d(x.permute(0, 3, 1, 2), weights.kernels, stride=stride, dilation=dilation,
                   padding=dilation * (weights.kernels.shape[-1] // 2), groups=groups)
    return out.permute(0, 2, 3, 1)


register_backends('compose_paths', Backend('reference', compose_paths_reference),
                  Backend('triton', compose_paths_triton, triton_unavailable))
