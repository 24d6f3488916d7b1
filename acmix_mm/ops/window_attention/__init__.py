"""Self-attention inside (shifted) windows, the attention path of ACmix in a Swin host.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path); the windows and their
shift are Swin's, arXiv 2103.14030, section 3.2.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmix_mm.ops.backend import Backend, register_backends, select_backend
from acmix_mm.ops.caching import cached_by_size
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.softmax import attention_weights, logits_gradient

# Swin adds this to the logits of pairs that the shift brought together from opposite edges.
MASKED_LOGIT = -100.0


def window_attention(qkv: Tensor, bias: Tensor, window_size: tuple[int, int], *,
                     shift_size: int = 0, scale: Optional[float] = None, dropout_p: float = 0.0,
                     backend: Optional[str] = None) -> Tensor:
    """Attend within the windows of a map: softmax(q·kᵀ·scale + bias)·v, window by window.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype. In a shifted block the map comes in already rolled by
            ``-shift_size`` along both axes.
        bias: position bias between the positions of a window in row-major order,
            (num_heads, area, area) with area = window height · window width.
        window_size: (height, width) of a window; each divides the map's.
        shift_size: by how many pixels the map has been rolled. Positions that come from
            opposite edges of the map do not see each other.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        dropout_p: probability of dropping an attention weight.
        backend: ``'reference'``, ``'sdpa'`` or ``'chunked'``; if None the last on a CPU, and
            ``'sdpa'`` elsewhere and where weights are dropped.

    Returns:
        (batch, height, width, num_heads · head_dims), in the dtype of ``qkv``.

    Raises:
        ValueError: the shapes do not fit together, or there is no such backend.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError('window_attention takes qkv of shape (batch, height, width, 3, num_heads, '
                         f'head_dims), got {tuple(qkv.shape)}.')
    height, width, num_heads, head_dims = (qkv.shape[axis] for axis in (1, 2, 4, 5))
    if height % window_size[0] or width % window_size[1]:
        raise ValueError(f'A map of {height}×{width} does not divide into windows of '
                         f'{window_size[0]}×{window_size[1]}; pad it first.')
    area = window_size[0] * window_size[1]
    if bias.shape != (num_heads, area, area):
        raise ValueError(f'window_attention takes a bias of shape {(num_heads, area, area)} for '
                         f'these windows and heads, got {tuple(bias.shape)}.')
    if not 0 <= shift_size < min(window_size):
        raise ValueError(f'shift_size must lie in [0, {min(window_size)}), got {shift_size}.')
    if scale is None:
        scale = head_dims**-0.5
    default = 'chunked' if qkv.device.type == 'cpu' and not dropout_p else 'sdpa'
    run = select_backend('window_attention', backend, qkv.device, automatic=default,
                         exporting='sdpa')
    return run(qkv, bias.to(qkv.dtype), window_size, shift_size, scale, dropout_p)


def window_attention_reference(qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                               shift_size: int, scale: float, dropout_p: float) -> Tensor:
    """Follow the equation over the whole map at once; see :func:`window_attention`.

    All pairs of positions get a logit, and pairs of different windows get minus infinity.
    Memory grows with the square of the map: for tests.
    """
    height, width = qkv.shape[1:3]
    device = qkv.device
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    window = rows // window_size[0] * width + columns // window_size[1]
    place = rows % window_size[0] * window_size[1] + columns % window_size[1]
    side = 2 * (rows >= height - shift_size) + (columns >= width - shift_size)

    q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)
    logits = torch.einsum('bnid,bnjd->bnij', q * scale, k)
    logits = logits + bias[:, place[:, None], place]
    logits = logits + MASKED_LOGIT * (side[:, None] != side)
    logits = logits.masked_fill(window[:, None] != window, -torch.inf)
    weights = F.dropout(logits.softmax(-1), dropout_p)
    out = torch.einsum('bnij,bnjd->bnid', weights, v)
    return out.transpose(1, 2).flatten(2).unflatten(1, (height, width))


def window_attention_sdpa(qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                          shift_size: int, scale: float, dropout_p: float) -> Tensor:
    """Cut the map into windows and hand them to ``scaled_dot_product_attention``."""
    batch, height, width, _, num_heads, head_dims = qkv.shape
    win_h, win_w = window_size
    grid = (height // win_h, width // win_w)
    q, k, v = qkv.view(batch, grid[0], win_h, grid[1], win_w, 3, num_heads, head_dims).permute(
        5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, grid[0] * grid[1], num_heads, win_h * win_w,
                                        head_dims)
    if shift_size:
        # Each window has its own mask: windows go beside the heads, so that a batch shares it.
        masks = edge_masks(*window_size, shift_size, bias.dtype, bias.device)
        at_end = (is_last(extent, bias.device) for extent in grid)
        mask = bias + masks[torch.meshgrid(*at_end, indexing='ij')].flatten(0, 1)[:, None]
        q, k, v, mask = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask.flatten(0, 1)
    else:
        q, k, v, mask = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias
    out = F.scaled_dot_product_attention(q, k, v, mask[None], dropout_p=dropout_p, scale=scale)
    out = out.reshape(batch, *grid, num_heads, win_h, win_w, head_dims)
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, num_heads * head_dims)


def window_attention_row_by_row(qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                                shift_size: int, scale: float, dropout_p: float) -> Tensor:
    """Work on one row of windows at a time, and keep nothing but the inputs.

    The weights of a row of windows stay in the processor's cache; those of a map do not, and would
    be the largest thing that training keeps. The backward pass computes them again.
    """
    if dropout_p:
        raise ValueError("window_attention's backend 'chunked' drops no weights; take 'sdpa'.")
    return _RowByRow.apply(qkv, bias, list(window_size), shift_size, scale)


