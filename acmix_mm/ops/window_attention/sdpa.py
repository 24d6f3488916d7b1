"""Window attention by ``scaled_dot_product_attention``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.symbolic import statically_known_true
from acmix_mm.ops.window_attention.masks import edge_masks, is_last


def window_attention_sdpa(qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                          shift_size: int, scale: float, dropout_p: float) -> Tensor:
    """Divide the map into windows and attend within all of them at once."""
    batch, height, width, _, num_heads, head_dims = qkv.shape
    win_h, win_w = window_size
    grid = (height // win_h, width // win_w)
    q, k, v = divide_into_windows(qkv, window_size)
    if shift_size:
        # Each window has its own mask, shared by the batch: windows join the axis of heads.
        masks = edge_masks(*window_size, shift_size, bias.dtype, bias.device)
        at_end = (is_last(windows, bias.device) for windows in grid)
        mask = bias + masks[torch.meshgrid(*at_end, indexing='ij')].flatten(0, 1)[:, None]
        q, k, v, mask = q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask.flatten(0, 1)
    else:
        q, k, v, mask = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias
    out = F.scaled_dot_product_attention(q, k, v, mask[None], dropout_p=dropout_p, scale=scale)
    if statically_known_true(batch == 0):
        # Torch 2.15 leaves the mask of an empty batch without a gradient.
        out = out + 0 * mask.sum()
    return join_windows(out.reshape(batch, *grid, num_heads, win_h, win_w, head_dims))


def divide_into_windows(qkv: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Divide (batch, height, width, 3, num_heads, head_dims) into windows.

    Returns:
        (3, batch, windows, num_heads, area, head_dims).
    """
    batch, height, width, _, num_heads, head_dims = qkv.shape
    win_h, win_w = window_size
    down, across = height // win_h, width // win_w
    windows = qkv.view(batch, down, win_h, across, win_w, 3, num_heads, head_dims)
    return windows.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(
        3, batch, down * across, num_heads, win_h * win_w, head_dims)


def join_windows(out: Tensor) -> Tensor:
    """Turn (batch, windows down, windows across, num_heads, window height, window width,
    head_dims) into a map, (batch, height, width, num_heads · head_dims).
    """
    batch, down, across, num_heads, win_h, win_w, head_dims = out.shape
    return out.permute(0, 1, 4, 2, 5, 3, 6).reshape(
        batch, down * win_h, across * win_w, num_heads * head_dims)
