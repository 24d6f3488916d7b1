"""Argument checks shared by the operators."""

from torch import Tensor


def check_odd_kernel(operator: str, kernel_size: int) -> None:
    """Raise ValueError unless ``kernel_size`` is odd."""
    if kernel_size % 2 == 0:
        raise ValueError(f'{operator} takes odd kernels, got one of {kernel_size}.')


def check_projections(operator: str, qkv: Tensor, positions: Tensor) -> None:
    """Raise ValueError unless ``qkv`` is a map of queries, keys and values with these positions."""
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f'{operator} takes qkv of shape (batch, height, width, 3, num_heads, '
                         f'head_dims), got {tuple(qkv.shape)}.')
    encoding_shape = (*qkv.shape[1:3], qkv.shape[5])
    if positions.shape != encoding_shape:
        raise ValueError(f'positions must be of shape {encoding_shape} for this map, got '
                         f'{tuple(positions.shape)}.')
