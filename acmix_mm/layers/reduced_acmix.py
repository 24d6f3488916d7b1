"""ACmix in a PVT host: attention to a spatially reduced map and convolution."""

from collections.abc import Sequence
from typing import Callable, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import (
    ATTENTION,
    CONVOLUTION,
    PROJECTIONS,
    TwoPathLayer,
    check_positive,
    scaled_linear,
    split_heads,
)
from acmix_mm.layers.point_attention import PointAttention, softmax
from acmix_mm.layers.shift_path import FullyConnected, Shifts
from acmix_mm.ops import linear


class ReducedACmix(TwoPathLayer):
    """Attention to a reduced map and a 3×3 convolution on the same queries, keys and values.

    Papers: arXiv 2111.14556, section 4.1, and arXiv 2102.12122, section 3.3 (spatial-reduction
    attention); out = rate1 · out_proj(attention) + rate2 · convolution. Queries come from the full
    map, keys and values from the map that a strided convolution ``sr`` reduces by ``sr_ratio``.
    The convolution path needs all three on the full map, so each position reads the keys and
    values of its cell in the reduced map.

    Maps (batch, height, width, embed_dims) of any size to the same shape and dtype.

    The authors of ACmix published no code for PVT. This design was chosen to match their published
    counts; :class:`acmix_mm.backbones.ACmixPyramidVisionTransformer` lists the alternatives. As in
    their Swin, the fc has a bias and the convolution path has no projection of its own.

    Parameters of the attention path are named as in MMDetection: ``attn.in_proj_weight``,
    ``attn.in_proj_bias``, ``attn.out_proj``, ``sr``, ``norm``; those of the convolution path as in
    the authors' code: ``fc``, ``dep_conv``, ``rate1``, ``rate2``.

    Args:
        embed_dims: channels of the map.
        num_heads: number of attention heads; divides ``embed_dims``.
        sr_ratio: side of the cells that are reduced to one key and value.
        qkv_bias: whether q, k, v and the output projection have a bias.
        attn_drop_rate: dropout rate of the attention weights.
        proj_drop_rate: dropout rate of the output.
        norm: builds the norm of the reduced map from its number of channels.
        mix: see :class:`acmix_mm.layers.base.TwoPathLayer`.
        combine: see the same class.
        shift: see :class:`acmix_mm.layers.shift_path.Shifts`.
        shift_groups: see the same class.

    Raises:
        ValueError: an argument is invalid.
    """

    channels_last = True
    parameter_classes: ClassVar[dict[str, str]] = {
        **TwoPathLayer.parameter_classes,
        'attn': PROJECTIONS, 'sr': PROJECTIONS, 'norm': PROJECTIONS}

    def __init__(self, embed_dims: int, num_heads: int, sr_ratio: int = 1, qkv_bias: bool = True,
                 attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 norm: Callable[[int], nn.Module] = nn.LayerNorm, mix: str = 'acmix',
                 combine: str = 'rates', shift: str = 'learned',
                 shift_groups: Optional[int] = None) -> None:
        super().__init__(mix, combine)
        self.num_heads = num_heads
        self.head_dims = split_heads('embed_dims', embed_dims, num_heads)
        check_positive('sr_ratio', sr_ratio)
        self.sr_ratio = sr_ratio
        self.attn_drop_rate = attn_drop_rate

        self.attn = AttentionProjections(embed_dims, qkv_bias, project_out=self.attends)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, stride=sr_ratio)
            self.norm = norm(embed_dims)
        if self.convolves:
            self.fc = FullyConnected(3 * num_heads, kernel_size=3, bias=True)
            self.dep_conv = Shifts(self.head_dims, num_heads, 3, shift, shift_groups)
        self.add_rates()
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries (batch, height, width, channels), and keys and values of the reduced map,
        (batch, rows, columns, 2 · channels).
        """
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        channels = x.shape[3]
        bias_q, bias_kv = (None, None) if bias is None else bias.split((channels, 2 * channels))
        q = linear(x, weight[:channels], bias_q)
        return q, linear(self.reduce(x), weight[channels:], bias_kv)

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce (batch, height, width, channels) by ``sr_ratio`` along both axes, rounding down.

        A map smaller than one cell is padded with zeros to one.
        """
        if self.sr_ratio == 1:
            return x
        bottom, right = (max(self.sr_ratio - extent, 0) for extent in x.shape[1:3])
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dims)
        queries = q.flatten(1, 2).unflatten(2, heads).transpose(1, 2)
        keys, values = kv.flatten(1, 2).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0)
        out = out.transpose(1, 2).reshape(q.shape)
        return scaled_linear(self.attention_rate, out, self.attn.out_proj)

    def convolve(self, q: Tensor, kv: Tensor) -> Tensor:
        qkv = torch.cat([q, repeat_cells(kv, q.shape[1:3], self.sr_ratio)], 3)
        maps = qkv.unflatten(3, (3 * self.num_heads, self.head_dims)).permute(0, 3, 4, 1, 2)
        return self.shift_and_sum(maps).permute(0, 2, 3, 1)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        return self.proj_drop(out)

    def multiply_adds(self, x: Tensor, out: Tensor) -> dict[str, int]:
        """Each position attends to all cells of the reduced map.

        The fc is linear, so keys and values count once per cell, not once per position.
        """
        batch, height, width, channels = x.shape
        positions = batch * height * width
        cells = max(height // self.sr_ratio, 1) * max(width // self.sr_ratio, 1)
        projected = positions + 2 * batch * cells
        counts = {PROJECTIONS: projected * channels**2}
        if self.sr_ratio > 1:
            counts[PROJECTIONS] += batch * cells * self.sr_ratio**2 * channels**2
        if self.attends:
            counts[PROJECTIONS] += positions * channels**2
            counts[ATTENTION] = 2 * positions * cells * channels
        if self.convolves:
            counts[CONVOLUTION] = self.shift_multiply_adds(projected * channels, positions)
        return counts

    @property
    def min_dynamic_size(self) -> int:
        return 2 * self.sr_ratio

    def point_attention(self, x: Tensor, row: int, column: int) -> PointAttention:
        """softmax(q·k·scale) over the whole reduced map (arXiv 2102.12122, section 3.3)."""
        channels = x.shape[3]
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        bias_q, bias_k, _ = (None,) * 3 if bias is None else bias.split(channels)
        heads = (self.num_heads, self.head_dims)
        q = F.linear(x[0, row, column], weight[:channels], bias_q).unflatten(0, heads)
        k = F.linear(self.reduce(x)[0], weight[channels:2 * channels], bias_k).unflatten(2, heads)
        logits = self.head_dims**-0.5 * torch.einsum('nd,rcnd->nrc', q, k)
        return PointAttention(softmax(logits), self.sr_ratio, logits[0].numel(), True)


class AttentionProjections(nn.Module):
    """The projections of attention, with the parameter names of ``nn.MultiheadAttention``.

    Args:
        embed_dims: channels.
        bias: whether the projections have a bias.
        project_out: whether to build the output projection.
    """

    def __init__(self, embed_dims: int, bias: bool, project_out: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dims, embed_dims))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dims)) if bias else None
        if project_out:
            self.out_proj = nn.Linear(embed_dims, embed_dims, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the projections of q, k and v as ``nn.MultiheadAttention`` does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)


def repeat_cells(reduced: Tensor, size: Sequence[int], ratio: int) -> Tensor:
    """Copy the values of each cell to all positions of the map that it was reduced from.

    Args:
        reduced: (batch, rows, columns, channels), one position per cell.
        size: (height, width) of the map. Positions at the bottom and right that the reduction left
            out take the values of the nearest cell.
        ratio: side of a cell.

    Returns:
        (batch, height, width, channels).
    """
    if ratio == 1:
        return reduced
    for axis, extent in zip((1, 2), size):
        cell = torch.arange(extent, device=reduced.device) // ratio
        reduced = reduced.index_select(axis, cell.clamp_(max=reduced.shape[axis] - 1))
    return reduced