class _RowByRow(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, *geometry: Any) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.geometry = geometry
        return attend_row_by_row(qkv, bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grads = attend_row_by_row_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        return *grads, None, None, None


@custom_op(lambda qkv, bias, *geometry: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]))
def attend_row_by_row(qkv: Tensor, bias: Tensor, window_size: list[int], shift_size: int,
                      scale: float) -> Tensor:
    rows = _WindowRows(qkv, bias, window_size, shift_size)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    for row in range(rows.count):
        q, k, v = rows.matrices(qkv, row)
        rows.put(torch.bmm(rows.weights(q, k, row, scale), v), out, row)
    return out


@custom_op(lambda grad, qkv, bias, *geometry: (torch.empty_like(qkv), bias.new_empty(bias.shape)))
def attend_row_by_row_backward(grad_out: Tensor, qkv: Tensor, bias: Tensor,
                               window_size: list[int], shift_size: int,
                               scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of ``qkv`` and ``bias``; the weights are computed again."""
    rows = _WindowRows(qkv, bias, window_size, shift_size)
    grad_qkv = torch.empty_like(qkv)
    precise = torch.promote_types(bias.dtype, torch.float32)
    grad_bias = torch.zeros(bias.shape, dtype=precise, device=bias.device)
    for row in range(rows.count):
        q, k, v = rows.matrices(qkv, row)
        weights = rows.weights(q, k, row, scale)
        grad, = rows.matrices(grad_out.unflatten(3, (1, *qkv.shape[4:])), row)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad = torch.bmm(grad, v.transpose(1, 2))
        grad = logits_gradient(grad, weights)
        grad_bias += grad.view(-1, *bias.shape).sum(0, dtype=precise)
        grad_q, grad_k = torch.bmm(grad, k), torch.bmm(grad.transpose(1, 2), q)
        rows.put_all((grad_q.mul_(scale), grad_k.mul_(scale), grad_v), grad_qkv, row)
    return grad_qkv, grad_bias.to(bias.dtype)


class _WindowRows:
    """Moving one row of windows between a map and stacks of small matrices.

    Maps are (batch, height, width, kinds, num_heads, head_dims); matrices are (batch · windows ·
    num_heads, area, head_dims), one stack for each kind.
    """

    def __init__(self, qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                 shift_size: int) -> None:
        self.batch, height, width = qkv.shape[:3]
        self.window_size = window_size
        self.count, self.columns = height // window_size[0], width // window_size[1]
        biases = bias.expand(self.columns, *bias.shape)
        self.inner = self.last = self.stacked(biases)
        if shift_size:
            # Rows of windows differ only in whether they hold both edges of the map.
            masks = edge_masks(*window_size, shift_size, bias.dtype, bias.device)
            masks = masks[:, is_last(self.columns, bias.device), None]
            self.inner, self.last = (self.stacked(biases + row) for row in masks)

    def stacked(self, biases: Tensor) -> Tensor:
        """Biases of a row, (windows, num_heads, area, area), for every picture of the batch."""
        return biases.expand(self.batch, *biases.shape).flatten(0, 2)

    def weights(self, q: Tensor, k: Tensor, row: int, scale: float) -> Tensor:
        bias = self.last if row == self.count - 1 else self.inner
        return attention_weights(q, k, bias, scale)

    def windows(self, maps: Tensor, row: int) -> Tensor:
        """A view of one row: (kinds, batch, windows, num_heads, window h, window w, head_dims)."""
        win_h, win_w = self.window_size
        rows = maps[:, row * win_h:(row + 1) * win_h]
        return rows.unflatten(2, (self.columns, win_w)).permute(4, 0, 2, 5, 1, 3, 6)

    def matrices(self, maps: Tensor, row: int) -> Tensor:
        windows = self.windows(maps, row)
        kinds, head_dims = windows.shape[0], windows.shape[-1]
        return windows.reshape(kinds, -1, self.window_size[0] * self.window_size[1], head_dims)

    def put(self, matrices: Tensor, maps: Tensor, row: int) -> None:
        """Write matrices of one kind into a map of channels, (batch, height, width, channels)."""
        heads = maps.unflatten(3, (1, -1, matrices.shape[2]))
        self.put_all((matrices,), heads, row)

    def put_all(self, matrices: Sequence[Tensor], maps: Tensor, row: int) -> None:
        """Write matrices into a map, one stack for each kind."""
        windows = self.windows(maps, row)
        for kind, each in zip(windows, matrices):
            kind.copy_(each.view(kind.shape))


def is_last(extent: int, device: torch.device) -> Tensor:
    """0 for all but the last of ``extent`` windows, and 1 for that, int64."""
    return (torch.arange(extent, device=device) == extent - 1).long()


@cached_by_size
def edge_masks(window_height: int, window_width: int, shift_size: int, dtype: torch.dtype,
               device: torch.device) -> Tensor:
    """Logits that keep apart what the shift brought together in the last row and column of windows.

    Returns:
        (2, 2, area, area), by whether a window is in the last row, and in the last column: zero, or
        ``MASKED_LOGIT`` between positions from opposite edges of the map.
    """
    down, across = (torch.arange(extent, device=device) >= extent - shift_size
                    for extent in (window_height, window_width))
    side = torch.zeros(2, 2, window_height, window_width, dtype=torch.int64, device=device)
    side[1] += 2 * down[:, None]
    side[:, 1] += across
    side = side.flatten(2)
    return (side[..., :, None] != side[..., None, :]).to(dtype) * MASKED_LOGIT


register_backends('window_attention', Backend('reference', window_attention_reference),
                  Backend('sdpa', window_attention_sdpa),
                  Backend('chunked', window_attention_row_by_row))
