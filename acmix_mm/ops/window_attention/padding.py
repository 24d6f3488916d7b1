"""Padding and rolling the map that windowed attention reads, also with dynamic sizes."""

import functools
from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.backend import is_exporting
from acmix_mm.ops.symbolic import statically_known_true


def padding_first(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a backend for padded and rolled maps the argument ``padding``, and one dtype.

    See :func:`acmix_mm.ops.window_attention`.
    """
    @functools.wraps(run)
    def padded(qkv: Tensor, bias: Tensor, padding: Optional[Tensor], window_size: Sequence[int],
               shift_size: int, is_rolled: bool, *others: Any) -> Tensor:
        bias = bias.to(qkv.dtype)
        if padding is None:
            return run(qkv, bias, window_size, shift_size, *others)
        height, width = qkv.shape[1:3]
        back = shift_size if is_rolled else 0
        maps = fill_to_windows(roll(qkv, back), padding.to(qkv.dtype), window_size)
        out = run(roll(maps, -shift_size), bias, window_size, shift_size, *others)
        return roll(roll(out, shift_size)[:, :height, :width], -back)
    return padded


def fill_to_windows(maps: Tensor, values: Tensor, window_size: Sequence[int]) -> Tensor:
    """Pad (batch, height, width, …) at the bottom and right to whole windows.

    Args:
        maps: any strides.
        values: of each padded position, (…).
        window_size: (height, width) of a window.
    """
    height, width = maps.shape[1:3]
    bottom, right = padding_of(maps.shape[1:3], window_size)
    padded = values.expand(len(maps), height + bottom, width + right, *values.shape).clone()
    padded[:, :height, :width] = maps
    return padded


def padding_values(qkv: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Queries, keys and values of a padded position, (3, num_heads, head_dims).

    Args:
        qkv: those of the map, (batch, height, width, 3, num_heads, head_dims).
        bias: of the projections, or None.
    """
    return qkv.new_zeros(qkv.shape[3:]) if bias is None else bias.view(qkv.shape[3:])


def padding_of(size: Sequence[int], window_size: Sequence[int]) -> tuple[int, int]:
    """Rows at the bottom and columns at the right that a map lacks of whole windows."""
    bottom, right = ((extent + side - 1) // side * side - extent
                     for extent, side in zip(size, window_size))
    return bottom, right


def pad_to_windows(x: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Pad (batch, height, width, channels) with zeros at the bottom and right to whole windows."""
    bottom, right = padding_of(x.shape[1:3], window_size)
    if statically_known_true(bottom == 0) and statically_known_true(right == 0):
        return x
    return F.pad(x, (0, 0, 0, right, 0, bottom))


def roll(x: Tensor, shift: int) -> Tensor:
    """Roll (batch, height, width, …) along both axes; in an export, by less than their sizes."""
    if shift == 0:
        return x
    if not is_exporting():
        return x.roll((shift, shift), (1, 2))
    for axis in (1, 2):
        first = -shift if shift < 0 else x.shape[axis] - shift
        x = join(x, axis, (first, x.shape[axis] - first), (0, first))
    return x


def drop_padding(x: Tensor, size: Sequence[int], shift_size: int) -> Tensor:
    """Remove the bottom and right padding from a map that was rolled after padding.

    Args:
        x: (batch, padded height, padded width, …), rolled by ``-shift_size``.
        size: (height, width) before padding.
        shift_size: see ``x``.

    Returns:
        (batch, height, width, …), equal to the map rolled without padding.
    """
    # torch.cat orders the memory of its result by axis. Permuting before and after it keeps the
    # memory format. In an export, strides of dynamic sizes cannot be compared.
    axes = list(range(x.dim()))
    order = axes if is_exporting() else sorted(axes, key=x.stride, reverse=True)
    x = x.permute(order)
    for axis, extent in zip((order.index(1), order.index(2)), size):
        padded = x.shape[axis]
        if statically_known_true(padded == extent):
            continue
        shift = shift_size if shift_size < extent else shift_size % extent
        pieces = [((shift - shift_size) % padded, extent - shift)]
        if shift:
            pieces.append((padded - shift_size, shift))
        x = join(x, axis, *pieces)
    return x.permute([order.index(axis) for axis in axes])


def join(x: Tensor, axis: int, *pieces: tuple[int, int]) -> Tensor:
    """Concatenate pieces of an axis, each given as (start, length)."""
    if is_exporting():
        # The stride checks of views would specialise an export to the sizes of its example.
        return x.index_select(axis, torch.cat([
            torch.arange(start, start + length, device=x.device) for start, length in pieces]))
    views = [x.narrow(axis, *piece) for piece in pieces]
    return torch.cat(views, axis) if len(views) > 1 else views[0]
