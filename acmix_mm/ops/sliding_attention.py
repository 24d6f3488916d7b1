"""Self-attention over each query's own neighbourhood, the attention path of ACmix in a ResNet.

Paper: arXiv 2111.14556, section 4.1 (stage II of the attention path, local attention with a
k_a × k_a window); the position encoding and the mirrored border are the authors' code's.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .forms import named_form, require_triton, runs_triton
from .mirror import fold_border, mirrored
from .opaque import opaque
from .softmax import attention_weights, logits_gradient
from .tables import per_size


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
        form: ``'reference'``, ``'tiled'`` or ``'triton'``; if None the last on a GPU that can
            run it, and else ``'tiled'``.

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
    default = 'triton' if q.is_cuda and has_kernel(q, stride, dilation) else 'tiled'
    run = named_form('sliding_window_attention', FORMS, form, default)
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
    out = _TiledAttention.apply(*channels_last(q, k, v, positions), kernel_size, stride, dilation,
                                scale)
    return out.permute(0, 3, 4, 1, 2)


def sliding_window_attention_triton(q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                                    kernel_size: int, stride: int, dilation: int,
                                    scale: float) -> Tensor:
    """Do as the tiled form does, a tile and its softmax at a time, in kernels for NVIDIA GPUs."""
    require_triton('sliding_window_attention', q)
    if not has_kernel(q, stride, dilation):
        raise ValueError("sliding_window_attention's form 'triton' takes stride or dilation, not "
                         'both, and heads of 512 bytes at most; got '
                         f'stride={stride}, dilation={dilation} and {q.shape[2]} channels of '
                         f'{q.dtype}. Leave out form to have one chosen.')
    out = _TritonAttention.apply(*channels_last(q, k, v, positions), kernel_size, stride, dilation,
                                 scale)
    return out.permute(0, 3, 4, 1, 2)


def has_kernel(q: Tensor, stride: int, dilation: int) -> bool:
    """Whether Triton's kernels are written for this case, on a machine that runs them."""
    if not runs_triton(q) or (stride > 1 and dilation > 1):
        return False
    from .kernels.sliding_attention import fits
    return fits(q.shape[2], q.dtype)


def channels_last(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """Views as (batch, height, width, num_heads, head_dims) and (height, width, head_dims)."""
    return (*(maps.permute(0, 3, 4, 1, 2) for maps in (q, k, v)), positions.permute(1, 2, 0))


class _TiledAttention(torch.autograd.Function):
    """Attention from tiles of queries to their surroundings, one row of tiles at a time.

    Nothing is kept for the backward pass but the inputs: the weights are computed again.
    q, k, v: (batch, height, width, num_heads, head_dims); positions: (height, width, head_dims).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                *geometry: Any) -> Tensor:
        ctx.save_for_backward(q, k, v, positions)
        ctx.geometry = geometry
        return attend_tiled(q, k, v, positions, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grads = attend_tiled_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        return *grads, minus_sum(ctx, grads[1]), None, None, None, None


def minus_sum(ctx: Any, grad_k: Tensor) -> Optional[Tensor]:
    """The gradient of the positions, which were subtracted from the keys of all heads alike."""
    return -grad_k.sum((0, 3)) if ctx.needs_input_grad[3] else None


def _empty_attended(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kernel_size: int,
                    stride: int, dilation: int, scale: float) -> Tensor:
    return q.new_empty(q[:, ::stride, ::stride].shape)


def _empty_gradients(grad_out: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@opaque(_empty_attended)
def attend_tiled(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kernel_size: int, stride: int,
                 dilation: int, scale: float) -> Tensor:
    tiles = _Tiles(q, kernel_size, stride, dilation)
    out = q.new_empty(tiles.out_shape)
    for row in range(tiles.rows):
        own = tiles.own(q, row, stride) * scale
        weights = attention_weights(own, tiles.around(k, row, positions), tiles.mask)
        tiles.put(torch.bmm(weights, tiles.around(v, row)), out, row)
    return out


@opaque(_empty_gradients)
def attend_tiled_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                          kernel_size: int, stride: int, dilation: int,
                          scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    tiles = _Tiles(q, kernel_size, stride, dilation)
    grad_q, grad_k, grad_v = (q.new_zeros(q.shape) for _ in range(3))
    for row in range(tiles.rows):
        own = tiles.own(q, row, stride) * scale
        around = tiles.around(k, row, positions)
        own_grad = tiles.own(grad_out, row)
        weights = attention_weights(own, around, tiles.mask)
        tiles.add(torch.bmm(weights.transpose(1, 2), own_grad), grad_v, row)
        grad = torch.bmm(own_grad, tiles.around(v, row).transpose(1, 2))
        grad = logits_gradient(grad, weights)
        tiles.put(torch.bmm(grad, around).mul_(scale), grad_q[:, ::stride, ::stride], row)
        tiles.add(torch.bmm(grad.transpose(1, 2), own), grad_k, row)
    return grad_q, grad_k, grad_v


class _TritonAttention(torch.autograd.Function):
    """The same in kernels; the softmax's sums are kept, (batch, height, width, num_heads)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                *geometry: Any) -> Tensor:
        out, log_sum = attend_triton(q, k, v, positions, *geometry)
        ctx.save_for_backward(q, k, v, positions, out, log_sum)
        ctx.geometry = geometry
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        grads = attend_triton_backward(grad_out, *ctx.saved_tensors, *ctx.geometry)
        return *grads, minus_sum(ctx, grads[1]), None, None, None, None


def _empty_attended_and_sums(*inputs: Any) -> tuple[Tensor, Tensor]:
    out = _empty_attended(*inputs)
    return out, out.new_empty(out.shape[:4], dtype=torch.float32)


@opaque(_empty_attended_and_sums)
def attend_triton(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, kernel_size: int, stride: int,
                  dilation: int, scale: float) -> tuple[Tensor, Tensor]:
    from .kernels.sliding_attention import attend
    with torch.cuda.device_of(q):
        return attend(q, k, v, positions, kernel_size, stride, dilation, scale)


@opaque(_empty_gradients)
def attend_triton_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor,
                           out: Tensor, log_sum: Tensor, kernel_size: int, stride: int,
                           dilation: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    from .kernels.sliding_attention import attend_backward
    with torch.cuda.device_of(q):
        return attend_backward(grad_out, q, k, v, positions, out, log_sum, kernel_size, stride,
                               dilation, scale)


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
        self.mask = tile_mask(self.tile, self.span, kernel_size, stride, dilation, q.dtype,
                              q.device)

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
        folded = fold_border(rows, 2, self.width, self.reach)
        index = self.row_index[row * self.step:row * self.step + self.span]
        maps.index_add_(1, index, folded)


@per_size
def tile_mask(tile: int, span: int, kernel_size: int, stride: int, dilation: int,
              dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tile², span²): zero where a position around a tile is a query's neighbour, else -inf."""
    offset = (torch.arange(span, device=device) -
              stride * torch.arange(tile, device=device)[:, None])
    near = (offset % dilation == 0) & (offset >= 0) & (offset <= dilation * (kernel_size - 1))
    unseen = ~(near[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    mask = torch.zeros(unseen.shape, dtype=dtype, device=device)
    return mask.masked_fill_(unseen, -torch.inf)


FORMS = {
    'reference': sliding_window_attention_reference,
    'tiled': sliding_window_attention_tiled,
    'triton': sliding_window_attention_triton,
}
