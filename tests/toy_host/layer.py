"""ACmix in the toy host: attention over the whole map and convolution."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import ATTENTION, CONVOLUTION, PROJECTIONS, TwoPathLayer
from acmix_mm.layers.point_attention import PointAttention, softmax
from acmix_mm.layers.shift_path import FullyConnected, Shifts


class GlobalACmix(TwoPathLayer):
    """Attention over the whole map and a 3×3 convolution, on the same queries, keys and values.

    Maps (batch, embed_dims, height, width) to the same shape.
    """

    parameter_classes: ClassVar = {**TwoPathLayer.parameter_classes, 'qkv': PROJECTIONS}

    def __init__(self, embed_dims: int, num_heads: int, mix: str = 'acmix',
                 combine: str = 'rates') -> None:
        super().__init__(mix, combine)
        self.heads = (3, num_heads, embed_dims // num_heads)
        self.qkv = nn.Conv2d(embed_dims, 3 * embed_dims, 1)
        if self.convolves:
            self.fc = FullyConnected(3 * num_heads, kernel_size=3, bias=False)
            self.dep_conv = Shifts(self.heads[2], num_heads, 3)
        self.add_rates()

    def project(self, x: Tensor) -> tuple[Tensor]:
        return self.qkv(x).unflatten(1, self.heads),

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.flatten(4).transpose(3, 4).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        out = out.flatten(1, 2).unflatten(2, qkv.shape[4:])
        return out if self.attention_rate is None else self.attention_rate * out

    def convolve(self, qkv: Tensor) -> Tensor:
        return self.shift_and_sum(qkv.flatten(1, 2))

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        positions, channels, area = x[:, 0].numel(), x.shape[1], x[0, 0].numel()
        counts = {PROJECTIONS: 3 * positions * channels**2}
        if self.attends:
            counts[ATTENTION] = 2 * positions * area * channels
        if self.convolves:
            counts[CONVOLUTION] = self.shift_multiply_adds(3 * positions * channels, positions)
        return counts

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        q, k, _ = self.qkv(x)[0].unflatten(0, self.heads).unbind(0)
        logits = self.heads[2]**-0.5 * torch.einsum('nd,ndrc->nrc', q[:, :, row, column], k)
        return PointAttention(softmax(logits), 1, logits[0].numel(), True)
