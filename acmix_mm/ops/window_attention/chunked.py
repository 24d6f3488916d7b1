"""Window attention on one row of windows at a time, with recomputation in the backward pass.

The attention weights of one row of windows fit the cache of a CPU. Those of a map do not, and they
would be the largest tensor saved for training.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from acmix_mm.ops.autograd import recomputing
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.softmax import attention_weights, logits_gradient
from acmix_mm.ops.window_attention.masks import edge_masks, is_last


def window_attention_chunked(qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                             shift_size: int, scale: float, dropout_p: float) -> Tensor:
    if dropout_p:
        raise ValueError("window_attention's backend 'chunked' has no dropout, got "
                         f"dropout_p={dropout_p}; use 'sdpa'.")
    return _attend(qkv, bias, list(window_size), shift_size, scale)


@custom_op(lambda qkv, bias, *geometry: qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5]))
def attend_windows(qkv: Tensor, bias: Tensor, window_size: list[int], shift_size: int,
                   scale: float) -> Tensor:
    rows = _WindowRows(qkv, bias, window_size, shift_size)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    heads = out.unflatten(3, (1, *qkv.shape[4:]))
    for row in range(rows.count):
        q, k, v = rows.matrices(qkv, row)
        rows.put((torch.bmm(rows.weights(q, k, row, scale), v),), heads, row)
    return out


@custom_op(lambda grad, qkv, bias, *geometry: (torch.empty_like(qkv), bias.new_empty(bias.shape)))
def attend_windows_backward(grad_out: Tensor, qkv: Tensor, bias: Tensor, window_size: list[int],
                            shift_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``qkv`` and ``bias``."""
    rows = _WindowRows(qkv, bias, window_size, shift_size)
    grad_qkv = torch.empty_like(qkv)
    precise = torch.promote_types(bias.dtype, torch.float32)
    grad_bias = torch.zeros(bias.shape, dtype=precise, device=bias.device)
    grad_heads = grad_out.unflatten(3, (1, *qkv.shape[4:]))
    for row in range(rows.count):
        q, k, v = rows.matrices(qkv, row)
        weights = rows.weights(q, k, row, scale)
        grad, = rows.matrices(grad_heads, row)
        grad_v = torch.bmm(weights.transpose(1, 2), grad)
        grad = torch.bmm(grad, v.transpose(1, 2))
        grad = logits_gradient(grad, weights)
        grad_bias += grad.view(-1, *bias.shape).sum(0, dtype=precise)
        grad_q, grad_k = torch.bmm(grad, k), torch.bmm(grad.transpose(1, 2), q)
        rows.put((grad_q.mul_(scale), grad_k.mul_(scale), grad_v), grad_qkv, row)
    return grad_qkv, grad_bias.to(bias.dtype)


_attend = recomputing(attend_windows, attend_windows_backward)


class _WindowRows:
    """The rows of windows of a map, as stacks of matrices.

    Maps are (batch, height, width, stacks, num_heads, head_dims), with stacks for queries, keys and
    values, or one stack for outputs. Matrices are (batch · windows · num_heads, area, head_dims).
    """

    def __init__(self, qkv: Tensor, bias: Tensor, window_size: Sequence[int],
                 shift_size: int) -> None:
        self.batch, height, width = qkv.shape[:3]
        self.window_size = window_size
        self.count, self.columns = height // window_size[0], width // window_size[1]
        biases = bias.expand(self.columns, *bias.shape)
        self.inner = self.last = self._for_batch(biases)
        if shift_size:
            # Of all rows of windows, only the last holds both edges of the map.
            masks = edge_masks(*window_size, shift_size, bias.dtype, bias.device)
            masks = masks[:, is_last(self.columns, bias.device), None]
            self.inner, self.last = (self._for_batch(biases + row) for row in masks)

    def _for_batch(self, biases: Tensor) -> Tensor:
        """Repeat the biases of a row, (windows, num_heads, area, area), for each image."""
        return biases.expand(self.batch, *biases.shape).flatten(0, 2)

    def weights(self, q: Tensor, k: Tensor, row: int, scale: float) -> Tensor:
        """The attention weights of a row of windows."""
        bias = self.last if row == self.count - 1 else self.inner
        return attention_weights(q, k, bias, scale)

    def matrices(self, maps: Tensor, row: int) -> Tensor:
        """Read a row of windows: (stacks, matrices, area, head_dims)."""
        windows = self._windows(maps, row)
        area = self.window_size[0] * self.window_size[1]
        return windows.reshape(windows.shape[0], -1, area, windows.shape[-1])

    def put(self, stacks: Sequence[Tensor], maps: Tensor, row: int) -> None:
        """Write a row of windows."""
        windows = self._windows(maps, row)
        for index, stack in enumerate(stacks):
            windows[index].copy_(stack.view(windows.shape[1:]))

    def _windows(self, maps: Tensor, row: int) -> Tensor:
        """A view: (stacks, batch, windows, num_heads, window height, window width, head_dims)."""
        win_h, win_w = self.window_size
        rows = maps[:, row * win_h:(row + 1) * win_h]
        return rows.unflatten(2, (self.columns, win_w)).permute(4, 0, 2, 5, 1, 3, 6)
