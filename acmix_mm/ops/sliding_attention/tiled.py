"""Sliding-window attention by dense attention from tiles of queries to all keys they can see.

q_i · p_i is the same for all neighbours of i and cancels in the softmax. What remains is plain
attention to the keys k − p. A tile and its surroundings are small matrices; pairs that are not
neighbours are masked. This takes several times the arithmetic of the reference, but all of it in
matrix products, and it copies no neighbourhoods. Only the inputs are saved for the backward pass.
"""

import torch
from torch import Tensor

from acmix_mm.ops.autograd import recomputing
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.sliding_attention.tiles import blocks_of_tiles
from acmix_mm.ops.softmax import attention_weights, logits_gradient


def _empty_output(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                  scale: float) -> Tensor:
    return qkv.new_empty(qkv[:, ::stride, ::stride, 0].shape)


@custom_op(_empty_output)
def attend_tiled(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                 scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    out = _empty_output(qkv, positions, kernel_size, stride, dilation, scale)
    for tiles in blocks_of_tiles(q, kernel_size, stride, dilation):
        own = tiles.own(q[:, ::stride, ::stride]) * scale
        weights = attention_weights(own, tiles.around(k, positions), tiles.mask)
        tiles.put(torch.bmm(weights, tiles.around(v)), out)
    return out


@custom_op(lambda grad_out, qkv, positions, *geometry: (torch.empty_like(qkv),
                                                        positions.new_empty(positions.shape)))
def attend_tiled_backward(grad_out: Tensor, qkv: Tensor, positions: Tensor, kernel_size: int,
                          stride: int, dilation: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``qkv`` and ``positions``."""
    q, k, v = qkv.unbind(3)
    # Tiles share keys, and the border reflects some repeatedly: too many terms for half precision.
    grad_qkv = torch.zeros_like(qkv, dtype=torch.promote_types(qkv.dtype, torch.float32))
    grad_q, grad_k, grad_v = grad_qkv.unbind(3)
    for tiles in blocks_of_tiles(q, kernel_size, stride, dilation):
        own = tiles.own(q[:, ::stride, ::stride]) * scale
        around = tiles.around(k, positions)
        own_grad = tiles.own(grad_out)
        weights = attention_weights(own, around, tiles.mask)
        tiles.add(torch.bmm(weights.transpose(1, 2), own_grad), grad_v)
        grad = torch.bmm(own_grad, tiles.around(v).transpose(1, 2))
        grad = logits_gradient(grad, weights)
        tiles.put(torch.bmm(grad, around).mul_(scale), grad_q[:, ::stride, ::stride])
        tiles.add(torch.bmm(grad.transpose(1, 2), own), grad_k)
    return grad_qkv.to(qkv.dtype), positions_gradient(grad_qkv, positions.dtype)


sliding_attention_tiled = recomputing(attend_tiled, attend_tiled_backward)


def positions_gradient(grad_qkv: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the positions, which are subtracted from the keys of all heads."""
    return -grad_qkv[:, :, :, 1].sum((0, 3), dtype=dtype)
