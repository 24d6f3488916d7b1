"""Window attention on a few rows of windows at a time, with recomputation in the backward pass.

The attention weights of a few rows of windows fit the cache of a CPU. Those of a map do not, and
they would be the largest tensor saved for training. Padding is added to what is read of the map, so
that no copy of the map has it.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from acmix_mm.ops.autograd import passing_on
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.softmax import logits_gradient
from acmix_mm.ops.window_attention.masks import edge_masks, is_last
from acmix_mm.ops.window_attention.padding import roll

# Logits of the rows of windows that are processed at once: 2 MiB in float32.
STRIP_LOGITS = 2**19


def window_attention_chunked(*arguments: Any) -> Tensor:
    return window_attention_and_map_chunked(*arguments)[0]


def window_attention_and_map_chunked(
        qkv: Tensor, bias: Tensor, padding: Optional[Tensor], window_size: tuple[int, int],
        shift_size: int, is_rolled: bool, scale: float, dropout_p: float) -> tuple[Tensor, Tensor]:
    if dropout_p:
        raise ValueError("window_attention's backend 'chunked' has no dropout, got "
                         f"dropout_p={dropout_p}; use 'sdpa'.")
    if padding is None:
        padding = qkv.new_zeros(qkv.shape[3:])
    geometry = list(window_size), shift_size, scale
    bias, padding = bias.to(qkv.dtype), padding.to(qkv.dtype)
    if is_rolled:
        return _attend(qkv, bias, padding, *geometry)
    out, _ = _attend(roll(qkv, -shift_size), bias, padding, *geometry)
    return roll(out, shift_size), qkv


@custom_op(lambda qkv, *others: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]))
def attend_windows(qkv: Tensor, bias: Tensor, padding: Tensor, window_size: list[int],
                   shift_size: int, scale: float) -> Tensor:
    """Attend within the windows of a map that was rolled, but not padded."""
    windows = _Windows(qkv, bias, window_size, shift_size)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    heads = out.unflatten(3, (1, *qkv.shape[4:]))
    for strip in windows.strips():
        q, k, v = windows.read(strip, qkv, padding)
        windows.write(strip, torch.bmm(windows.weights(strip, q, k, scale), v)[None], heads)
    return out


@custom_op(lambda grad, qkv, bias, padding, *others: (
    torch.empty_like(qkv), bias.new_empty(bias.shape), padding.new_empty(padding.shape)))
def attend_windows_backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, padding: Tensor,
                            window_size: list[int], shift_size: int,
                            scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``qkv``, ``bias`` and ``padding``."""
    grad_qkv = torch.empty_like(qkv)
    return _gradients(grad_qkv, False, grad_out, qkv, bias, padding, window_size, shift_size, scale)


def _add_gradients(grad_qkv: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad_qkv, True, *arguments)


