"""Self-attention over each query's own neighbourhood, the attention path of ACmix in a ResNet.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path, local attention with a
k_a × k_a window); the position encoding and the mirrored border are the authors' code's.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from acmix_mm.ops.backend import (
    Backend,
    register_backends,
    require_triton,
    runs_triton,
    select_backend,
    triton_unavailable,
)
from acmix_mm.ops.caching import cached_by_size
from acmix_mm.ops.custom_op import custom_op
from acmix_mm.ops.reflection import reflect, reflected_range
from acmix_mm.ops.softmax import attention_weights, logits_gradient
from acmix_mm.ops.symbolic import divide

# 2 MiB in float32.
LOGITS_AT_ONCE = 2**19


def sliding_window_attention(qkv: Tensor, positions: Tensor, kernel_size: int, *, stride: int = 1,
                             dilation: int = 1, scale: Optional[float] = None,
                             backend: Optional[str] = None) -> Tensor:
    """Attend from every stride-th position to the kernel_size² positions around it.

    out_i = Σ_j softmax_j(scale · q_i · (k_j + p_i − p_j)) · v_j, j over the neighbourhood of i,
    whose positions lie ``dilation`` apart and are mirrored at the edges of the map.

    Args:
        qkv: queries, keys and values, (batch, height, width, 3, num_heads, head_dims), any
            floating dtype and strides.
        positions: position encoding p, (height, width, head_dims), shared by all heads.
        kernel_size: side of the neighbourhood, odd.
        stride: distance of the queries that give an output; the others are left out.
        dilation: distance of neighbours.
        scale: factor of the logits; ``head_dims ** -0.5`` if None.
        backend: ``'reference'``, ``'tiled'``, ``'dense'`` or ``'triton'``; if None the last on a
            GPU that can run it, ``'dense'`` in an export, and else ``'tiled'``.

    Returns:
        (batch, ⌈height / stride⌉, ⌈width / stride⌉, num_heads · head_dims), in the dtype of
        ``qkv``.

    Raises:
        ValueError: the shapes do not fit together, the kernel is even, or there is no such backend.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError('sliding_window_attention takes qkv of shape (batch, height, width, 3, '
                         f'num_heads, head_dims), got {tuple(qkv.shape)}.')
    encoding_shape = (*qkv.shape[1:3], qkv.shape[5])
    if positions.shape != encoding_shape:
        raise ValueError(f'positions must be of shape {encoding_shape} for this map, got '
                         f'{tuple(positions.shape)}.')
    if kernel_size % 2 == 0:
        raise ValueError(f'sliding_window_attention takes odd kernels, got one of {kernel_size}.')
    if scale is None:
        scale = qkv.shape[5]**-0.5
    default = 'triton' if qkv.is_cuda and has_kernel(qkv, stride, dilation) else 'tiled'
    run = select_backend('sliding_window_attention', backend, qkv.device, automatic=default,
                         exporting='dense')
    out = run(qkv, positions.to(qkv.dtype), kernel_size, stride, dilation, scale)
    return out.flatten(3)


