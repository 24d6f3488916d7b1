"""Linear layers: by the faster of two libraries on a CPU, and of maps that others read, too."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.autograd import creates_graph
from acmix_mm.ops.backend import is_exporting
from acmix_mm.ops.caching import is_compiling

# From about as many multiply-adds on, oneDNN is faster.
MIN_MULTIPLY_ADDS = 2**23


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """The same as ``torch.nn.functional.linear``, by oneDNN on a CPU with AVX-512.

    Torch multiplies float32 matrices by MKL, which keeps to AVX2 on AMD's processors. It convolves
    by oneDNN, which does not: a pointwise convolution in channels last is the same product, in half
    the time.

    Args:
        x: (…, in_channels), any floating dtype.
        weight: (out_channels, in_channels).
        bias: (out_channels,), or None.

    Returns:
        (…, out_channels).
    """
    if not _is_faster_by_onednn(x, weight):
        return F.linear(x, weight, bias)
    # oneDNN is fastest if all positions lie in one row.
    row = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    out = F.conv2d(row, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


def linear_and_map(x: Tensor, weight: Tensor,
                   bias: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """``torch.nn.functional.linear``, for a map that another operator reads, too.

    In the backward pass, the product adds to the other's gradient in place. Otherwise autograd
    would add both gradients, each as large as the map, into a third.

    Args:
        x: (…, in_channels), any floating dtype.
        weight: (out_channels, in_channels), of the dtype of ``x``.
        bias: (out_channels,), of the dtype of ``x``, or None.

    Returns:
        The output, (…, out_channels), and ``x``, which the other operator should read. Its gradient
        must be a new tensor, as that of a convolution or a product is, and that of a sum is not.
    """
    if is_compiling():
        return F.linear(x, weight, bias), x
    return _LinearAndMap.apply(x, weight, bias)


class _LinearAndMap(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor,
                bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return F.linear(x, weight, bias), x

    @staticmethod
    def backward(ctx: Any, grad_out: Optional[Tensor],
                 grad_x: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        if grad_out is None:
            return grad_x, None, None
        x, weight = ctx.saved_tensors
        # Under autocast, the product may have been in another dtype.
        rows = grad_out.flatten(0, -2).to(x.dtype)
        needs_bias = ctx.needs_input_grad[2]
        return (*product_gradients(rows, x, weight, grad_x, ctx.needs_input_grad[:2]),
                rows.sum(0) if needs_bias else None)


def product_gradients(rows: Tensor, x: Tensor, weight: Tensor, grad_x: Optional[Tensor],
                      needed: Sequence[bool]) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """The gradients of the factors of a linear layer.

    Args:
        rows: gradient of the output, (positions, out_channels).
        x: see :func:`linear_and_map`.
        weight: see there.
        grad_x: gradient of ``x`` from another operator, which is overwritten, or None.
        needed: whether ``x`` and ``weight`` need a gradient.

    Returns:
        Those of ``x``, with ``grad_x`` added, and of ``weight``; None if they are not needed.
    """
    needs_x, needs_weight = needed
    if needs_x:
        if grad_x is None:
            grad_x = rows.mm(weight).view(x.shape)
        elif creates_graph():
            grad_x = grad_x + rows.mm(weight).view(x.shape)
        else:
            grad_x = grad_x.reshape(-1, x.shape[-1]).addmm_(rows, weight).view(x.shape)
    return grad_x, rows.t().mm(x.flatten(0, -2)) if needs_weight else None


def _is_faster_by_onednn(x: Tensor, weight: Tensor) -> bool:
    # A compiler or another runtime chooses itself.
    if is_compiling() or is_exporting():
        return False
    # MKL reads a transposed map as it is; oneDNN's output would be transposed, too.
    return (x.device.type == 'cpu' and x.dtype == torch.float32 and x.is_contiguous()
            and torch.backends.mkldnn.is_available()
            and torch.backends.cpu.get_cpu_capability() == 'AVX512'
            and x.numel() * len(weight) >= MIN_MULTIPLY_ADDS)
