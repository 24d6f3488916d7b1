"""The convolution path of ACmix: a light fully connected layer, then shift and sum.

Paper: arXiv 2111.14556, section 4.1 (stage II of the convolution path) and section 4.2, where
the fixed shifts become a grouped convolution whose kernels start as shifts and are learned.
"""

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    require_triton,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.custom_op import custom_op


def shift_conv(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
               fc_bias: Optional[Tensor] = None, *, stride: int = 1, dilation: int = 1,
               backend: Optional[str] = None) -> Tensor:
    """Mix the maps of all heads into k² maps, shift each, and sum them for every output head.

    Args:
        maps: queries, keys and values as maps of head_dims channels, (batch, num_maps, head_dims,
            height, width), any floating dtype and strides. There are 3 · num_heads of them where
            all three have as many channels as the output.
        fc_weight: (k², num_maps), shared by all head_dims channels.
        shift_weight: (head_dims · num_heads, k², k, k), k odd; output channels go (head_dims,
            num_heads), as grouped convolution lays them out.
        fc_bias: (k²,), or None.
        stride: distance of the positions that give an output; the others are left out.
        dilation: distance of one tap of the kernel from the next.
        backend: ``'reference'``, ``'two_step'``, ``'folded'``, ``'conv2d'`` or ``'triton'``; if
            None the last on a GPU that can run it, ``'conv2d'`` in an export, else the cheaper of
            ``'two_step'`` and ``'folded'``.

    Returns:
        (batch, head_dims · num_heads, ⌈height / stride⌉, ⌈width / stride⌉), in the dtype of
        ``maps``. Positions outside the map count as zero after the bias.

    Raises:
        ValueError: the shapes do not fit together, or there is no such backend.
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
    if kernel_size % 2 == 0:
        raise ValueError(f'shift_conv takes odd kernels, got one of {kernel_size}.')
    if fc_weight.shape != (num_shifts, num_maps):
        raise ValueError(f'{num_maps} maps and {num_shifts} shifts need an fc_weight of shape '
                         f'{(num_shifts, num_maps)}, got {tuple(fc_weight.shape)}.')
    # Per pixel and channel, for k = 3 and three maps to a head, the two steps cost 27 + 81
    # multiplications and the folded form 27 · num_heads. They meet at four heads; the folded form
    # moves less data, and on a CPU is the faster one up to six.
    default = 'folded' if num_heads <= 6 else 'two_step'
    if maps.is_cuda and runs_triton(maps):
        default = 'triton'
    run = select_backend('shift_conv', backend, maps.device, automatic=default,
                         exporting='conv2d')
    return run(maps, fc_weight, shift_weight, fc_bias, stride, dilation)


def shift_conv_reference(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                         fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Follow the paper's equations one shift at a time; see :func:`shift_conv`.

    Every tap of the kernels moves the mixed maps by its own offset and weighs them; the sum
    over the taps is the output.
    """
    height, width = maps.shape[-2:]
    head_dims, kernel_size = maps.shape[2], shift_weight.shape[-1]
    mixed = torch.einsum('jm,bmdhw->bdjhw', fc_weight, maps)
    if fc_bias is not None:
        mixed = mixed + fc_bias[:, None, None]
    reach = dilation * (kernel_size // 2)
    padded = F.pad(mixed, (reach, reach, reach, reach))
    kernels = shift_weight.unflatten(0, (head_dims, -1))
    out = 0
    for row in range(kernel_size):
        for column in range(kernel_size):
            down, across = dilation * row, dilation * column
            shifted = padded[..., down:down + height:stride, across:across + width:stride]
            out = out + torch.einsum('dnj,bdjhw->bdnhw', kernels[..., row, column], shifted)
    return out.flatten(1, 2)


def shift_sum(maps: Tensor, fc_weight: Tensor, fc_bias: Optional[Tensor] = None, *,
              stride: int = 1, dilation: int = 1) -> Tensor:
    """Mix the maps of all heads into k² maps, move each, and sum them.

    This is the paper's shift by tensor operations (section 4.2): what :func:`shift_conv` computes
    for every output head where its kernels are pure shifts.

    Args:
        maps: (batch, num_maps, head_dims, height, width).
        fc_weight: (k², num_maps), k odd.
        fc_bias: (k²,), or None.
        stride: distance of the positions that give an output.
        dilation: length of a shift by one.

    Returns:
        (batch, head_dims, ⌈height / stride⌉, ⌈width / stride⌉).
    """
    height, width = maps.shape[-2:]
    kernel_size = math.isqrt(len(fc_weight))
    reach = dilation * (kernel_size // 2)
    mixed = torch.einsum('jm,bmdhw->bjdhw', fc_weight, maps)
    if fc_bias is not None:
        mixed = mixed + fc_bias.to(mixed.dtype)[:, None, None, None]
    padded = F.pad(mixed, (reach, reach, reach, reach))
    return sum(padded[:, row * kernel_size + column, :,
                      dilation * row:dilation * row + height:stride,
                      dilation * column:dilation * column + width:stride]
               for row in range(kernel_size) for column in range(kernel_size))


def shift_conv_two_step(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                        fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Mix by one matrix product, then run one grouped convolution, channels last."""
    mixed = F.linear(maps.permute(0, 3, 4, 2, 1), fc_weight)
    bias = convolved_bias(fc_bias, shift_weight, maps.shape[-2:], dilation)
    return _GroupedConv.apply(mixed, shift_weight.to(mixed.dtype), bias, stride, dilation)


def shift_conv_folded(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                      fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Fold the two linear steps into one grouped convolution from all the maps."""
    kernels = folded_kernels(fc_weight, shift_weight)
    bias = convolved_bias(fc_bias, shift_weight, maps.shape[-2:], dilation)
    return _GroupedConv.apply(maps.permute(0, 3, 4, 2, 1), kernels, bias, stride, dilation)


def shift_conv_plain(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                     fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Do as the folded form does, in torch's own convolutions."""
    geometry = dict(stride=stride, dilation=dilation,
                    padding=dilation * (shift_weight.shape[-1] // 2))
    kernels = folded_kernels(fc_weight, shift_weight).to(maps.dtype)
    out = F.conv2d(maps.transpose(1, 2).flatten(1, 2), kernels, groups=maps.shape[2], **geometry)
    if fc_bias is None:
        return out
    ones = maps.new_ones(1, 1, *maps.shape[-2:])
    return out + F.conv2d(ones, bias_taps(fc_bias, shift_weight).to(maps.dtype), **geometry)


def shift_conv_triton(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                      fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Do as the folded form does, or as the two-step one, in kernels for NVIDIA GPUs."""
    require_triton('shift_conv', maps)
    groups = maps.permute(0, 3, 4, 2, 1)
    if shift_weight.shape[0] <= 4 * maps.shape[2]:
        # The kernels multiply four heads at once; up to there, folding costs less.
        kernels = folded_kernels(fc_weight, shift_weight)
    else:
        mixing = fc_weight.repeat(maps.shape[2], 1)[:, :, None, None]
        groups = _TritonGroupedConv.apply(groups, mixing, None, 1, 1, True)
        kernels = shift_weight
    bias = convolved_bias(fc_bias, shift_weight, maps.shape[-2:], dilation)
    out = _TritonGroupedConv.apply(groups, kernels, bias, stride, dilation, False)
    return out.flatten(3).permute(0, 3, 1, 2)


def folded_kernels(fc_weight: Tensor, shift_weight: Tensor) -> Tensor:
    """The product of the two linear steps, (head_dims · num_heads, num_maps, k, k)."""
    return torch.einsum('cjyx,jm->cmyx', shift_weight, fc_weight)


class _GroupedConv(torch.autograd.Function):
    """Convolve (batch, height, width, groups, channels) group by group, padded with zeros.

    Channels last is what oneDNN's grouped convolution is fast in: it takes twice its time
    otherwise. The copy in that layout is made again in the backward pass, not kept: what comes in
    is a view of the projections, which are kept anyway.

    ``bias`` is what :func:`convolved_bias` returns.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                dilation: int) -> Tensor:
        ctx.save_for_backward(groups, kernels)
        ctx.geometry = dict(stride=stride, padding=dilation * (kernels.shape[-1] // 2),
                            dilation=dilation, groups=groups.shape[3])
        ctx.border = None
        if bias is None:
            return F.conv2d(as_images(groups), kernels, **ctx.geometry)
        ctx.border = Border(bias.shape, groups.shape[1:3], stride)
        inner, rest = ctx.border.split(bias)
        return ctx.border.add(F.conv2d(as_images(groups), kernels, inner, **ctx.geometry), rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        groups, kernels = ctx.saved_tensors
        images = as_images(groups)
        stride, padding, dilation = (2 * [ctx.geometry[key]]
                                     for key in ('stride', 'padding', 'dilation'))
        grad_images, grad_kernels, grad_bias = torch.ops.aten.convolution_backward(
            grad_out, images, kernels, [kernels.shape[0]], stride, padding, dilation, False, [0, 0],
            ctx.geometry['groups'], ctx.needs_input_grad[:3])
        if grad_images is not None:
            grad_images = grad_images.permute(0, 2, 3, 1).reshape(groups.shape)
        if grad_bias is not None:
            grad_bias = ctx.border.gradient(grad_out, grad_bias)
        return grad_images, grad_kernels, grad_bias, None, None


class _TritonGroupedConv(torch.autograd.Function):
    """The same in kernels that take the projections as they lie in memory.

    The output is (batch, out height, out width, groups, channels). The last argument says whether
    its groups are to be neighbours in memory, as the next convolution wants them.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                dilation: int, groups_last: bool) -> Tensor:
        ctx.save_for_backward(groups, kernels)
        ctx.geometry = stride, dilation
        if bias is not None:
            ctx.border = Border(bias.shape, groups.shape[1:3], stride)
        return convolve_triton(groups, kernels, bias, stride, dilation, groups_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grads = convolve_triton_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            images = as_images(grad_out)
            grad_bias = ctx.border.gradient(images, images.sum((0, 2, 3)))
        return *grads, grad_bias, None, None, None


def _empty_convolved(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                     dilation: int, groups_last: bool) -> Tensor:
    batch, height, width = groups[:, ::stride, ::stride].shape[:3]
    num_groups, channels = groups.shape[3], kernels.shape[0] // groups.shape[3]
    if groups_last:
        return groups.new_empty(batch, height, width, channels, num_groups).transpose(3, 4)
    return groups.new_empty(batch, height, width, num_groups, channels)


def _empty_gradients(grad_out: Tensor, groups: Tensor, kernels: Tensor,
                     *geometry: Any) -> tuple[Tensor, Tensor]:
    """The gradient of the groups in the strides that the projections' has."""
    as_projected = groups.transpose(3, 4)
    return (as_projected.new_empty(as_projected.shape).transpose(3, 4),
            kernels.new_empty(kernels.shape))


@custom_op(_empty_convolved)
def convolve_triton(groups: Tensor, kernels: Tensor, bias: Optional[Tensor], stride: int,
                    dilation: int, groups_last: bool) -> Tensor:
    from acmix_mm.ops.shift_conv.triton_kernels import convolve
    out = _empty_convolved(groups, kernels, bias, stride, dilation, groups_last)
    with torch.cuda.device_of(groups):
        convolve(groups, kernels, bias, out, stride, dilation)
    return out


@custom_op(_empty_gradients)
def convolve_triton_backward(grad_out: Tensor, groups: Tensor, kernels: Tensor, stride: int,
                             dilation: int) -> tuple[Tensor, Tensor]:
    from acmix_mm.ops.shift_conv.triton_kernels import (
        convolve_kernels_backward,
        convolve_maps_backward,
    )
    grad_groups, grad_kernels = _empty_gradients(grad_out, groups, kernels)
    with torch.cuda.device_of(groups):
        convolve_maps_backward(grad_out, kernels, grad_groups, stride, dilation)
        grad_kernels.copy_(convolve_kernels_backward(grad_out, groups, kernels.shape[-1], stride,
                                                     dilation))
    return grad_groups, grad_kernels


def as_images(groups: Tensor) -> Tensor:
    """(batch, height, width, groups, channels) as (batch, channels, height, width)."""
    return groups.flatten(3).permute(0, 3, 1, 2)


def convolved_bias(fc_bias: Optional[Tensor], shift_weight: Tensor, size: tuple[int, int],
                   dilation: int) -> Optional[Tensor]:
    """What comes of the fc bias in the output, (channels, kinds of row, kinds of column).

    The bias is convolved too, and the border, where some taps fall outside, gets less of it. All
    inner positions are alike: a small map, no wider than the kernel, has one of each kind.
    """
    if fc_bias is None:
        return None
    taps = bias_taps(fc_bias, shift_weight)
    reach = dilation * (shift_weight.shape[-1] // 2)
    ones = taps.new_ones(1, 1, *(min(extent, 2 * reach + 1) for extent in size))
    return F.conv2d(ones, taps, padding=reach, dilation=dilation)[0]


def bias_taps(fc_bias: Tensor, shift_weight: Tensor) -> Tensor:
    """What each tap of the kernels makes of the fc bias, (channels, 1, k, k)."""
    return torch.einsum('cjyx,j->cyx', shift_weight, fc_bias)[:, None]


class Border:
    """Where on a map the convolved bias differs from what it is inside.

    Args:
        shape: (channels, kinds of row, kinds of column), of :func:`convolved_bias`.
        size: (height, width) of the map.
        stride: distance of the positions that give an output.
    """

    def __init__(self, shape: Sequence[int], size: Sequence[int], stride: int) -> None:
        self.shape = shape
        self.row, self.column = (kinds // 2 for kinds in shape[1:])
        rows, columns = (runs_of_kinds(extent, kinds, stride)
                         for extent, kinds in zip(size, shape[1:]))
        self.strips = [(row, column, rows[row], columns[column]) for row in rows
                       for column in columns if (row, column) != (self.row, self.column)]

    def split(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The bias inside, (channels,), and by how much that of each kind differs."""
        inner = bias[:, self.row, self.column]
        return inner, bias - inner[:, None, None]

    def add(self, images: Tensor, bias: Tensor) -> Tensor:
        """Add to the border of (batch, channels, height, width), in place, what is due to it."""
        for row, column, rows, columns in self.strips:
            images[:, :, rows, columns] += bias[:, row, column, None, None].to(images.dtype)
        return images

    def gradient(self, grad_images: Tensor, total: Tensor) -> Tensor:
        """The gradient of the bias, from the images' and its sum over all positions."""
        grad_bias = total.new_zeros(self.shape)
        for row, column, rows, columns in self.strips:
            grad_bias[:, row, column] = grad_images[:, :, rows, columns].sum((0, 2, 3))
        grad_bias[:, self.row, self.column] = total - grad_bias.sum((1, 2))
        return grad_bias


def runs_of_kinds(extent: int, kinds: int, stride: int) -> dict[int, slice]:
    """The outputs along an axis that are of each kind; the middle kind is all but the border."""
    middle = kinds // 2
    from_end = extent - kinds
    runs = {}
    for kind in range(kinds):
        first, last = (kind + from_end * (kind > middle), kind + from_end * (kind >= middle))
        start, stop = -(-first // stride), last // stride + 1
        if start < stop:
            runs[kind] = slice(start, stop)
    return runs


register_backends('shift_conv', Backend('reference', shift_conv_reference),
                  Backend('two_step', shift_conv_two_step), Backend('folded', shift_conv_folded),
                  Backend('conv2d', shift_conv_plain),
                  Backend('triton', shift_conv_triton, triton_unavailable))
