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
    height, width = q.shape[-2:]
    q = (q[..., ::stride, ::stride] * scale).permute(0, 3, 4, 1, 2)
    # A tile's surroundings grow with the dilation; larger tiles share them among more queries.
    tile = 8 if dilation == 1 else 16
    grid = tuple(-(-extent // tile) for extent in q.shape[1:3])
    reach = dilation * (kernel_size // 2)
    rows, columns = (
        mirrored(-reach, (tiles * tile - 1) * stride + reach + 1, extent, q.device)
        for tiles, extent in zip(grid, (height, width)))
    keys, values = (maps.permute(0, 3, 4, 1, 2)[:, rows][:, :, columns]
                    for maps in (k - positions, v))
    bottom, right = (tiles * tile - extent for tiles, extent in zip(grid, q.shape[1:3]))
    queries = F.pad(q, (0, 0, 0, 0, 0, right, 0, bottom))
    out = _TiledAttention.apply(queries, keys, values, tile, kernel_size, stride, dilation)
    return out[:, :q.shape[1], :q.shape[2]].permute(0, 3, 4, 1, 2)


class _TiledAttention(torch.autograd.Function):
    """Attention from tiles of queries to their surroundings, one row of tiles at a time.

    Nothing is kept for the backward pass but the inputs: the weights are computed again.

    queries: (batch, tile rows · tile, tile columns · tile, num_heads, head_dims), scaled.
    keys, values: (batch, rows, columns, num_heads, head_dims), with the border in place.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, tile: int,
                kernel_size: int, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(queries, keys, values)
        ctx.geometry = tile, kernel_size, stride, dilation
        tiles = _Tiles(*ctx.geometry, queries)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for row in range(queries.shape[1] // tile):
            weights = tiles.weights(tiles.own(queries, row), tiles.around(keys, row))
            tiles.put(torch.bmm(weights, tiles.around(values, row)), out, row)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        queries, keys, values = ctx.saved_tensors
        tiles = _Tiles(*ctx.geometry, queries)
        grad_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        for row in range(queries.shape[1] // ctx.geometry[0]):
            own, around = tiles.own(queries, row), tiles.around(keys, row)
            own_grad = tiles.own(grad_out, row)
            weights = tiles.weights(own, around)
            tiles.add(torch.bmm(weights.transpose(1, 2), own_grad), grad_values, row)
            grad = torch.bmm(own_grad, tiles.around(values, row).transpose(1, 2))
            # The gradient of softmax: weights · (grad − its weighted mean).
            grad = grad.sub_((grad * weights).sum(2, keepdim=True)).mul_(weights)
            tiles.put(torch.bmm(grad, around), grad_queries, row)
            tiles.add(torch.bmm(grad.transpose(1, 2), own), grad_keys, row)
        return grad_queries, grad_keys, grad_values, None, None, None, None


class _Tiles:
    """Moving one row of tiles between maps and stacks of small matrices.

    Maps are (batch, rows, columns, num_heads, head_dims); matrices are (batch · tile columns ·
    num_heads, positions, head_dims).
    """

    def __init__(self, tile: int, kernel_size: int, stride: int, dilation: int,
                 queries: Tensor) -> None:
        self.tile = tile
        self.step = tile * stride
        self.span = (tile - 1) * stride + dilation * (kernel_size - 1) + 1
        self.batch, self.columns, self.num_heads, self.head_dims = (
            queries.shape[0], queries.shape[2] // tile, *queries.shape[3:])
        offset = (torch.arange(self.span, device=queries.device) -
                  stride * torch.arange(tile, device=queries.device)[:, None])
        near = (offset % dilation == 0) & (offset >= 0) & (offset <= dilation * (kernel_size - 1))
        unseen = ~(near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
        self.mask = torch.zeros(unseen.shape, dtype=queries.dtype, device=queries.device)
        self.mask.masked_fill_(unseen, -torch.inf)

    def weights(self, own: Tensor, around: Tensor) -> Tensor:
        """Softmax weights from a tile's queries to its surroundings."""
        logits = torch.baddbmm(self.mask, own, around.transpose(1, 2))
        return logits.softmax(2)

    def own(self, maps: Tensor, row: int) -> Tensor:
        """The tiles themselves, as matrices."""
        rows = maps[:, row * self.tile:(row + 1) * self.tile]
        tiles = rows.unflatten(2, (self.columns, self.tile)).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(-1, self.tile**2, self.head_dims)

    def put(self, matrices: Tensor, maps: Tensor, row: int) -> None:
        """Write the tiles back; the inverse of :meth:`own`."""
        tiles = matrices.view(self.batch, self.columns, self.num_heads, self.tile, self.tile,
                              self.head_dims)
        rows = maps[:, row * self.tile:(row + 1) * self.tile]
        rows.unflatten(2, (self.columns, self.tile)).copy_(tiles.permute(0, 3, 1, 4, 2, 5))

    def around(self, maps: Tensor, row: int) -> Tensor:
        """The surroundings of the tiles, as matrices; neighbouring tiles share positions."""
        rows = maps[:, row * self.step:row * self.step + self.span]
        spans = rows.unfold(2, self.span, self.step).permute(0, 2, 3, 1, 5, 4)
        return spans.reshape(-1, self.span**2, self.head_dims)

    def add(self, matrices: Tensor, maps: Tensor, row: int) -> None:
        """Add surroundings onto the map; the transpose of :meth:`around`."""
        spans = matrices.view(self.batch, self.columns, self.num_heads, self.span, self.span,
                              self.head_dims).permute(0, 3, 1, 2, 5, 4)
        rows = maps[:, row * self.step:row * self.step + self.span]
        # Tiles that are this far apart share no position, and can be added at once.
        apart = -(-self.span // self.step)
        for first in range(min(apart, self.columns)):
            disjoint = rows[:, :, first * self.step:].unfold(2, self.span, apart * self.step)
            disjoint.add_(spans[:, :, first::apart])


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
