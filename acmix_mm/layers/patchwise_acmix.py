"""ACmix in a SAN host: patch-wise attention and convolution on the same projections."""

from collections.abc import Sequence
from typing import Any, Callable, ClassVar, Optional, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from acmix_mm.layers.base import (
    ATTENTION,
    CONVOLUTION,
    PROJECTIONS,
    TwoPathLayer,
    check_odd,
    scaled,
)
from acmix_mm.layers.point_attention import PointAttention, gather, neighbours, scatter
from acmix_mm.layers.shift_path import FullyConnected, Shifts
from acmix_mm.ops import patch_aggregation, patch_features
from acmix_mm.ops.reflection import reflection_pad

# Output channels that share an attention weight, in all published SANs.
SHARE_CHANNELS = 8


class PatchwiseACmix(TwoPathLayer):
    """Patch-wise attention and a 3×3 convolution on the same projections.

    Papers: arXiv 2111.14556, section 4.1, and arXiv 2004.13621, section 3.2 (patch-wise
    self-attention, concatenation); out = rate1 · attention + rate2 · convolution. The attention
    weights are a function of the query and all keys around it: norm, ReLU, linear, norm, ReLU,
    linear, without softmax. Queries and keys have fewer channels than values. Values are split
    into value_heads = out_channels / rel_channels heads as wide as the queries, which makes 2 +
    value_heads maps for the fc, and value_heads output heads. As in the other hosts, the
    convolution path's channels are in the order (channel, head), the attention path's in (head,
    channel), and both are added as they are.

    Maps (batch, in_channels, height, width), from 1×1 on, to (batch, out_channels, height, width).

    The authors of ACmix published no code for SAN, so this design is our own;
    :class:`acmix_mm.backbones.ACmixSAN` compares its counts with the published ones. As in their
    ResNet, the fc has no bias.

    Parameters of the attention path are named as in the SAN authors' code: ``conv1``, ``conv2``,
    ``conv3`` (q, k, v), ``conv_w``; those of the convolution path as in the ACmix authors' code:
    ``fc``, ``dep_conv``, ``rate1``, ``rate2``.

    Args:
        in_channels: channels of the input.
        rel_channels: channels of queries and of keys; divides ``out_channels``.
        out_channels: channels of values and of the output, a multiple of ``SHARE_CHANNELS``.
        kernel_size: side of attention's neighbourhood, odd; with reflection padding at the edges.
        norm: builds the batch norms in ``conv_w`` from their number of channels.
        mix: see :class:`acmix_mm.layers.base.TwoPathLayer`.
        combine: see the same class.
        shift: see :class:`acmix_mm.layers.shift_path.Shifts`.
        shift_groups: see the same class.

    Raises:
        ValueError: an argument is invalid.
    """

    parameter_classes: ClassVar[dict[str, str]] = {
        **TwoPathLayer.parameter_classes,
        'conv1': PROJECTIONS, 'conv2': PROJECTIONS, 'conv3': PROJECTIONS, 'conv_w': ATTENTION}

    def __init__(self, in_channels: int, rel_channels: int, out_channels: int, kernel_size: int,
                 norm: Callable[[int], nn.Module] = nn.BatchNorm2d, mix: str = 'acmix',
                 combine: str = 'rates', shift: str = 'learned',
                 shift_groups: Optional[int] = None) -> None:
        super().__init__(mix, combine)
        if out_channels % rel_channels or out_channels % SHARE_CHANNELS:
            raise ValueError(f'rel_channels and {SHARE_CHANNELS} must divide out_channels, got '
                             f'{rel_channels} for {out_channels} channels.')
        check_odd('kernel_size', kernel_size)
        self.rel_channels = rel_channels
        self.kernel_size = kernel_size

        self.conv1 = nn.Conv2d(in_channels, rel_channels, 1)
        self.conv2 = nn.Conv2d(in_channels, rel_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1)
        if self.attends:
            around = rel_channels * (kernel_size**2 + 1)
            groups = out_channels // SHARE_CHANNELS
            self.conv_w = nn.Sequential(
                norm(around), nn.ReLU(inplace=True), nn.Conv2d(around, groups, 1, bias=False),
                norm(groups), nn.ReLU(inplace=True), nn.Conv2d(groups, groups * kernel_size**2, 1))
            if not isinstance(self.conv_w[0], _BatchNorm):
                raise ValueError('The keys around a position take a batch norm, got '
                                 f'{type(self.conv_w[0]).__name__}.')
        if self.convolves:
            value_heads = out_channels // rel_channels
            self.fc = FullyConnected(2 + value_heads, kernel_size=3, bias=False)
            self.dep_conv = Shifts(rel_channels, value_heads, 3, shift, shift_groups)
        self.add_rates()

    def project(self, x: Tensor) -> tuple[Tensor]:
        """Return queries, keys and values, (batch, 2 · rel_channels + out_channels, height, width).
        """
        projections = (self.conv1, self.conv2, self.conv3)
        biases = [conv.bias for conv in projections if conv.bias is not None]
        return F.conv2d(x, torch.cat([conv.weight for conv in projections]), torch.cat(biases)),

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.split((self.rel_channels, self.rel_channels, self.conv3.out_channels), 1)
        norm, _, mixing, *to_features, last = cast(Any, self.conv_w)
        scale, shift = norm_of_neighbourhoods(norm, q, k, self.kernel_size)
        out = patch_features(q, k, scale, shift, mixing.weight.flatten(1), self.kernel_size)
        for module in to_features:
            out = module(out)
        # Scaling the small weight is cheaper than scaling the map.
        rate = self.attention_rate
        return patch_aggregation(v, out, scaled(rate, last.weight.flatten(1)),
                                 scaled(rate, last.bias), self.kernel_size)

    def convolve(self, qkv: Tensor) -> Tensor:
        return self.shift_and_sum(qkv.unflatten(1, (-1, self.rel_channels)))

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        """Two linear layers on each query and the keys around it compute the attention weights."""
        positions, channels = out[:, 0].numel(), out.shape[1]
        projected = positions * (2 * self.rel_channels + channels)
        counts = {PROJECTIONS: x.shape[1] * projected}
        if self.attends:
            linear = sum(module.weight.numel() for module in self.conv_w
                         if isinstance(module, nn.Conv2d))
            counts[ATTENTION] = positions * (linear + self.kernel_size**2 * channels)
        if self.convolves:
            counts[CONVOLUTION] = self.shift_multiply_adds(projected, positions)
        return counts

    def elementwise_operations(self, x: Tensor, out: Tensor) -> int:
        """Three for each normed channel, ReLU included, and one for each bias.

        The modules of ``conv_w`` are not counted on their own, because only some are called.
        """
        modules = list(self.modules())
        normed = sum(module.num_features for module in modules if isinstance(module, _BatchNorm))
        biases = sum(module.bias.numel() for module in modules
                     if isinstance(module, nn.Conv2d) and module.bias is not None)
        return out[:, 0].numel() * (3 * normed + biases)

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        """Apply ``conv_w`` to the query and all keys around it (arXiv 2004.13621, section 3.2).

        There is no softmax: weights may be negative and sum to any value. Channel c of the values
        takes the weights of group c mod groups.
        """
        size = x.shape[2:]
        rows, columns = (neighbours(centre, extent, self.kernel_size, x.device)
                         for centre, extent in zip((row, column), size))
        keys = gather(self.conv2(x)[0], rows, columns)
        features = torch.cat([self.conv1(x)[0, :, row, column], keys.flatten()])
        weights = self.conv_w(features[None, :, None, None]).flatten()
        weights = weights.unflatten(0, (-1, self.kernel_size, self.kernel_size))
        return PointAttention(scatter(weights, rows, columns, size), 1, self.kernel_size**2, False)


