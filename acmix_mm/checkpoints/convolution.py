"""Approximation of a plain convolution by the convolution path of ACmix."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

# The rates of an ACmix layer that uses its convolution path alone.
RATES = {'rate1': 0., 'rate2': 1.}
# Assumed correlation of neighbouring positions in the feature maps of a ResNet. A checkpoint does
# not determine it. In a small trained ResNet it fell from 0.8 in the first stage to 0.2 in the
# last, and 0.5 reduced the error by a fifth to a third compared with 0.
NEIGHBOUR_CORRELATION = 0.5


class Approximation(NamedTuple):
    """Parameters of an ``ACmixConv2d`` whose convolution path approximates a convolution.

    Attributes:
        parameters: ``conv1.weight``, ``conv2.weight``, ``conv3.weight``, ``fc.weight`` and
            ``dep_conv.weight``, for a convolution rate of one and biases of zero.
        kernel: the kernel of the convolution path, (out_channels, in_channels, k, k).
        error: standard deviation of the error of the outputs, relative to that of the outputs, for
            inputs with the given statistics; 0 is exact.
    """

    parameters: dict[str, Tensor]
    kernel: Tensor
    error: float


def approximate_convolution(kernel: Tensor, num_heads: int, input_scale: Optional[Tensor] = None,
                            output_scale: Optional[Tensor] = None,
                            correlation: float = 0.) -> Approximation:
    """Find the projections, fc and shift kernels that are closest to a convolution.

    In ACmix (arXiv 2111.14556, section 4.1) the num_heads output channels of each head dimension d
    read the same 3 · num_heads maps, which the fc mixes into k² maps. For any fc, the kernels of d,
    as a matrix with num_heads · k² rows (output head, tap) and in_channels columns, have a rank of
    at most r = min(k², 3 · num_heads), and every matrix of that rank can be represented. The best
    approximation, in the least squares of the outputs, is the truncated singular value
    decomposition. It is exact if in_channels ≤ r; otherwise the error depends on the kernel.

    Args:
        kernel: (out_channels, in_channels, k, k), floating point; num_heads divides out_channels.
        num_heads: attention heads of the ACmix layer.
        input_scale: (in_channels,), standard deviation of each input channel; ones if None.
        output_scale: (out_channels,), weight of the error of each output channel; ones if None.
        correlation: correlation of neighbouring positions of an input channel, which decays by this
            factor with each step along either axis.

    Returns:
        The approximation, in the dtype of the kernel.
    """
    out_channels, in_channels, kernel_size = kernel.shape[:3]
    taps, num_maps = kernel_size**2, 3 * num_heads
    columns = torch.ones(in_channels) if input_scale is None else input_scale
    rows = torch.ones(out_channels) if output_scale is None else output_scale
    columns = columns.double()
    # Output channels are ordered (head_dims, num_heads).
    rows = rows.double().repeat_interleave(taps).view(-1, num_heads * taps, 1)
    matrices = kernel.double().flatten(2).transpose(1, 2).reshape(*rows.shape[:2], in_channels)
    # Times this factor, the squared norm of a kernel is the variance of its output.
    step = torch.arange(kernel_size, dtype=torch.double)
    axis_correlation = correlation ** (step[:, None] - step).abs()
    factor = torch.linalg.cholesky(torch.kron(axis_correlation, axis_correlation)).T
    factor = torch.block_diag(*[factor] * num_heads)
    weighted = factor @ (rows * matrices * columns)
    rank = min(taps, num_maps, *weighted.shape[1:])
    # The left singular vectors, from the small Gram matrices.
    energies, vectors = torch.linalg.eigh(weighted @ weighted.transpose(1, 2))
    vectors = vectors[..., -rank:]
    # The outputs of the projections have unit variance; the shift kernels hold the singular values.
    tiny = torch.finfo(torch.double).tiny
    singular_values = energies[:, -rank:, None].clamp(min=tiny).sqrt()
    right = vectors.transpose(1, 2) @ weighted / singular_values / columns
    left = torch.linalg.solve_triangular(factor, vectors, upper=True)
    left = left * singular_values.transpose(1, 2) / rows

    # An orthonormal basis in which each map has a part, so that no query or key is zero.
    basis = cosine_basis(num_maps)[:rank]
    projections = torch.einsum('jm,dji->mdi', basis, right).reshape(3, out_channels, in_channels)
    # Shift kernels beyond the rank are zero; their rows of fc are not, so they get gradients.
    fc = basis[torch.arange(taps) % rank]
    shifts = torch.zeros(out_channels, taps, taps, dtype=torch.double)
    shifts[:, :rank] = left.unflatten(1, (num_heads, taps)).flatten(0, 1).transpose(1, 2)

    approximate = (left @ right).unflatten(1, (num_heads, taps)).transpose(2, 3).flatten(0, 1)
    lost = energies[:, :-rank].clamp(min=0).sum() / energies.sum().clamp(min=tiny)
    parameters = {f'conv{index}.weight': projection[..., None, None]
                  for index, projection in enumerate(projections, start=1)}
    parameters['fc.weight'] = fc[..., None, None]
    parameters['dep_conv.weight'] = shifts.unflatten(2, (kernel_size, kernel_size))
    return Approximation({name: value.to(kernel.dtype) for name, value in parameters.items()},
                         approximate.view_as(kernel).to(kernel.dtype), lost.sqrt().item())


def replace_convolution(state_dict: dict[str, Tensor], block: str, norms: Sequence[str],
                        num_heads: int, rates: Sequence[str]) -> float:
    """Replace the convolution ``conv2`` of a ResNet block by the closest convolution path of ACmix.

    The norm before the convolution determines how much its inputs vary, and the norm after it how
    much its outputs matter. The running mean of that norm absorbs the change in the mean of the
    outputs. A kernel that does not fit the channels of these norms stays, and is reported when the
    weights are loaded.

    Args:
        state_dict: weights of a plain ResNet under the keys of ``ACmixResNet``; changed in place.
        block: name of the block.
        norms: names of its norms.
        num_heads: attention heads of the ACmix layer.
        rates: the rates in ``RATES`` that the layer has; they turn attention off.

    Returns:
        The expected error, see :class:`Approximation`; nan if the kernel stays.
    """
    conv = f'{block}.conv2'
    before, after = f'{block}.{norms[0]}', f'{block}.{norms[1]}'
    kernel = state_dict.get(f'{conv}.weight')
    gain_before, gain_after = (state_dict.get(f'{norm}.weight') for norm in (before, after))
    if (kernel is None or gain_before is None or gain_after is None
            or kernel.shape[:2] != (len(gain_after), len(gain_before))
            or len(kernel) % num_heads):
        return math.nan
    mean, input_scale = relu_statistics(gain_before, state_dict[f'{before}.bias'])
    output_scale = gain_after.abs()
    if f'{after}.running_var' in state_dict:
        output_scale = output_scale / (state_dict[f'{after}.running_var'] + 1e-5).sqrt()
    approximation = approximate_convolution(kernel, num_heads, with_floor(input_scale),
                                            with_floor(output_scale), NEIGHBOUR_CORRELATION)

    del state_dict[f'{conv}.weight']
    state_dict.update({f'{conv}.{name}': value
                       for name, value in approximation.parameters.items()})
    for projection in ('conv1', 'conv2', 'conv3'):
        state_dict[f'{conv}.{projection}.bias'] = kernel.new_zeros(len(kernel))
    state_dict.update({f'{conv}.{name}': kernel.new_full((1,), RATES[name]) for name in rates})
    if f'{after}.running_mean' in state_dict:
        change = (approximation.kernel - kernel).sum((2, 3)) @ mean
        state_dict[f'{after}.running_mean'] = state_dict[f'{after}.running_mean'] + change
    return approximation.error


def relu_statistics(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel after a norm with these parameters and a ReLU.

    The output of the norm is assumed to be normally distributed.
    """
    deviation = weight.abs().clamp(min=1e-6)
    ratio = bias / deviation
    positive = torch.special.ndtr(ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    mean = bias * positive + deviation * density
    square = (bias.square() + deviation.square()) * positive + bias * deviation * density
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def with_floor(scale: Tensor) -> Tensor:
    """Raise the scale of nearly constant channels, so that all channels have a weight."""
    return scale.clamp(min=1e-3 * scale.max().item())


def cosine_basis(size: int) -> Tensor:
    """The orthonormal cosine basis, (size, size), one vector per row, in double precision."""
    position = torch.arange(size, dtype=torch.double)
    basis = torch.cos(math.pi / size * (position + 0.5) * position[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis
