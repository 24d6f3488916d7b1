"""Self-attention over each query's own neighbourhood, the attention path of ACmix in a ResNet.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path, local attention with a
k_a × k_a window); the position encoding and the mirrored border are the authors' code's.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forms import named_form
from .softmax import attention_weights, logits_gradient


def sliding_window_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                             kernel_size: int, *, stride: int = 1, dilation: int = 1,
                             scale: Optional[float] = None, form: Optional[str] = None) -> Tensor:
    """Attend from every stride-th position to the kernel_size² positions around it.

    out_i = Σ_j softmax_j(scale · q_i · (k_j + p_i − p_j)) · v_j, j over the neighbourhood of i,
    whose positions lie ``dilation`` apart and are mirrored at the edges of the map.

    Args:
        q: queries, (batch, num_heads, head_dims, height, width), any floating dtype.
        k: keys, of the same shape.
        v: values, of the same shape.
        positions: position encoding p, (head_dims, height, width), shared by all heads.
        kernel_size: side of the neighbourhood, odd.
        stride: distance of the queries that give an output; the others are left out.
        dilation: distance of neighbours.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        form: ``'reference'`` or ``'tiled'``; the latter if None.

    Returns:
        (batch, num_heads, head_dims, ⌈height / stride⌉, ⌈width / stride⌉), in the dtype of ``q``.

    Raises:
        ValueError: the shapes do not fit together, the kernel is even, or there is no such form.
    """
    if q.dim() != 5 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError('sliding_window_attention takes q, k and v of one shape (batch, num_heads,'
                         f' head_dims, height, width), got {tuple(q.shape)}, {tuple(k.shape)} and '
                         f'{tuple(v.shape)}.')
    if positions.shape != q.shape[2:]:
        raise ValueError(f'positions must be of shape {tuple(q.shape[2:])} for these maps, got '
                         f'{tuple(positions.shape)}.')
    if kernel_size % 2 == 0:
        raise ValueError(f'sliding_window_attention takes odd kernels, got one of {kernel_size}.')
    if scale is None:
        scale = q.shape[2]**-0.5
    run = named_form('sliding_window_attention', FORMS, form, 'tiled')
    return run(q, k, v, positions.to(q.dtype), kernel_size, stride, dilation, scale)


def sliding_window_attention_reference(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                                       kernel_size: int, stride: int, dilation: int,
                                       scale: float) -> Tensor:
    """Copy every neighbourhood and follow the equation; see :func:`sliding_window_attention`.

    This is the form of the authors' code: it holds kernel_size² times the maps.
    """
    head_dims, height, width = q.shape[2:]

    def neighbourhoods(maps: Tensor) -> Tensor:
        reach = dilation * (kernel_size // 2)
        rows = mirrored(-reach, height + reach, height, maps.device)
        columns = mirrored(-reach, width + reach, width, maps.device)
        padded = maps.reshape(-1, head_dims, height, width)[..., rows, :][..., columns]
        copies = F.unfold(padded, kernel_size, dilation=dilation, stride=stride)
        return copies.view(*maps.shape[:-2], kernel_size**2, *out.shape[-2:])

    out = q[..., ::stride, ::stride]
    own_positions = positions[:, ::stride, ::stride]
    keys = neighbourhoods(k) + own_positions[:, None] - neighbourhoods(positions)
    logits = ((scale * out).unsqueeze(3) * keys).sum(2)
    weights = logits.softmax(2)
    return (weights.unsqueeze(2) * neighbourhoods(v)).sum(3)


def sliding_window_attention_tiled(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                                   kernel_size: int, stride: int, dilation: int,
                                   scale: float) -> Tensor:
    """Cut the queries into tiles, and attend from each densely to all keys that it can see.

    q_i · p_i is the same for all neighbours of i, and softmax cancels it: what is left is plain
    attention on the keys k − p. A tile and its surroundings are small matrices; pairs that are
    not neighbours are masked. That is several times the arithmetic, all of it in matrix products,
    and no copy of the maps for every neighbour.
    """
    maps = (each.permute(0, 3, 4, 1, 2) for each in (q, k, v))
    geometry = kernel_size, stride, dilation, scale
    out = _TiledAttention.apply(*maps, positions.permute(1, 2, 0), *geometry)
    return out.permute(0, 3, 4, 1, 2)


class _TiledAttention(torch.autograd.Function):
    """Attention from tiles of queries to their surroundings, one row of tiles at a time.

    Nothing is kept for the backward pass but the inputs: the weights are computed again.
    q, k, v: (batch, height, width, num_heads, head_dims); positions: (height, width, head_dims).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kernel_size: int,
                stride: int, dilation: int, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, positions)
        ctx.geometry = kernel_size, stride, dilation
        ctx.scale = scale
        tiles = _Tiles(q, *ctx.geometry)
        out = q.new_empty(tiles.out_shape)
        for row in range(tiles.rows):
            own = tiles.own(q, row, stride) * scale
            weights = attention_weights(own, tiles.around(k, row, positions), tiles.mask)
            tiles.put(torch.bmm(weights, tiles.around(v, row)), out, row)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        q, k, v, positions = ctx.saved_tensors
        stride = ctx.geometry[1]
        tiles = _Tiles(q, *ctx.geometry)
        grad_q, grad_k, grad_v = (torch.zeros(q.shape, dtype=q.dtype, device=q.device)
                                  for _ in range(3))
        for row in range(tiles.rows):
            own = tiles.own(q, row, stride) * ctx.scale
            around = tiles.around(k, row, positions)
            own_grad = tiles.own(grad_out, row)
            weights = attention_weights(own, around, tiles.mask)
            tiles.add(torch.bmm(weights.transpose(1, 2), own_grad), grad_v, row)
            grad = torch.bmm(own_grad, tiles.around(v, row).transpose(1, 2))
            grad = logits_gradient(grad, weights)
            tiles.put(torch.bmm(grad, around).mul_(ctx.scale), grad_q[:, ::stride, ::stride], row)
            tiles.add(torch.bmm(grad.transpose(1, 2), own), grad_k, row)
        grad_positions = -grad_k.sum((0, 3)) if ctx.needs_input_grad[3] else None
        return grad_q, grad_k, grad_v, grad_positions, None, None, None, None


class _Tiles:
    """Moving one row of tiles between maps and stacks of small matrices.

    Maps are (batch, height, width, num_heads, head_dims); matrices are (batch · tile columns ·
    num_heads, positions, head_dims).
    """

    def __init__(self, q: Tensor, kernel_size: int, stride: int, dilation: int) -> None:
        self.batch, self.height, self.width, self.num_heads, self.head_dims = q.shape
        self.out_shape = (self.batch, -(-self.height // stride), -(-self.width // stride),
                          self.num_heads, self.head_dims)
        # A tile's surroundings grow with the dilation; larger tiles share them among more queries.
        self.tile = 8 if dilation == 1 else 16
        self.rows, self.columns = (-(-extent // self.tile) for extent in self.out_shape[1:3])
        self.step = self.tile * stride
        self.span = (self.tile - 1) * stride + dilation * (kernel_size - 1) + 1
        self.reach = dilation * (kernel_size // 2)
        self.padded_width = max((self.columns - 1) * self.step + self.span,
                                self.reach + self.width)
        self.borders = slice(0, self.reach), slice(self.reach + self.width, None)
        self.row_index = mirrored(-self.reach, (self.rows - 1) * self.step + self.span - self.reach,
                                  self.height, q.device)
        self.column_index = mirrored(-self.reach, self.padded_width - self.reach, self.width,
                                     q.device)
        offset = (torch.arange(self.span, device=q.device) -
                  stride * torch.arange(self.tile, device=q.device)[:, None])
        near = (offset % dilation == 0) & (offset >= 0) & (offset <= dilation * (kernel_size - 1))
        unseen = ~(near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
        self.mask = torch.zeros(unseen.shape, dtype=q.dtype, device=q.device)
        self.mask.masked_fill_(unseen, -torch.inf)

    def own(self, maps: Tensor, row: int, stride: int = 1) -> Tensor:
        """The tiles themselves, as matrices; zero where they reach over the edge."""
        rows = maps[:, ::stride, ::stride][:, row * self.tile:(row + 1) * self.tile]
        bottom, right = self.tile - rows.shape[1], self.columns * self.tile - rows.shape[2]
        rows = F.pad(rows, (0, 0, 0, 0, 0, right, 0, bottom))
        tiles = rows.unflatten(2, (self.columns, self.tile)).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(-1, self.tile**2, self.head_dims)

    def put(self, matrices: Tensor, maps: Tensor, row: int) -> None:
        """Write the tiles back; the inverse of :meth:`own`."""
        tiles = matrices.view(self.batch, self.columns, self.num_heads, self.tile, self.tile,
                              self.head_dims)
        rows = maps[:, row * self.tile:(row + 1) * self.tile]
        whole = tiles.permute(0, 3, 1, 4, 2, 5).flatten(2, 3)
        rows.copy_(whole[:, :rows.shape[1], :rows.shape[2]])

    def around(self, maps: Tensor, row: int, positions: Optional[Tensor] = None) -> Tensor:
        """The surroundings of the tiles, as matrices; neighbouring tiles share positions.

        ``positions`` are subtracted, if given.
        """
        top = row * self.step - self.reach
        if top >= 0 and top + self.span <= self.height:
            which = slice(top, top + self.span)
        else:
            which = self.row_index[row * self.step:row * self.step + self.span]
        rows = maps[:, which]
        if positions is not None:
            rows = rows - positions[which].unsqueeze(2)
        left, right = (rows[:, :, self.column_index[border]] for border in self.borders)
        rows = torch.cat([left, rows, right], 2)
        spans = rows.unfold(2, self.span, self.step).permute(0, 2, 3, 1, 5, 4)
        return spans.reshape(-1, self.span**2, self.head_dims)

    def add(self, matrices: Tensor, maps: Tensor, row: int) -> None:
        """Add surroundings onto the map; the transpose of :meth:`around`."""
        spans = matrices.view(self.batch, self.columns, self.num_heads, self.span, self.span,
                              self.head_dims).permute(0, 3, 1, 2, 5, 4)
        rows = maps.new_zeros(self.batch, self.span, self.padded_width, self.num_heads,
                              self.head_dims)
        # Tiles that are this far apart share no position, and can be added at once.
        apart = -(-self.span // self.step)
        for first in range(min(apart, self.columns)):
            disjoint = rows[:, :, first * self.step:].unfold(2, self.span, apart * self.step)
            disjoint.add_(spans[:, :, first::apart])
        inner = slice(self.reach, self.reach + self.width)
        folded = rows[:, :, inner].contiguous()
        for border in self.borders:
            folded.index_add_(2, self.column_index[border], rows[:, :, border])
        index = self.row_index[row * self.step:row * self.step + self.span]
        maps.index_add_(1, index, folded)


def mirrored(start: int, stop: int, extent: int, device: torch.device) -> Tensor:
    """Positions start … stop − 1 folded back into an axis of ``extent``, as often as it takes.

    As reflection padding does, the edge itself is not repeated; an axis of one has only that.
    """
    period = max(2 * (extent - 1), 1)
    position = torch.arange(start, stop, device=device) % period
    return torch.minimum(position, period - position) if extent > 1 else position


FORMS = {
    'reference': sliding_window_attention_reference,
    'tiled': sliding_window_attention_tiled,
}
