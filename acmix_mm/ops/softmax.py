"""What the forms share that write out attention and its gradient as matrix products."""

import torch
from torch import Tensor


def attention_weights(queries: Tensor, keys: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(queries · keysᵀ · scale + bias), summed in float32 at least.

    Args:
        queries: (matrices, positions, head_dims).
        keys: (matrices, other positions, head_dims).
        bias: added to the logits; broadcasts to (matrices, positions, other positions).
        scale: factor of the logits.

    Returns:
        (matrices, positions, other positions), in the dtype of ``queries``.
    """
    logits = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scale)
    precise = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(2, dtype=precise).to(queries.dtype)


def logits_gradient(grad_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of softmax, in place: weights · (gradient − its weighted mean)."""
    mean = (grad_weights * weights).sum(2, keepdim=True)
    return grad_weights.sub_(mean).mul_(weights)