def _gradients(grad_qkv: Tensor, adds: bool, grad_out: Tensor, qkv: Tensor, bias: Tensor,
               padding: Tensor, window_size: list[int], shift_size: int,
               scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Write or add the gradient of ``qkv`` to ``grad_qkv``."""
    windows = _Windows(qkv, bias, window_size, shift_size)
    precise = torch.promote_types(bias.dtype, torch.float32)
    grad_bias, grad_padding = (torch.zeros(each.shape, dtype=precise, device=each.device)
                               for each in (bias, padding))
    grad_heads = grad_out.unflatten(3, (1, *qkv.shape[4:]))
    # Nothing depends on the outputs of padded queries.
    no_grad = torch.zeros_like(padding[:1])
    for strip in windows.strips():
        q, k, v = windows.read(strip, qkv, padding)
        weights = windows.weights(strip, q, k, scale)
        grad, = windows.read(strip, grad_heads, no_grad)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad = logits_gradient(torch.bmm(grad, v.transpose(1, 2)), weights)
        grad_bias += grad.view(-1, *bias.shape).sum(0, dtype=precise)
        grad_q, grad_k = torch.bmm(grad, k), torch.bmm(grad.transpose(1, 2), q)
        grads = torch.stack([grad_q.mul_(scale), grad_k.mul_(scale), grad_v])
        of_padding = windows.write(strip, grads, grad_qkv, adds)
        if of_padding is not None:
            grad_padding += of_padding
    return grad_qkv, grad_bias.to(bias.dtype), grad_padding.to(padding.dtype)


_attend = passing_on(attend_windows, attend_windows_backward, _add_gradients)


class _Strip(NamedTuple):
    """Some rows of windows.

    Attributes:
        rows: of windows.
        shape: (batch, height, width), with padding.
        parts: indices of parts that hold no padding, in the strip and on the map.
        is_padded: whether there is padding.
    """

    rows: range
    shape: tuple[int, int, int]
    parts: list[tuple[tuple[slice, slice, slice], tuple[slice, slice, slice]]]
    is_padded: bool


class _Windows:
    """The windows of a rolled map, as stacks of matrices.

    Maps are (batch, height, width, stacks, num_heads, head_dims), with stacks for queries, keys and
    values, or one stack for outputs. Matrices are (batch · windows · num_heads, area, head_dims).
    """

    def __init__(self, qkv: Tensor, bias: Tensor, window_size: Sequence[int],
                 shift_size: int) -> None:
        self.batch = qkv.shape[0]
        self.down, self.across = (
            _Axis(extent, side, shift_size) for extent, side in zip(qkv.shape[1:3], window_size))
        self.num_heads, self.area = bias.shape[:2]
        # Of the inner rows of windows, and of the last, which holds both edges of the map.
        self.biases = [bias, bias]
        if shift_size:
            masks = edge_masks(*window_size, shift_size, bias.dtype, bias.device)
            columns = is_last(self.across.windows, bias.device)
            self.biases = [bias + mask[columns, None] for mask in masks]

    def strips(self) -> Iterator[_Strip]:
        """Divide the map into strips of as many rows as :data:`STRIP_LOGITS` allows."""
        columns = range(self.across.windows)
        logits = max(self.batch, 1) * len(columns) * self.num_heads * self.area**2
        at_once = max(STRIP_LOGITS // logits, 1)
        for first in range(0, self.down.windows, at_once):
            rows = range(first, min(first + at_once, self.down.windows))
            shape = self.batch, len(rows) * self.down.side, len(columns) * self.across.side
            parts = [((slice(None), down, across), (slice(None), down_map, across_map))
                     for (down, down_map), (across, across_map) in itertools.product(
                         self.down.parts(rows), self.across.parts(columns))]
            yield _Strip(rows, shape, parts,
                         self.down.is_padded(rows) or self.across.is_padded(columns))

    def weights(self, strip: _Strip, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The attention weights, (matrices, area, area), computed in at least float32."""
        logits = torch.bmm(q * scale, k.transpose(1, 2))
        by_row = logits.view(self.batch, len(strip.rows), self.across.windows, self.num_heads,
                             self.area, self.area)
        inner = self.down.windows - 1 - strip.rows.start
        for rows, bias in zip((slice(inner), slice(inner, None)), self.biases):
            by_row[:, rows].add_(bias)
        precise = torch.promote_types(logits.dtype, torch.float32)
        return logits.softmax(2, dtype=precise).to(q.dtype)

    def read(self, strip: _Strip, maps: Tensor, padding: Tensor) -> Tensor:
        """Read windows: (stacks, matrices, area, head_dims).

        Args:
            strip: what to read.
            maps: see the class.
            padding: of each padded position, (stacks, num_heads, head_dims).
        """
        if strip.is_padded:
            filled = padding.expand(*strip.shape, *padding.shape).clone()
            for inside, place in strip.parts:
                filled[inside] = maps[place]
        else:
            filled = maps[strip.parts[0][1]]
        windows = self._divide(filled)
        return windows.reshape(len(windows), -1, self.area, windows.shape[-1])

    def write(self, strip: _Strip, stacks: Tensor, maps: Tensor,
              adds: bool = False) -> Optional[Tensor]:
        """Write or add windows to maps.

        Returns:
            The sum over padded positions, or None if there are none.
        """
        # Two copies are faster than one if head_dims is not the last axis in memory.
        filled = stacks.new_empty(*strip.shape, *maps.shape[3:])
        windows = self._divide(filled)
        windows.copy_(stacks.view(windows.shape))
        for inside, place in strip.parts:
            if adds:
                maps[place].add_(filled[inside])
            else:
                maps[place] = filled[inside]
        if not strip.is_padded:
            return None
        for inside, _ in strip.parts:
            filled[inside] = 0
        return filled.sum((0, 1, 2))

    def _divide(self, strip: Tensor) -> Tensor:
        """A view: (stacks, batch, rows, columns, num_heads, window height, window width,
        head_dims).
        """
        windows = strip.unflatten(2, (-1, self.across.side)).unflatten(1, (-1, self.down.side))
        return windows.permute(5, 0, 1, 3, 6, 2, 4, 7)


class _Axis:
    """An axis of a map that was rolled, not padded; padding at its end comes before rolling."""

    def __init__(self, extent: int, side: int, shift_size: int) -> None:
        self.side = side
        self.windows = -(-extent // side)
        padded = self.windows * side
        rolled = shift_size % extent
        # First position on the map, positions, and first position with padding.
        self.pieces = [(0, extent, 0)]
        if padded > extent:
            self.pieces = [(0, extent - rolled, (rolled - shift_size) % padded),
                           (extent - rolled, rolled, padded - shift_size)]

    def parts(self, windows: range) -> list[tuple[slice, slice]]:
        """Slices without padding, in a range of windows and on the map."""
        parts = []
        for on_map, length, with_padding in self.pieces:
            start = max(with_padding, windows.start * self.side)
            stop = min(with_padding + length, windows.stop * self.side)
            if start < stop:
                offset = on_map - with_padding
                parts.append((slice(start - windows.start * self.side,
                                    stop - windows.start * self.side),
                              slice(start + offset, stop + offset)))
        return parts

    def is_padded(self, windows: range) -> bool:
        """Whether there is padding in a range of windows."""
        positions = sum(inside.stop - inside.start for inside, _ in self.parts(windows))
        return positions < len(windows) * self.side