def sliding_window_attention_reference(qkv: Tensor, positions: Tensor, kernel_size: int,
                                       stride: int, dilation: int, scale: float) -> Tensor:
    """Copy every neighbourhood and follow the equation; see :func:`sliding_window_attention`.

    This is the form of the authors' code: it holds kernel_size² times the maps. The output is
    (batch, out height, out width, num_heads, head_dims), of every form.
    """
    q, k, v = qkv.permute(3, 0, 4, 5, 1, 2)
    positions = positions.permute(2, 0, 1)
    head_dims, height, width = positions.shape

    def neighbourhoods(maps: Tensor) -> Tensor:
        reach = dilation * (kernel_size // 2)
        rows = reflected_range(-reach, height + reach, height, maps.device)
        columns = reflected_range(-reach, width + reach, width, maps.device)
        padded = maps.reshape(-1, head_dims, height, width)[..., rows, :][..., columns]
        copies = F.unfold(padded, kernel_size, dilation=dilation, stride=stride)
        return copies.view(*maps.shape[:-2], kernel_size**2, *own.shape[-2:])

    own = q[..., ::stride, ::stride]
    own_positions = positions[:, ::stride, ::stride]
    keys = neighbourhoods(k) + own_positions[:, None] - neighbourhoods(positions)
    logits = ((scale * own).unsqueeze(3) * keys).sum(2)
    weights = logits.softmax(2)
    out = (weights.unsqueeze(2) * neighbourhoods(v)).sum(3)
    return out.permute(0, 3, 4, 1, 2)


def sliding_window_attention_tiled(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                                   dilation: int, scale: float) -> Tensor:
    """Cut the queries into tiles, and attend from each densely to all keys that it can see.

    q_i · p_i is the same for all neighbours of i, and softmax cancels it: what is left is plain
    attention on the keys k − p. A tile and its surroundings are small matrices; pairs that are
    not neighbours are masked. That is several times the arithmetic, all of it in matrix products,
    and no copy of the maps for every neighbour.
    """
    return _TiledAttention.apply(qkv, positions, kernel_size, stride, dilation, scale)


def sliding_window_attention_at_once(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                                     dilation: int, scale: float) -> Tensor:
    """Do as the tiled form does for all tiles of the map at once, in torch's own operations.

    It holds the logits of the whole map, masked pairs included.
    """
    q, k, v = qkv.unbind(3)
    batch, height, width = q.shape[:3]
    tile, span = tile_and_span(kernel_size, stride, dilation)
    out_height, out_width = ((extent + stride - 1) // stride for extent in (height, width))
    rows, columns = ((extent + tile - 1) // tile for extent in (out_height, out_width))

    def of_tiles(side: int, step: int, before: int) -> Tensor:
        # All tiles along one axis: torch.export takes an axis of length one for a case of its own,
        # and one of rows or columns of tiles may be that.
        tiles, place = divide(torch.arange(rows * columns * side**2, device=qkv.device), side**2)
        row, column = (
            reflect(tile * stride * which + step * offset - before, extent)
            for which, offset, extent in zip(
                divide(tiles, columns), divide(place, side), (height, width)))
        return row * width + column

    def matrices(maps: Tensor, index: Tensor, area: int) -> Tensor:
        taken = maps.flatten(1, 2).index_select(1, index).flatten(0, 1)
        return taken.unflatten(0, (batch * rows * columns, area)).transpose(1, 2)

    around = of_tiles(span, 1, dilation * (kernel_size // 2))
    mask = tile_mask(tile, span, kernel_size, stride, dilation, qkv.dtype, qkv.device)
    out = F.scaled_dot_product_attention(
        matrices(q, of_tiles(tile, stride, 0), tile**2),
        matrices(k - positions.unsqueeze(2), around, span**2), matrices(v, around, span**2), mask,
        scale=scale)
    out = out.transpose(1, 2).flatten(0, 1).unflatten(0, (batch, rows * columns * tile**2))
    row, column = divide(torch.arange(out_height * out_width, device=out.device), out_width)
    (row, down), (column, across) = divide(row, tile), divide(column, tile)
    out = out.index_select(1, (row * columns + column) * tile**2 + down * tile + across)
    return out.unflatten(1, (out_height, out_width))


def sliding_window_attention_triton(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int,
                                    dilation: int, scale: float) -> Tensor:
    """Do as the tiled form does, a tile and its softmax at a time, in kernels for NVIDIA GPUs."""
    require_triton('sliding_window_attention', qkv)
    if not has_kernel(qkv, stride, dilation):
        raise ValueError("sliding_window_attention's backend 'triton' takes stride or dilation, "
                         'not both, and heads of 512 bytes at most; got '
                         f'stride={stride}, dilation={dilation} and {qkv.shape[5]} channels of '
                         f'{qkv.dtype}. Leave out backend to have one chosen.')
    return _TritonAttention.apply(qkv, positions, kernel_size, stride, dilation, scale)


def has_kernel(qkv: Tensor, stride: int, dilation: int) -> bool:
    """Whether Triton's kernels are written for this case, on a machine that runs them."""
    if not runs_triton(qkv) or (stride > 1 and dilation > 1):
        return False
    from acmix_mm.ops.sliding_attention.triton_kernels import fits
    return fits(qkv.shape[5], qkv.dtype)


class _TiledAttention(torch.autograd.Function):
    """Attention from tiles of queries to their surroundings, a block of tiles at a time.

    Nothing is kept for the backward pass but the inputs: the weights are computed again.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, positions: Tensor, *geometry: Any) -> Tensor:
        ctx.save_for_backward(qkv, positions)
        ctx.geometry = geometry
        return attend_tiled(qkv, positions, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grad_qkv = attend_tiled_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        return grad_qkv, positions_gradient(ctx, grad_qkv), None, None, None, None


def positions_gradient(ctx: Any, grad_qkv: Tensor) -> Optional[Tensor]:
    """The positions were subtracted from the keys of all heads alike."""
    return -grad_qkv[:, :, :, 1].sum((0, 3)) if ctx.needs_input_grad[1] else None


def _empty_attended(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                    scale: float) -> Tensor:
    return qkv.new_empty(qkv[:, ::stride, ::stride, 0].shape)


def _empty_gradient(grad_out: Tensor, qkv: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(qkv)


@custom_op(_empty_attended)
def attend_tiled(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                 scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    out = q.new_empty(q[:, ::stride, ::stride].shape)
    for tiles in blocks_of_tiles(q, kernel_size, stride, dilation):
        own = tiles.own(q[:, ::stride, ::stride]) * scale
        weights = attention_weights(own, tiles.around(k, positions), tiles.mask)
        tiles.put(torch.bmm(weights, tiles.around(v)), out)
    return out


@custom_op(_empty_gradient)
def attend_tiled_backward(grad_out: Tensor, qkv: Tensor, positions: Tensor, kernel_size: int,
                          stride: int, dilation: int, scale: float) -> Tensor:
    q, k, v = qkv.unbind(3)
    # Tiles share keys, and the border shows some again and again: half precision would not do.
    grad_qkv = torch.zeros_like(qkv, dtype=torch.promote_types(qkv.dtype, torch.float32))
    grad_q, grad_k, grad_v = grad_qkv.unbind(3)
    for tiles in blocks_of_tiles(q, kernel_size, stride, dilation):
        own = tiles.own(q[:, ::stride, ::stride]) * scale
        around = tiles.around(k, positions)
        own_grad = tiles.own(grad_out)
        weights = attention_weights(own, around, tiles.mask)
        tiles.add(torch.bmm(weights.transpose(1, 2), own_grad), grad_v)
        grad = torch.bmm(own_grad, tiles.around(v).transpose(1, 2))
        grad = logits_gradient(grad, weights)
        tiles.put(torch.bmm(grad, around).mul_(scale), grad_q[:, ::stride, ::stride])
        tiles.add(torch.bmm(grad.transpose(1, 2), own), grad_k)
    return grad_qkv.to(qkv.dtype)


class _TritonAttention(torch.autograd.Function):
    """The same in kernels; the softmax's sums are kept, (batch, height, width, num_heads)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, positions: Tensor, *geometry: Any) -> Tensor:
        out, log_sum = attend_triton(qkv, positions, *geometry)
        ctx.save_for_backward(qkv, positions, out, log_sum)
        ctx.geometry = geometry
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grad_qkv = attend_triton_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        return grad_qkv, positions_gradient(ctx, grad_qkv), None, None, None, None


def _empty_attended_and_sums(*inputs: Any) -> tuple[Tensor, Tensor]:
    out = _empty_attended(*inputs)
    return out, out.new_empty(out.shape[:4], dtype=torch.float32)


@custom_op(_empty_attended_and_sums)
def attend_triton(qkv: Tensor, positions: Tensor, kernel_size: int, stride: int, dilation: int,
                  scale: float) -> tuple[Tensor, Tensor]:
    from acmix_mm.ops.sliding_attention.triton_kernels import attend
    out, log_sum = _empty_attended_and_sums(qkv, positions, kernel_size, stride, dilation, scale)
    with torch.cuda.device_of(qkv):
        attend(qkv, positions, out, log_sum, kernel_size, stride, dilation, scale)
    return out, log_sum


@custom_op(_empty_gradient)
def attend_triton_backward(grad_out: Tensor, qkv: Tensor, positions: Tensor, out: Tensor,
                           log_sum: Tensor, kernel_size: int, stride: int, dilation: int,
                           scale: float) -> Tensor:
    from acmix_mm.ops.sliding_attention.triton_kernels import attend_backward
    grad_qkv = torch.zeros_like(qkv) if stride > 1 else torch.empty_like(qkv)
    with torch.cuda.device_of(qkv):
        attend_backward(grad_out, qkv, positions, out, log_sum, grad_qkv, kernel_size, stride,
                        dilation, scale)
    return grad_qkv


def blocks_of_tiles(q: Tensor, kernel_size: int, stride: int, dilation: int) -> Iterator['_Tiles']:
    """All tiles of a map, as many of a row at a time as a processor's cache holds logits of."""
    batch, height, width, num_heads, _ = q.shape
    tile, span = tile_and_span(kernel_size, stride, dilation)
    rows, columns = (-(-extent // (tile * stride)) for extent in (height, width))
    at_once = max(LOGITS_AT_ONCE // (batch * num_heads * tile**2 * span**2), 1)
    mask = tile_mask(tile, span, kernel_size, stride, dilation, q.dtype, q.device)
    down = [Stretch(row, 1, height, tile, stride, span, dilation * (kernel_size // 2), q.device)
            for row in range(rows)]
    across = [Stretch(column, min(at_once, columns - column), width, tile, stride, span,
                      dilation * (kernel_size // 2), q.device)
              for column in range(0, columns, at_once)]
    for stretches in itertools.product(down, across):
        yield _Tiles(q, *stretches, mask)


def tile_and_span(kernel_size: int, stride: int, dilation: int) -> tuple[int, int]:
    """Sides of a tile of queries, and of all that they see."""
    # A tile's surroundings grow with the dilation; larger tiles share them among more queries.
    tile = 8 if dilation == 1 else 16
    return tile, (tile - 1) * stride + dilation * (kernel_size - 1) + 1


class _Tiles:
    """Moving some neighbouring tiles of one row between maps and stacks of small matrices.

    Maps are (batch, height, width, num_heads, head_dims); matrices are (batch · columns ·
    num_heads, positions, head_dims).
    """

    def __init__(self, q: Tensor, down: 'Stretch', across: 'Stretch', mask: Tensor) -> None:
        self.batch, self.num_heads, self.head_dims = q.shape[0], *q.shape[3:]
        self.down, self.across, self.mask = down, across, mask
        self.tile, self.span, self.columns = down.tile, down.span, across.tiles

    def own(self, maps: Tensor) -> Tensor:
        """The tiles themselves, as matrices; zero where they reach over the edge."""
        rows = maps[:, self.down.own, self.across.own]
        bottom, right = self.tile - rows.shape[1], self.columns * self.tile - rows.shape[2]
        if bottom or right:
            rows = F.pad(rows, (0, 0, 0, 0, 0, right, 0, bottom))
        tiles = rows.unflatten(2, (self.columns, self.tile)).permute(0, 2, 4, 1, 3, 5)
        return tiles.reshape(-1, self.tile**2, self.head_dims)

    def put(self, matrices: Tensor, maps: Tensor) -> None:
        """Write the tiles back; the inverse of :meth:`own`."""
        tiles = matrices.view(self.batch, self.columns, self.num_heads, self.tile, self.tile,
                              self.head_dims)
        rows = maps[:, self.down.own, self.across.own]
        whole = tiles.permute(0, 3, 1, 4, 2, 5).flatten(2, 3)
        rows.copy_(whole[:, :rows.shape[1], :rows.shape[2]])

    def around(self, maps: Tensor, positions: Optional[Tensor] = None) -> Tensor:
        """The surroundings of the tiles, as matrices; neighbouring tiles share positions.

        ``positions`` are subtracted, if given.
        """
        where_down, where_across = self.down.where, self.across.where
        if isinstance(where_down, Tensor) and isinstance(where_across, Tensor):
            where_down = where_down[:, None]
        rows = maps[:, where_down, where_across]
        if positions is not None:
            rows = rows - positions[where_down, where_across].unsqueeze(2)
        spans = rows.unfold(2, self.span, self.across.step).permute(0, 2, 3, 1, 5, 4)
        return spans.reshape(-1, self.span**2, self.head_dims)

    def add(self, matrices: Tensor, maps: Tensor) -> None:
        """Add surroundings onto the map; the transpose of :meth:`around`."""
        spans = matrices.view(self.batch, self.columns, self.num_heads, self.span, self.span,
                              self.head_dims).permute(0, 3, 1, 2, 5, 4)
        step, length = self.across.step, self.across.length
        rows = maps.new_zeros(self.batch, self.span, length, self.num_heads, self.head_dims)
        # Tiles that are this far apart share no position, and can be added at once.
        apart = -(-self.span // step)
        for first in range(min(apart, self.columns)):
            disjoint = rows[:, :, first * step:].unfold(2, self.span, apart * step)
            disjoint.add_(spans[:, :, first::apart])
        for from_row, to_row in self.down.parts:
            for from_column, to_column in self.across.parts:
                maps[:, to_row, to_column] += rows[:, from_row, from_column]


class Stretch:
    """Some neighbouring tiles along one axis, and their surroundings.

    ``own`` is where the tiles are among the queries. ``where`` picks their surroundings from the
    axis: a slice, or int64 positions where some lie beyond its ends and are mirrored. ``parts`` are
    pairs of slices, of the surroundings and of the axis, for adding one onto the other: what lies
    on the axis, and then each mirrored position that a query can see.

    Args:
        first: the first tile.
        tiles: how many there are.
        extent: positions of the axis.
        tile: queries of a tile.
        stride: distance of the queries.
        span: positions around a tile.
        reach: how far before its first query they begin.
    """

    def __init__(self, first: int, tiles: int, extent: int, tile: int, stride: int, span: int,
                 reach: int, device: torch.device) -> None:
        self.tiles, self.tile, self.span, self.step = tiles, tile, span, tile * stride
        self.length = (tiles - 1) * self.step + span
        self.own = slice(first * tile, (first + tiles) * tile)
        start = first * self.step - reach
        stop = start + self.length
        inside = slice(max(start, 0), min(stop, extent))
        self.where: Union[slice, Tensor] = inside
        self.parts = [(slice(inside.start - start, inside.stop - start), inside)]
        if inside != slice(start, stop):
            self.where = reflected_range(start, stop, extent, device)
            for index, (position, image) in enumerate(zip(range(start, min(stop, extent + reach)),
                                                          self.where.tolist())):
                if not 0 <= position < extent:
                    self.parts.append((slice(index, index + 1), slice(image, image + 1)))


@cached_by_size
def tile_mask(tile: int, span: int, kernel_size: int, stride: int, dilation: int,
              dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tile², span²): zero where a position around a tile is a query's neighbour, else -inf."""
    offset = (torch.arange(span, device=device) -
              stride * torch.arange(tile, device=device)[:, None])
    near = (offset % dilation == 0) & (offset >= 0) & (offset <= dilation * (kernel_size - 1))
    unseen = ~(near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=device)
    return mask.masked_fill_(unseen, -torch.inf)


register_backends('sliding_window_attention',
                  Backend('reference', sliding_window_attention_reference),
                  Backend('tiled', sliding_window_attention_tiled),
                  Backend('dense', sliding_window_attention_at_once),
                  Backend('triton', sliding_window_attention_triton, triton_unavailable))
