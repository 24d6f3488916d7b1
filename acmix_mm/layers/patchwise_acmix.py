"""ACmix in a SAN host: patch-wise attention and the convolution path on the same q, k, v."""

from typing import Callable, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from acmix_mm.layers.base import FullyConnected, Shifts, TwoPaths, scaled
from acmix_mm.ops import patch_aggregation, patch_features
from acmix_mm.ops.reflection import reflection_pad

# Output channels that share one attention weight, in all published SANs.
SHARE_CHANNELS = 8


class PatchwiseACmix(TwoPaths):
    """Mix patch-wise attention with a 3×3 convolution over the same projections.

    Papers: arXiv 2111.14556, section 4.1, and arXiv 2004.13621, section 3.2 (patch-wise
    self-attention, concatenation); out = rate1 · attention + rate2 · convolution. The weights of
    attention are made of the query and all keys around it: norm, ReLU, linear, norm, ReLU, linear,
    without softmax. Queries and keys have fewer channels than values: cut into pieces as wide as
    the queries, all three are 2 + value_heads maps for the fc, with value_heads = out_channels /
    rel_channels, and value_heads output heads. As in the other hosts, the convolution path's
    channels go (channel, head), attention's (head, channel), and they are added as they are.

    The authors of ACmix published no code for SAN. This form is this project's choice;
    :class:`acmix_mm.backbones.ACmixSAN` says how its counts compare with the published ones. That
    the fc has no bias is taken from their ResNet.

    Parameters of the attention path have the SAN authors' names: ``conv1``, ``conv2``, ``conv3``
    (q, k, v), ``conv_w``; those of the convolution path the ACmix authors': ``fc``, ``dep_conv``,
    ``rate1``, ``rate2``.

    Args:
        in_channels: channels of the input.
        rel_channels: channels of queries and of keys; divides ``out_channels``.
        out_channels: channels of values and of the output, a multiple of ``SHARE_CHANNELS``.
        kernel_size: side of attention's neighbourhood, odd; it is mirrored at the edges.
        norm: makes the batch norms on the way to the weights from their channels.
        mix: ``'acmix'`` for both paths; ``'attn'`` or ``'conv'`` builds that path alone, and no
            rates.
        combine: how the paths are added; see :class:`acmix_mm.layers.base.TwoPaths`.
        shift: how the convolution path shifts; see :class:`acmix_mm.layers.base.Shifts`.
        shift_groups: groups of its kernels: one for every head (None), or 1.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, in_channels: int, rel_channels: int, out_channels: int, kernel_size: int,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d, mix: str = 'acmix',
                 combine: str = 'rates', shift: str = 'learned',
                 shift_groups: Optional[int] = None) -> None:
        super().__init__()
        self.set_paths(mix, combine)
        if out_channels % rel_channels or out_channels % SHARE_CHANNELS:
            raise ValueError(f'rel_channels and {SHARE_CHANNELS} must divide out_channels, got '
                             f'{rel_channels} for {out_channels} channels.')
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}.')
        self.rel_channels = rel_channels
        self.kernel_size = kernel_size

        self.conv1 = nn.Conv2d(in_channels, rel_channels, 1)
        self.conv2 = nn.Conv2d(in_channels, rel_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1)
        if mix != 'conv':
            around = rel_channels * (kernel_size**2 + 1)
            groups = out_channels // SHARE_CHANNELS
            self.conv_w = nn.Sequential(
                norm(around), nn.ReLU(inplace=True), nn.Conv2d(around, groups, 1, bias=False),
                norm(groups), nn.ReLU(inplace=True), nn.Conv2d(groups, groups * kernel_size**2, 1))
            if not isinstance(self.conv_w[0], _BatchNorm):
                raise ValueError('The keys around a position take a batch norm, got '
                                 f'{type(self.conv_w[0]).__name__}.')
        if mix != 'attn':
            value_heads = out_channels // rel_channels
            self.fc = FullyConnected(2 + value_heads, kernel_size=3, bias=False)
            self.dep_conv = Shifts(rel_channels, value_heads, 3, shift, shift_groups)
        self.add_rates()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to out_channels, at any size from 1×1."""
        projections = (self.conv1, self.conv2, self.conv3)
        qkv = F.conv2d(x, torch.cat([conv.weight for conv in projections]),
                       torch.cat([conv.bias for conv in projections]))
        if self.mix != 'conv':
            out = attention = self.attend(qkv)
        if self.mix != 'attn':
            out = convolution = self.convolve(qkv)
        if self.mix == 'acmix':
            out = attention + convolution
        return out

    def attend(self, qkv: Tensor) -> Tensor:
        """The attention path, times its rate: (batch, 2 · rel_channels + out_channels, height,
        width) to out_channels.
        """
        q, k, v = qkv.split((self.rel_channels, self.rel_channels, self.conv3.out_channels), 1)
        norm, _, mixing, *to_features, last = self.conv_w
        scale, shift = norm_of_neighbourhoods(norm, q, k, self.kernel_size)
        out = patch_features(q, k, scale, shift, mixing.weight.flatten(1), self.kernel_size)
        for module in to_features:
            out = module(out)
        # The rate scales the small weight in place of the map.
        rate = self.attention_rate
        return patch_aggregation(v, out, scaled(rate, last.weight.flatten(1)),
                                 scaled(rate, last.bias), self.kernel_size)

    def convolve(self, qkv: Tensor) -> Tensor:
        """The convolution path, times its rate, on what :meth:`attend` takes."""
        return self.shift_and_sum(qkv.unflatten(1, (-1, self.rel_channels)))


