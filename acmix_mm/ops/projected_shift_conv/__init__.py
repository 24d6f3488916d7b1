"""The convolution path of ACmix as a function of the layer's input.

The path is linear: projections, fully connected layer and shift kernels can be composed into fewer
convolutions of the input. That suits GPUs, whose tensor cores run a dense convolution faster than
the fewer operations of narrow groups, which they cannot run.
"""

from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    is_exporting,
    preferred_backend,
    register_backends,
    select_backend,
)
from acmix_mm.ops.checks import check_odd_kernel
from acmix_mm.ops.projected_shift_conv.composed import projected_shift_conv_composed
from acmix_mm.ops.projected_shift_conv.grouped import projected_shift_conv_grouped
from acmix_mm.ops.projected_shift_conv.operations import operations
from acmix_mm.ops.projected_shift_conv.separate import (
    projected_shift_conv_reference,
    projected_shift_conv_separate,
)

__all__ = ['composition', 'projected_shift_conv']


def projected_shift_conv(x: Tensor, weight: Tensor, bias: Optional[Tensor], fc_weight: Tensor,
                         shift_weight: Tensor, fc_bias: Optional[Tensor] = None, *,
                         stride: int = 1, dilation: int = 1,
                         backend: Optional[str] = None) -> Tensor:
    """Project a map to queries, keys and values, and run :func:`shift_conv` on them.

    Paper: arXiv 2111.14556, section 4.1, stage I and the convolution path of stage II.

    Composed weights are computed in at least float32, also under autocast, and rounded once.

    Args:
        x: (batch, in_channels, height, width), any floating dtype and strides; fastest in the
            memory format channels last.
        weight: of the projections, (num_maps · head_dims, in_channels).
        bias: of the projections, (num_maps · head_dims,), or None.
        fc_weight: (k², num_maps), shared by all head_dims channels.
        shift_weight: (head_dims · num_heads, k², k, k), k odd.
        fc_bias: (k²,), or None.
        stride: distance between the positions of the output.
        dilation: distance between the taps of the kernel.
        backend: ``'composed'``, one dense convolution; ``'grouped'``, a matrix product with the fc
            composed into the projections, and a grouped convolution; ``'separate'``, the
            projections and :func:`shift_conv`; or ``'reference'``. By default the cheapest of the
            first three on a GPU (see :mod:`acmix_mm.ops.projected_shift_conv.operations`), that of
            the first two in an export, and ``'separate'`` on a CPU, or if
            :func:`acmix_mm.ops.use_backend` names a backend of :func:`shift_conv`.

    Returns:
        (batch, head_dims · num_heads, ⌈height / stride⌉, ⌈width / stride⌉). Zero padding is applied
        after both biases.

    Raises:
        ValueError: an argument is invalid.
    """
    if x.dim() != 4 or weight.shape[1:] != x.shape[1:2]:
        raise ValueError('projected_shift_conv takes x of shape (batch, in_channels, height, width)'
                         f' and weight (channels, in_channels), got {tuple(x.shape)} and '
                         f'{tuple(weight.shape)}.')
    num_shifts, num_maps = fc_weight.shape
    channels, kernel_size = len(shift_weight), shift_weight.shape[-1]
    head_dims = max(len(weight) // num_maps, 1)
    if len(weight) != num_maps * head_dims or channels % head_dims:
        raise ValueError(f'{num_maps} maps of the fc need a weight of num_maps · head_dims rows, '
                         'and a shift_weight of head_dims · num_heads kernels, got '
                         f'{len(weight)} and {channels}.')
    if shift_weight.shape[1:] != (num_shifts, kernel_size, kernel_size):
        raise ValueError(f'{num_shifts} shifts of the fc need a shift_weight of shape (channels, '
                         f'k², k, k), got {tuple(shift_weight.shape)}.')
    check_odd_kernel('projected_shift_conv', kernel_size)
    automatic = _cheapest(x, x.shape[1], head_dims, channels // head_dims, num_maps, kernel_size,
                          stride)
    run = select_backend('projected_shift_conv', backend, x.device, automatic=automatic,
                         exporting=automatic)
    return run(x, weight, bias, fc_weight, shift_weight, fc_bias, stride, dilation)


def composition(x: Tensor, in_channels: int, head_dims: int, num_heads: int, num_maps: int,
                kernel_size: int, stride: int = 1) -> Optional[str]:
    """The backend of :func:`projected_shift_conv` that applies, if it composes weights.

    If not, a layer whose other path needs the projections should pass them to :func:`shift_conv`.

    Args:
        x: on the device of the map, any shape.
        in_channels: channels of the map.
        head_dims: channels of a head.
        num_heads: number of output heads.
        num_maps: number of projected maps.
        kernel_size: k.
        stride: distance between the positions of the output.

    Returns:
        ``'composed'``, ``'grouped'`` or None.
    """
    chosen = preferred_backend('projected_shift_conv')
    if chosen is None:
        chosen = _cheapest(x, in_channels, head_dims, num_heads, num_maps, kernel_size, stride)
    return chosen if chosen in ('composed', 'grouped') else None


def _cheapest(x: Tensor, in_channels: int, head_dims: int, num_heads: int, num_maps: int,
              kernel_size: int, stride: int) -> str:
    is_exported = is_exporting()
    if not (x.is_cuda or is_exported) or preferred_backend('shift_conv'):
        return 'separate'
    counts = operations(in_channels, head_dims, num_heads, num_maps, kernel_size, stride)
    if is_exported:
        # Composed weights are constants, and other runtimes are slow to transpose the projections.
        del counts['separate']
    return min(counts, key=counts.__getitem__)


register_backends('projected_shift_conv', Backend('reference', projected_shift_conv_reference),
                  Backend('separate', projected_shift_conv_separate),
                  Backend('composed', projected_shift_conv_composed),
                  Backend('grouped', projected_shift_conv_grouped))