def norm_of_neighbourhoods(norm: _BatchNorm, q: Tensor, k: Tensor,
                           kernel_size: int) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm over queries and copies of the keys around them.

    In training, they follow from the statistics of the maps, and the running statistics are
    updated as if the norm had been given the copies. The statistics of a neighbour are those of
    the part of the padded map that it reads: means over windows as large as the map. A
    ``SyncBatchNorm`` uses the statistics of all processes.

    Args:
        norm: over channels + key channels · kernel_size² channels.
        q: (batch, channels, height, width).
        k: (batch, key channels, height, width).
        kernel_size: side of the neighbourhood.

    Returns:
        scale and shift, (channels of ``norm``,), at least float32.
    """
    # A frozen norm that replaces a batch norm may be in training mode.
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
        assert norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is None:
        return scale, -mean * scale
    scale = norm.weight * scale
    return scale, norm.bias - mean * scale


def statistics(padded: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over each window of ``size``.

    Args:
        padded: (batch, channels, height, width).
        size: (height, width) of the windows, which start at every position.

    Returns:
        Two of (channels · windows,), in row-major order of windows, at least float32; zero for an
        empty batch.
    """
    def window_means(maps: Tensor) -> Tensor:
        # Averaging one axis at a time is cheaper and more accurate.
        means = F.avg_pool2d(F.avg_pool2d(maps, (size[0], 1), 1), (1, size[1]), 1)
        return means.sum(0).flatten(1) / num_images

    padded = padded.to(torch.promote_types(padded.dtype, torch.float32))
    num_images = max(padded.shape[0], 1)
    # Centring avoids cancellation in the variance if the mean is far from zero.
    centre = (padded.detach().mean((2, 3)).sum(0) / num_images)[:, None]
    centred = padded - centre[:, :, None]
    mean = window_means(centred)
    variance = window_means(centred.square()) - mean.square()
    return (mean + centre).flatten(), variance.clamp(min=0).flatten()


def of_all_processes(mean: Tensor, variance: Tensor, count: int,
                     group: Optional[dist.ProcessGroup]) -> tuple[Tensor, Tensor, int]:
    """Combine the mean, variance and number of positions of all processes of a group."""
    group = group or dist.group.WORLD
    counted = torch.tensor(count, device=mean.device)
    dist.all_reduce(counted, group=group)
    total = int(counted.item())
    share = count / max(total, 1)
    joint_mean = all_reduce(share * mean, group=group)
    deviation = variance + (mean - joint_mean).square()
    return joint_mean, all_reduce(share * deviation, group=group), total


@torch.no_grad()
def update_running_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor,
                              count: int) -> None:
    """Update the running statistics of ``norm`` from a batch, as its forward pass does.

    As there, an empty batch counts as a batch and leaves the statistics as they are.
    """
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None and norm.running_var is not None
    norm.num_batches_tracked += 1
    if not count:
        return
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / norm.num_batches_tracked.item()
    unbiased = variance * (count / max(count - 1, 1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
