"""ACmix in a PVT host: attention to a spatially reduced map beside the convolution path."""

from typing import Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers.base import FullyConnected, Shifts, TwoPaths, scaled


class ReducedACmix(TwoPaths):
    """Mix attention to a reduced map with a 3×3 convolution over the same queries, keys, values.

    Papers: arXiv 2111.14556, section 4.1, and arXiv 2102.12122, section 3.3 (spatial-reduction
    attention); out = rate1 · out_proj(attention) + rate2 · convolution. Queries are of the full
    map; keys and values are of the map that a strided convolution ``sr`` has reduced by
    ``sr_ratio``. The convolution path needs all three on the full map: there each position takes
    the keys and values of the cell that it was reduced into.

    The authors of ACmix published no code for PVT. This form is this project's choice, by their
    published counts; :class:`acmix_mm.backbones.ACmixPyramidVisionTransformer` says what else was
    counted. That the fc has a bias, and the convolution path no projection of its own, is taken
    from their Swin.

    Parameters of the attention path have MMDetection's names: ``attn.in_proj_weight``,
    ``attn.in_proj_bias``, ``attn.out_proj``, ``sr``, ``norm``; those of the convolution path the
    authors': ``fc``, ``dep_conv``, ``rate1``, ``rate2``.

    Args:
        embed_dims: channels of the map.
        num_heads: attention heads; divides ``embed_dims``.
        sr_ratio: side of the cells that keys and values are reduced into.
        qkv_bias: whether q, k, v and the output projection have a bias.
        attn_drop_rate: dropout of the attention weights.
        proj_drop_rate: dropout of the output.
        norm: makes the norm of the reduced map from its channels.
        mix: ``'acmix'`` for both paths; ``'attn'`` or ``'conv'`` builds that path alone, and no
            rates.
        combine: how the paths are added; see :class:`acmix_mm.layers.base.TwoPaths`.
        shift: how the convolution path shifts; see :class:`acmix_mm.layers.base.Shifts`.
        shift_groups: groups of its kernels: one for every head (None), or 1.

    Raises:
        ValueError: an argument is outside of what is said above.
    """

    def __init__(self, embed_dims: int, num_heads: int, sr_ratio: int = 1, qkv_bias: bool = True,
                 attn_drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 norm: Callable[[int], nn.Module] = nn.LayerNorm, mix: str = 'acmix',
                 combine: str = 'rates', shift: str = 'learned',
                 shift_groups: Optional[int] = None) -> None:
        super().__init__()
        self.set_paths(mix, combine)
        if embed_dims % num_heads:
            raise ValueError(f'num_heads must divide embed_dims, got {num_heads} heads for '
                             f'{embed_dims} channels.')
        self.num_heads = num_heads
        self.head_dims = embed_dims // num_heads
        self.sr_ratio = sr_ratio
        self.attn_drop_rate = attn_drop_rate

        self.attn = AttentionProjections(embed_dims, qkv_bias, project_out=mix != 'conv')
        if sr_ratio > 1:
            self.sr = nn.Conv2d(embed_dims, embed_dims, sr_ratio, stride=sr_ratio)
            self.norm = norm(embed_dims)
        if mix != 'attn':
            self.fc = FullyConnected(3 * num_heads, kernel_size=3, bias=True)
            self.dep_conv = Shifts(self.head_dims, num_heads, 3, shift, shift_groups)
        self.add_rates()
        self.proj_drop = nn.Dropout(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, height, width, embed_dims) to the same shape and dtype, at any size."""
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        channels = x.shape[3]
        bias_q, bias_kv = (None, None) if bias is None else bias.split((channels, 2 * channels))
        q = F.linear(x, weight[:channels], bias_q)
        kv = F.linear(self.reduce(x), weight[channels:], bias_kv)

        if self.mix != 'conv':
            out = attention = self.attend(q, kv)
        if self.mix != 'attn':
            out = convolution = self.convolve(q, kv)
        if self.mix == 'acmix':
            out = attention + convolution
        return self.proj_drop(out)

    def reduce(self, x: Tensor) -> Tensor:
        """Reduce (batch, height, width, channels) by ``sr_ratio`` along both axes, rounding down.

        What is smaller than one cell is padded with zeros to one.
        """
        if self.sr_ratio == 1:
            return x
        bottom, right = (max(self.sr_ratio - extent, 0) for extent in x.shape[1:3])
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """The attention path, times its rate: queries (batch, height, width, channels), and keys
        and values of the reduced map, (batch, …, 2 · channels), to channels.
        """
        heads = (self.num_heads, self.head_dims)
        queries = q.flatten(1, 2).unflatten(2, heads).transpose(1, 2)
        keys, values = kv.flatten(1, 2).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.attn_drop_rate if self.training else 0.0)
        out = out.transpose(1, 2).reshape(q.shape)
        # The rate scales the small weight in place of the map.
        rate, out_proj = self.attention_rate, self.attn.out_proj
        return F.linear(out, scaled(rate, out_proj.weight), scaled(rate, out_proj.bias))

    def convolve(self, q: Tensor, kv: Tensor) -> Tensor:
        """The convolution path, times its rate, on what :meth:`attend` takes."""
        qkv = torch.cat([q, spread(kv, q.shape[1:3], self.sr_ratio)], 3)
        maps = qkv.unflatten(3, (3 * self.num_heads, self.head_dims)).permute(0, 3, 4, 1, 2)
        return self.shift_and_sum(maps).permute(0, 2, 3, 1)


class AttentionProjections(nn.Module):
    """Projections into q, k, v and out of attention, named as in ``nn.MultiheadAttention``.

    Args:
        embed_dims: channels of all of them.
        bias: whether they have a bias.
        project_out: whether to build the one out of attention.
    """

    def __init__(self, embed_dims: int, bias: bool, project_out: bool) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dims, embed_dims))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dims)) if bias else None
        if project_out:
            self.out_proj = nn.Linear(embed_dims, embed_dims, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the projections into q, k, v as ``nn.MultiheadAttention`` does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)


def spread(reduced: Tensor, size: tuple[int, int], ratio: int) -> Tensor:
    """Give every position of a map the values of the cell that it was reduced into.

    Args:
        reduced: (batch, rows, columns, channels), one position for each cell.
        size: (height, width) of the map. What the reduction left out at its bottom and right
            takes the values of the nearest cell.
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
