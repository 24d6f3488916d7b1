"""The convolution path of ACmix: a light fully connected layer, then shift and sum.

Paper: arXiv 2111.14556, section 4.1 (stage II of the convolution path) and section 4.2, where
the fixed shifts become a grouped convolution whose kernels start as shifts and are learned.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from .forms import named_form


def shift_conv(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
               fc_bias: Optional[Tensor] = None, *, stride: int = 1, dilation: int = 1,
               form: Optional[str] = None) -> Tensor:
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
        form: ``'reference'``, ``'two_step'`` or ``'folded'``; the cheaper of the last two if
            None.

    Returns:
        (batch, head_dims · num_heads, ⌈height / stride⌉, ⌈width / stride⌉), in the dtype of
        ``maps``. Positions outside the map count as zero after the bias.

    Raises:
        ValueError: the shapes do not fit together, or there is no such form.
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
    run = named_form('shift_conv', FORMS, form, default)
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


def shift_conv_two_step(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                        fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Mix by a matrix product at every pixel, then run one grouped convolution, channels last."""
    mixed = torch.matmul(fc_weight, maps.permute(0, 3, 4, 1, 2))
    if fc_bias is not None:
        mixed = mixed + fc_bias[:, None].to(mixed.dtype)
    return _GroupedConv.apply(mixed.transpose(3, 4), shift_weight.to(mixed.dtype), stride, dilation)


def shift_conv_folded(maps: Tensor, fc_weight: Tensor, shift_weight: Tensor,
                      fc_bias: Optional[Tensor], stride: int, dilation: int) -> Tensor:
    """Fold the two linear steps into one grouped convolution from all the maps."""
    kernels = torch.einsum('cjyx,jm->cmyx', shift_weight, fc_weight)
    out = _GroupedConv.apply(maps.permute(0, 3, 4, 2, 1), kernels, stride, dilation)
    if fc_bias is not None:
        out = out + _bias_map(fc_bias, shift_weight, maps.shape[-2:], stride, dilation)
    return out


class _GroupedConv(torch.autograd.Function):
    """Convolve (batch, height, width, groups, channels) group by group, padded with zeros.

    Channels last is what oneDNN's grouped convolution is fast in: it takes twice its time
    otherwise. The copy in that layout is made again in the backward pass, not kept: what comes in
    is a view of the projections, which are kept anyway.
    """

    @staticmethod
    def forward(ctx: Any, groups: Tensor, kernels: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(groups, kernels)
        ctx.geometry = dict(stride=stride, padding=dilation * (kernels.shape[-1] // 2),
                            dilation=dilation, groups=groups.shape[3])
        return F.conv2d(as_images(groups), kernels, **ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        groups, kernels = ctx.saved_tensors
        images = as_images(groups)
        grad_groups = grad_kernels = None
        if ctx.needs_input_grad[0]:
            grad_images = conv2d_input(images.shape, kernels, grad_out, **ctx.geometry)
            grad_groups = grad_images.permute(0, 2, 3, 1).reshape(groups.shape)
        if ctx.needs_input_grad[1]:
            grad_kernels = conv2d_weight(images, kernels.shape, grad_out, **ctx.geometry)
        return grad_groups, grad_kernels, None, None


def as_images(groups: Tensor) -> Tensor:
    """(batch, height, width, groups, channels) as (batch, channels, height, width)."""
    return groups.flatten(3).permute(0, 3, 1, 2)


def _bias_map(fc_bias: Tensor, shift_weight: Tensor, size: tuple[int, int], stride: int,
              dilation: int) -> Tensor:
    """What the fc bias adds to the output, (channels, height, width).

    The bias is convolved too, and the border, where some taps fall outside, gets less of it. All
    inner positions are alike: a small map has one of each kind, as wide a border as the large one.
    """
    taps = torch.einsum('cjyx,j->cyx', shift_weight, fc_bias)[:, None]
    reach = dilation * (shift_weight.shape[-1] // 2)
    ones = taps.new_ones(1, 1, *(min(extent, 2 * reach + 1) for extent in size))
    kinds = F.conv2d(ones, taps, padding=reach, dilation=dilation)[0]
    rows, columns = (_kind_of_position(extent, reach, stride, taps.device) for extent in size)
    return kinds[:, rows][:, :, columns]


def _kind_of_position(extent: int, reach: int, stride: int, device: torch.device) -> Tensor:
    """Where in an axis shortened to 2 · reach + 1 each stride-th of ``extent`` positions is."""
    positions = torch.arange(0, extent, stride, device=device)
    from_end = positions - extent + min(extent, 2 * reach + 1)
    return torch.maximum(torch.minimum(positions, torch.full_like(positions, reach)), from_end)


FORMS = {
    'reference': shift_conv_reference,
    'two_step': shift_conv_two_step,
    'folded': shift_conv_folded,
}