def norm_of_neighbourhoods(norm: _BatchNorm, q: Tensor, k: Tensor,
                           kernel_size: int) -> tuple[Tensor, Tensor]:
    """What a batch norm over queries and copies of the keys around them multiplies by and adds.

    In training this takes the statistics of the maps, and updates the running ones, as the norm
    would if it were given the copies. A neighbour's statistics are those of the map as far as that
    neighbour sees it: means over windows of the padded map, each of the map's own size. A
    ``SyncBatchNorm`` takes those of all processes.

    Args:
        norm: over channels + key channels · kernel_size² channels.
        q: (batch, channels, height, width).
        k: (batch, key channels, height, width).
        kernel_size: side of the neighbourhood.

    Returns:
        scale and shift, (channels of ``norm``,), at least float32.
    """
    # What takes the place of a batch norm to freeze it may well be in training mode.
    is_learning = norm.training and isinstance(norm, _BatchNorm)
    if is_learning or norm.running_mean is None:
        means, variances = zip(*(statistics(reflection_pad(maps, reach), q.shape[2:])
                                 for maps, reach in ((q, 0), (k, kernel_size // 2))))
        mean, variance, count = torch.cat(means), torch.cat(variances), q[:, 0].numel()
        if isinstance(norm, nn.SyncBatchNorm) and dist.is_initialized():
            mean, variance, count = of_all_processes(mean, variance, count, norm.process_group)
        if is_learning and norm.running_mean is not None:
            update_running_statistics(norm, mean, variance, count)
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is None:
        return scale, -mean * scale
    scale = norm.weight * scale
    return scale, norm.bias - mean * scale


def statistics(padded: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over each window of ``size``, row-major, windows fastest.

    padded: (batch, channels, height, width). Returns two of (channels · windows,), at least
    float32.
    """
    def window_means(maps: Tensor) -> Tensor:
        # Along one axis after the other: the shorter sums are both cheaper and more exact.
        means = F.avg_pool2d(F.avg_pool2d(maps, (size[0], 1), 1), (1, size[1]), 1)
        return means.mean(0).flatten(1)

    padded = padded.to(torch.promote_types(padded.dtype, torch.float32))
    # Far from zero, the mean of squares less the squared mean would cancel.
    centre = padded.detach().mean((0, 2, 3))[:, None]
    centred = padded - centre[:, :, None]
    mean = window_means(centred)
    variance = window_means(centred.square()) - mean.square()
    return (mean + centre).flatten(), variance.clamp(min=0).flatten()


def of_all_processes(mean: Tensor, variance: Tensor, count: int,
                     group: Optional[dist.ProcessGroup]) -> tuple[Tensor, Tensor, int]:
    """Mean and variance over the positions of all processes of a group, and how many those are."""
    group = group or dist.group.WORLD
    total = torch.tensor(count, device=mean.device)
    dist.all_reduce(total, group=group)
    share = count / total.item()
    joint_mean = all_reduce(share * mean, group=group)
    deviation = variance + (mean - joint_mean).square()
    return joint_mean, all_reduce(share * deviation, group=group), total.item()


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor,
                              count: int) -> None:
    """Move the running statistics of ``norm`` to those of a batch, as its forward pass does."""
    norm.num_batches_tracked += 1
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / norm.num_batches_tracked.item()
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
