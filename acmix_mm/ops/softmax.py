"""Softmax attention by batched matrix products, and its gradient."""

import torch
from torch import Tensor


def attention_weights(queries: Tensor, keys: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(queries · keysᵀ · scale + bias), computed in float32 or higher precision.

    Args:
        queries: (matrices, queries, head_dims).
        keys: (matrices, keys, head_dims).
        bias: added to the logits; broadcasts to (matrices, queries, keys).
        scale: factor of the logits.

    Returns:
        (matrices, queries, keys), in the dtype of ``queries``.
    """
    logits = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(2, dtype=precise).to(queries.dtype)


def logits_gradient(grad_weights: Tensor, weights: Tensor) -> Tensor:
    """Turn the gradient of the weights into that of the logits."""
    return torch.ops.aten._softmax_backward_data(grad_weights, weights, 2, weights.dtype)
