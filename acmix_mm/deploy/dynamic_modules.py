"""Modules that torch.export can trace with dynamic sizes, in place of those that it cannot."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Optional

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmcv.cnn.bricks.transformer import AdaptivePadding
from torch import Tensor, nn

from acmix_mm.layers.base import scaled_linear
from acmix_mm.layers.window_acmix import WindowACmix
from acmix_mm.ops.symbolic import divide
from acmix_mm.ops.window_attention.masks import edge_masks, is_last
from acmix_mm.ops.window_attention.padding import pad_to_windows
from acmix_mm.ops.window_attention.sdpa import divide_into_windows, join_windows


class PadToStrides(nn.Module):
    """Pad (batch, channels, height, width) at the bottom and right to multiples of the strides."""

    def __init__(self, strides: tuple[int, int], value: float) -> None:
        super().__init__()
        self.strides, self.value = strides, value

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = ((extent + stride - 1) // stride * stride - extent
                         for extent, stride in zip(x.shape[2:], self.strides))
        return F.pad(x, (0, right, 0, bottom), value=self.value)


class MatrixAdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling as two matrix products; ONNX has no adaptive pooling."""

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.pooling_matrix(extent, bins, x)
                         for extent, bins in zip(x.shape[2:], self.output_size))
        return rows @ x @ columns.T

    @staticmethod
    def pooling_matrix(extent: int, bins: int, like: Tensor) -> Tensor:
        """Matrix (bins, extent) whose row i averages the positions from ⌊i · extent / bins⌋ to
        ⌈(i + 1) · extent / bins⌉, the last excluded, as torch's adaptive pooling does.
        """
        index = torch.arange(bins, device=like.device)[:, None]
        start, stop = index * extent // bins, ((index + 1) * extent + bins - 1) // bins
        position = torch.arange(extent, device=like.device)
        inside = (position >= start) & (position < stop)
        return inside.to(like.dtype) / (stop - start)


class IntegerUpsample(nn.Module):
    """Interpolation by integer factors."""

    def __init__(self, factors: tuple[int, int], mode: str, align_corners: Optional[bool]) -> None:
        super().__init__()
        self.factors, self.mode, self.align_corners = factors, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [extent * factor for extent, factor in zip(x.shape[2:], self.factors)]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


