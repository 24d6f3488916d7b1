"""Reference implementation of window attention, for tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_mm.ops.window_attention.masks import MASKED_LOGIT


def window_attention_reference(qkv: Tensor, bias: Tensor, window_size: tuple[int, int],
                               shift_size: int, scale: float, dropout_p: float) -> Tensor:
    """Attend over the whole map, with logits of minus infinity between different windows.

    Memory grows with the square of the map.
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
