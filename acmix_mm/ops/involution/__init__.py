"""Involution: a kernel for each position, shared by the channels of a group.

Paper: arXiv 2103.06255, section 3.1, equation 4, and algorithm 1 for stride and dilation. A
convolution has the same kernel at every position and one for each channel; attention computes its
weights by comparing positions.
"""

from typing import Optional

from torch import Tensor

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.checks import check_odd_kernel
from acmix_mm.ops.involution.chunked import involution_chunked
from acmix_mm.ops.involution.reference import involution_reference


def involution(x: Tensor, kernels: Tensor, *, stride: int = 1, dilation: int = 1,
               backend: Optional[str] = None) -> Tensor:
    """Apply to each position the kernel of that position.

    out[c, i] = Σ_j kernels[group of c, j, i] · x[c, stride · i + dilation · (j − ⌊k / 2⌋)], j over
    a k × k neighbourhood; x is padded with zeros. The group of channel c is
    ⌊c · groups / channels⌋.

    Args:
        x: (batch, channels, height, width), any floating dtype and strides.
        kernels: (batch, groups, k, k, ⌈height / stride⌉, ⌈width / stride⌉); groups divides the
            channels and k is odd. Cast to the dtype of ``x``.
        stride: distance between the positions of the output.
        dilation: distance between neighbours.
        backend: ``'reference'`` or ``'chunked'``. By default the latter, in an export the former.

    Returns:
        (batch, channels, ⌈height / stride⌉, ⌈width / stride⌉), in the dtype and memory format of
        ``x``.

    Raises:
        ValueError: an argument is invalid.
    """
    if x.dim() != 4:
        raise ValueError('involution takes x of shape (batch, channels, height, width), got '
                         f'{tuple(x.shape)}.')
    batch, channels, height, width = x.shape
    size = tuple((extent + stride - 1) // stride for extent in (height, width))
    if kernels.dim() != 6 or kernels.shape[2] != kernels.shape[3] or (
            (kernels.shape[0], *kernels.shape[4:]) != (batch, *size)) or (
            not kernels.shape[1] or channels % kernels.shape[1]):
        raise ValueError(f'This map needs kernels of shape ({batch}, groups, k, k, {size[0]}, '
                         f'{size[1]}), groups dividing {channels}, got {tuple(kernels.shape)}.')
    check_odd_kernel('involution', kernels.shape[2])
    run = select_backend('involution', backend, x.device, automatic='chunked',
                         exporting='reference')
    return run(x, kernels.to(x.dtype), stride, dilation)


register_backends('involution', Backend('reference', involution_reference),
                  Backend('chunked', involution_chunked))