class DynamicWindowACmix(WindowACmix):
    """A :class:`WindowACmix` that takes maps of all sizes without a branch on the size.

    A map that fits into one window is padded to it and not shifted, and its padding is masked.
    """

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        is_larger = torch.scalar_tensor(torch.sym_max(*size)) > self.window_size
        shift = is_larger.long() * self.shift_size
        window = (self.window_size, self.window_size)
        qkv = roll(pad_to_windows(x, window), shift)
        qkv = F.linear(qkv, self.qkv.weight, self.qkv.bias).unflatten(
            3, (3, self.num_heads, self.head_dims))
        paths = []
        if self.attends:
            out = self.attend_windows(qkv, size, is_larger)
            paths.append(roll(scaled_linear(self.attention_rate, out, self.proj), -shift, size))
        if self.convolves:
            paths.append(self.convolve_rolled(x, qkv, shift))
        return self.proj_drop(sum(paths[1:], paths[0]))

    def attend_windows(self, qkv: Tensor, size: Sequence[int], is_larger: Tensor) -> Tensor:
        """Attend within the windows of the padded and rolled map.

        Args:
            qkv: (batch, padded height, padded width, 3, num_heads, head_dims).
            size: (height, width) without padding.
            is_larger: whether the map is larger than a window, (), bool.
        """
        batch, height, width = qkv.shape[:3]
        side = self.window_size
        grid = (height // side, width // side)
        windows, mask = divide_into_windows(qkv, (side, side)), self.position_bias((side, side))
        if self.shift_size:
            edges = edge_masks(side, side, self.shift_size, qkv.dtype, qkv.device)
            mask = mask + edges[:, :, None] * is_larger
        position = torch.arange(side, device=qkv.device)
        is_padding = ((position[:, None] >= size[0]) | (position >= size[1])).flatten() & ~is_larger
        mask = mask.masked_fill(is_padding, -torch.inf)
        if self.shift_size:
            # Each window has its own mask, shared by the batch: windows join the axis of heads.
            at_end = [is_last(number, qkv.device) for number in grid]
            mask = mask[torch.meshgrid(*at_end, indexing='ij')].flatten(0, 2)
            q, k, v = windows.flatten(2, 3)
        else:
            q, k, v = windows.flatten(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, mask[None], scale=self.scale)
        return join_windows(out.reshape(batch, *grid, self.num_heads, side, side, self.head_dims))

    def convolve_rolled(self, x: Tensor, qkv: Tensor, shift: Tensor) -> Tensor:
        """Compute the convolution path, which reads the rolled map without padding.

        Args:
            x: the map.
            qkv: see :meth:`attend_windows`.
            shift: by how much both maps are rolled, (), int64.
        """
        size = x.shape[1:3]
        if self.composition(x, x.shape[3]):
            out = self.project_shift_and_sum(roll(x, shift).permute(0, 3, 1, 2), self.qkv.weight,
                                             self.qkv.bias)
        else:
            for axis, extent in zip((1, 2), size):
                place = divide(torch.arange(extent, device=x.device) + shift, extent)[1]
                qkv = qkv.index_select(axis, divide(place - shift, qkv.shape[axis])[1])
            out = self.shift_and_sum(qkv.flatten(3, 4).permute(0, 3, 4, 1, 2))
        return roll(out.permute(0, 2, 3, 1), -shift)

    @property
    def min_dynamic_size(self) -> int:
        return 2


def roll(x: Tensor, shift: Tensor, size: Optional[Sequence[int]] = None) -> Tensor:
    """Roll (batch, height, width, …) by ``-shift``, (), int64, and crop it to ``size``."""
    for axis, extent in zip((1, 2), size or x.shape[1:3]):
        position = torch.arange(extent, device=x.device) + shift
        x = x.index_select(axis, divide(position, x.shape[axis])[1])
    return x


class DynamicFPN(nn.Module):
    """MMDetection's FPN whose further levels are every second position of the level before.

    MMDetection selects these by pooling with 1×1 windows.
    """

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        levels = fpn.backbone_end_level - fpn.start_level
        self.fpn, self.further_levels = fpn, fpn.num_outs - levels
        fpn.num_outs = levels

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outs = self.fpn(maps)
        for _ in range(self.further_levels):
            outs = (*outs, outs[-1][:, :, ::2, ::2])
        return outs


def with_dynamic_modules(network: nn.Module) -> nn.Module:
    """Copy a network and replace its modules as :func:`dynamic_module` does."""
    copy = deepcopy(network)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            setattr(parent, name, dynamic_module(child))
    return copy


def dynamic_module(module: nn.Module) -> nn.Module:
    """Return a module equal to ``module`` that torch.export can trace with dynamic sizes.

    Modules of torch and OpenMMLab that round sizes make torch.export specialise on the sizes of its
    example; those listed here are replaced, all others are returned as they are.
    """
    if isinstance(module, WindowACmix):
        # The same parameters, with another way to read them.
        replaced = DynamicWindowACmix.__new__(DynamicWindowACmix)
        replaced.__dict__ = module.__dict__
        return replaced
    if isinstance(module, ConvModule) and type(module.conv) is nn.Conv2d and (
            module.order == ('conv', 'norm', 'act')):
        # Batch norm depends on whether there are no boxes.
        return fuse_conv_bn(module)
    if type(module).__name__ == 'FPN' and not module.add_extra_convs:
        return DynamicFPN(module)
    if isinstance(module, AdaptivePadding) and (
            module.padding == 'corner' and module.kernel_size == module.stride):
        return PadToStrides(module.stride, 0.)
    if isinstance(module, nn.MaxPool2d):
        kernel, stride, padding = (sides if isinstance(sides, tuple) else (sides, sides) for sides
                                   in (module.kernel_size, module.stride, module.padding))
        # Whether the output has ⌈extent / stride⌉ positions, as it has after padding to the stride.
        rounds_up = all(side - 2 * pad == (step if module.ceil_mode else 1)
                        for side, step, pad in zip(kernel, stride, padding))
        if rounds_up:
            return nn.Sequential(PadToStrides(stride, -torch.inf),
                                 nn.MaxPool2d(kernel, stride, padding))
    if isinstance(module, nn.AdaptiveAvgPool2d):
        size = module.output_size
        return MatrixAdaptiveAvgPool2d(size if isinstance(size, tuple) else (size, size))
    factors = getattr(module, 'scale_factor', None)
    if type(module).__name__ == 'Upsample' and factors is not None:
        factors = factors if isinstance(factors, tuple) else (factors, factors)
        if all(factor == int(factor) for factor in factors):
            return IntegerUpsample(tuple(map(int, factors)), module.mode, module.align_corners)
    return module
