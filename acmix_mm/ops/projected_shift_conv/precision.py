"""Composing weights without a loss of precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Optional, overload

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Disable autocast on a device, if it has autocast."""
    if device.type not in ('cpu', 'cuda'):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@overload
def at_least_float32(tensor: Tensor) -> Tensor: ...
@overload
def at_least_float32(tensor: None) -> None: ...
def at_least_float32(tensor: Optional[Tensor]) -> Optional[Tensor]:
    """Convert a tensor of lower precision to float32. None stays None."""
    if tensor is None:
        return None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
