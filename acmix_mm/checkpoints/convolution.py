"""A plain convolution, expressed by the convolution path of ACmix as nearly as that can."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

import torch
from torch import Tensor

# Of attention and of the convolution path, where the latter is to be alone.
RATES = {'rate1': 0., 'rate2': 1.}


class Expression(NamedTuple):
    """Parameters of an ``ACmixConv2d`` whose convolution path stands in for a convolution.

    Attributes:
        parameters: ``conv1.weight``, ``conv2.weight``, ``conv3.weight``, ``fc.weight`` and
            ``dep_conv.weight``. The rate of the path is one, biases are zero.
        kernel: the kernel that they make together, (out_channels, in_channels, k, k).
        error: standard deviation of the outputs' error, relative to that of the outputs, for inputs
            that vary as :func:`express_convolution` was told; 0 is exact.
    """

    parameters: dict[str, Tensor]
    kernel: Tensor
    error: float


# How much neighbouring positions of ResNet maps have in common. No checkpoint tells; measured in a
# small trained one, 0.2 (last stage) to 0.8 (first), and 0.5 lost a fifth to a third less than 0.
NEIGHBOUR_CORRELATION = 0.5


def express_convolution(kernel: Tensor, num_heads: int, input_scale: Optional[Tensor] = None,
                        output_scale: Optional[Tensor] = None,
                        correlation: float = 0.) -> Expression:
    """Find the projections, fc and shift kernels that come closest to a convolution.

    In ACmix (arXiv 2111.14556, section 4.1) the num_heads output channels of one channel position
    d all read the 3 · num_heads maps of d, mixed into k². Whatever the fc, their kernels, as a
    matrix of num_heads · k² rows (output head, tap) and in_channels columns, thus have a rank of at
    most r = min(k², 3 · num_heads), and every matrix of that rank can be had. The nearest one, in
    the least squares of the outputs, is the truncated singular value decomposition: exact where
    in_channels ≤ r, and else a loss that depends on the kernel.

    Args:
        kernel: (out_channels, in_channels, k, k), floating; num_heads divides out_channels.
        num_heads: attention heads of the ACmix layer.
        input_scale: (in_channels,), standard deviation of each input channel; all one if None.
        output_scale: (out_channels,), what an error of each output channel counts; all one if None.
        correlation: of neighbouring positions of an input channel, falling off by this factor with
            every step along either axis.

    Returns:
        The expression, in the kernel's dtype.
    """
    out_channels, in_channels, kernel_size = kernel.shape[:3]
    taps, num_maps = kernel_size**2, 3 * num_heads
    columns = torch.ones(in_channels) if input_scale is None else input_scale
    rows = torch.ones(out_channels) if output_scale is None else output_scale
    columns = columns.double()
    # Output channels go (head_dims, num_heads).
    rows = rows.double().repeat_interleave(taps).view(-1, num_heads * taps, 1)
    matrices = kernel.double().flatten(2).transpose(1, 2).reshape(*rows.shape[:2], in_channels)
    # Of correlated taps, the transform in which they vary independently; every output head has it.
    step = torch.arange(kernel_size, dtype=torch.double)
    along_axis = correlation ** (step[:, None] - step).abs()
    across = torch.linalg.cholesky(torch.kron(along_axis, along_axis)).T
    across = torch.block_diag(*[across] * num_heads)
    weighted = across @ (rows * matrices * columns)
    rank = min(taps, num_maps, *weighted.shape[1:])
    # The left singular vectors, from the small Gram matrices.
    energies, vectors = torch.linalg.eigh(weighted @ weighted.transpose(1, 2))
    vectors = vectors[..., -rank:]
    # The projections get outputs of unit variance, and the shift kernels the rest.
    tiny = torch.finfo(torch.double).tiny
    sizes = energies[:, -rank:, None].clamp(min=tiny).sqrt()
    right = vectors.transpose(1, 2) @ weighted / sizes / columns
    left = torch.linalg.solve_triangular(across, vectors, upper=True)
    left = left * sizes.transpose(1, 2) / rows

    # An orthonormal basis in which every map takes part: queries and keys are of use to attention.
    basis = cosine_basis(num_maps)[:rank]
    projections = torch.einsum('jm,dji->mdi', basis, right).reshape(3, out_channels, in_channels)
    # Shifts beyond the rank start idle, but their mix does not: so they can learn.
    fc = basis[torch.arange(taps) % rank]
    shifts = torch.zeros(out_channels, taps, taps, dtype=torch.double)
    shifts[:, :rank] = left.unflatten(1, (num_heads, taps)).flatten(0, 1).transpose(1, 2)

    made = (left @ right).unflatten(1, (num_heads, taps)).transpose(2, 3).flatten(0, 1)
    left_out = energies[:, :-rank].clamp(min=0).sum() / energies.sum().clamp(min=tiny)
    parameters = {f'conv{index}.weight': projection[..., None, None]
                  for index, projection in enumerate(projections, start=1)}
    parameters['fc.weight'] = fc[..., None, None]
    parameters['dep_conv.weight'] = shifts.unflatten(2, (kernel_size, kernel_size))
    return Expression({name: value.to(kernel.dtype) for name, value in parameters.items()},
                      made.view_as(kernel).to(kernel.dtype), left_out.sqrt().item())


def replace_convolution(state_dict: dict[str, Tensor], block: str, norms: Sequence[str],
                        num_heads: int, rates: Sequence[str]) -> float:
    """Put the nearest ACmix in the place of the 3×3 convolution of a ResNet's bottleneck.

    How much the inputs of the convolution vary follows from the norm before it, and how much its
    outputs count from the norm behind it. What the change adds to the outputs' means goes into the
    running mean of that norm. A kernel that has not the channels of those norms stays, for the
    account of what does not fit.

    Args:
        state_dict: of a plain ResNet, in ``ACmixResNet``'s naming; changed in place.
        block: name of the bottleneck.
        norms: names of its norms.
        num_heads: attention heads of the ACmix layer.
        rates: which of ``RATES`` the layer has; they leave attention out.

    Returns:
        The error, as :class:`Expression` has it; nan if the kernel stays.
    """
    conv = f'{block}.conv2'
    before, behind = f'{block}.{norms[0]}', f'{block}.{norms[1]}'
    kernel = state_dict.get(f'{conv}.weight')
    gains = [state_dict.get(f'{norm}.weight') for norm in (behind, before)]
    if kernel is None or any(gain is None for gain in gains) or kernel.shape[:2] != tuple(
            map(len, gains)) or len(kernel) % num_heads:
        return math.nan
    mean, input_scale = after_relu(gains[1], state_dict[f'{before}.bias'])
    output_scale = gains[0].abs()
    if f'{behind}.running_var' in state_dict:
        output_scale = output_scale / (state_dict[f'{behind}.running_var'] + 1e-5).sqrt()
    expression = express_convolution(kernel, num_heads, floored(input_scale),
                                     floored(output_scale), NEIGHBOUR_CORRELATION)

    del state_dict[f'{conv}.weight']
    state_dict.update({f'{conv}.{name}': value for name, value in expression.parameters.items()})
    for projection in ('conv1', 'conv2', 'conv3'):
        state_dict[f'{conv}.{projection}.bias'] = kernel.new_zeros(len(kernel))
    state_dict.update({f'{conv}.{name}': kernel.new_full((1,), RATES[name]) for name in rates})
    if f'{behind}.running_mean' in state_dict:
        added = (expression.kernel - kernel).sum((2, 3)) @ mean
        state_dict[f'{behind}.running_mean'] = state_dict[f'{behind}.running_mean'] + added
    return expression.error


def after_relu(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel behind a norm with these parameters and a ReLU.

    Those of a rectified normal distribution, for which the norm's output is taken.
    """
    deviation = weight.abs().clamp(min=1e-6)
    ratio = bias / deviation
    above = torch.special.ndtr(ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    mean = bias * above + deviation * density
    square = (bias.square() + deviation.square()) * above + bias * deviation * density
    return mean, (square - mean.square()).clamp(min=0).sqrt()


def floored(scale: Tensor) -> Tensor:
    """Keep channels that are as good as constant from counting nothing at all."""
    return scale.clamp(min=1e-3 * scale.max().item())


def cosine_basis(size: int) -> Tensor:
    """The orthonormal cosine basis, (size, size), one vector a row, double."""
    position = torch.arange(size, dtype=torch.double)
    basis = torch.cos(math.pi / size * (position + 0.5) * position[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis
