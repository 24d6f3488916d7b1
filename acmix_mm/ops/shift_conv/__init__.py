"""The convolution path of ACmix: a light fully connected layer, then shift and summation.

Paper: arXiv 2111.14556, section 4.1 (stage II of the convolution path) and section 4.2, which
replaces the fixed shifts by a grouped convolution with learned kernels, initialised as shifts.
"""

from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.checks import check_odd_kernel
from acmix_mm.ops.shift_conv.conv2d import shift_conv_conv2d
from acmix_mm.ops.shift_conv.grouped import shift_conv_folded, shift_conv_two_step
from acmix_mm.ops.shift_conv.reference import shift_conv_reference, shift_sum
from acmix_mm.ops.shift_conv.triton import shift_conv_triton

__all__ = ['shift_conv', 'shift_sum']


def shift_conv(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
               fc_bias: Optional[Tensor] = None, *, stride: int = 1, dilation: int = 1,
               backend: Optional[str] = None) -> Tensor:
    """Mix the maps of all heads into k² maps, shift each, and sum them for every output head.

    Args:
        maps: queries, keys and values as maps of head_dims channels, (batch, num_maps, head_dims,
            height, width), any floating dtype and strides. num_maps is 3 · num_heads if all three
            are as wide as the output.
        fc_weight: (k², num_maps), shared by all head_dims channels.
        shift_weight: (head_dims · num_heads, k², k, k), k odd. Output channels are ordered
            (head_dims, num_heads), as the grouped convolution requires.
        fc_bias: (k²,), or None.
        stride: distance between the positions of the output.
        dilation: distance between the taps of the kernel.
        backend: ``'reference'``, ``'two_step'``, ``'folded'``, ``'conv2d'`` or ``'triton'``. By
            default ``'triton'`` on a GPU that can run it, ``'conv2d'`` in an export, otherwise the
            cheaper of ``'two_step'`` and ``'folded'``.

    Returns:
        (batch, head_dims · num_heads, ⌈height / stride⌉, ⌈width / stride⌉), in the dtype of
        ``maps``. Zero padding is applied after the bias.

    Raises:
        ValueError: an argument is invalid, or the backend ``'triton'`` cannot run on these maps.
    """
    if maps.dim() != 5:
        raise ValueError('shift_conv takes maps of shape (batch, num_maps, head_dims, height, '
                         f'width), got {tuple(maps.shape)}.')
    num_maps, head_dims = maps.shape[1:3]
    num_shifts, kernel_size = shift_weight.shape[1], shift_weight.shape[-1]
    num_heads = shift_weight.shape[0] // head_dims
    if shift_weight.shape != (head_dims * num_heads, num_shifts, kernel_size, kernel_size):
        raise ValueError(f'Heads of {head_dims} channels need a shift_weight of shape ({head_dims} '
                         f'· num_heads, k², k, k), got {tuple(shift_weight.shape)}.')
    check_odd_kernel('shift_conv', kernel_size)
    if fc_weight.shape != (num_shifts, num_maps):
        raise ValueError(f'{num_maps} maps and {num_shifts} shifts need an fc_weight of shape '
                         f'{(num_shifts, num_maps)}, got {tuple(fc_weight.shape)}.')
    # Per pixel and channel, for k = 3 and three maps per head, two_step takes 27 + 81
    # multiplications and folded 27 · num_heads: equal at four heads. folded moves less data, and
    # on a CPU it is the faster one up to six.
    automatic = 'folded' if num_heads <= 6 else 'two_step'
    if maps.is_cuda and runs_triton(maps):
        automatic = 'triton'
    run = select_backend('shift_conv', backend, maps.device, automatic=automatic,
                         exporting='conv2d')
    return run(maps, fc_weight, shift_weight, fc_bias, stride, dilation)


register_backends('shift_conv', Backend('reference', shift_conv_reference),
                  Backend('two_step', shift_conv_two_step), Backend('folded', shift_conv_folded),
                  Backend('conv2d', shift_conv_conv2d),
                  Backend('triton', shift_conv_triton, triton_unavailable))
