"""position_encoding in torch."""

import torch
from torch import Tensor

from acmix_mm.ops.caching import cached_by_size


def position_encoding_reference(weight: Tensor, bias: Tensor, height: int, width: int,
                                dtype: torch.dtype) -> Tensor:
    grid = coordinates(height, width, dtype, weight.device)
    # As a matrix product, autocast or TF32 would round the coordinates.
    by_x, by_y = weight.to(dtype).unbind(1)
    columns = torch.addcmul(bias.to(dtype), grid[0, :, :1], by_x)
    return torch.addcmul(columns, grid[:, :1, 1:], by_y)


def position_encoding_gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight and bias, given that of the encoding."""
    grid = coordinates(*grad.shape[:2], grad.dtype, grad.device)
    by_x, by_y = (grid[..., axis, None] * grad for axis in (0, 1))
    return torch.stack([by_x.sum((0, 1)), by_y.sum((0, 1))], 1), grad.sum((0, 1))


@cached_by_size
def coordinates(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """x and y of every position, (height, width, 2), from -1 to 1 along each axis."""
    # torch.linspace does not accept dynamic sizes, and ONNX has no arithmetic on them but that of
    # tensors.
    x, y = (positions * (2 / positions[-1:].clamp(min=1)) - 1
            for positions in (torch.arange(extent, device=device) for extent in (width, height)))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).to(dtype)
