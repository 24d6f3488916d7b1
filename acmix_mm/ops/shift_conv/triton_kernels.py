"""Triton kernels of a grouped convolution with many narrow groups, forward and backward.

The groups of a position are adjacent in memory. A program computes a block of groups as one vector,
for a block of positions: each tap and input channel is one multiplication by a vector of weights,
added to four output channels. Sums are in float32.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

# Output channels per program, unrolled by hand in the kernels.
OUTPUTS = 4
# Groups times positions per program.
BLOCK = 1024
MAX_GROUPS = 32
# Most blocks of positions that one program sums for the gradient of the kernels.
MAX_ROUNDS = 32
# Training on images of several sizes would compile the kernels again for some of them.
SIZES = ('batch', 'height', 'width', 'out_height', 'out_width', 'row_regions', 'column_regions',
         'rounds')


def convolve(maps: Tensor, kernels: Tensor, bias: Optional[Tensor], out: Tensor, stride: int,
             dilation: int) -> None:
    """Grouped convolution with zero padding that keeps the size at stride 1.

    Args:
        maps: (batch, height, width, groups, in channels), float16, bfloat16 or float32, any
            strides; fastest if groups are adjacent in memory.
        kernels: (groups · out channels, in channels, k, k), k odd.
        bias: (groups · out channels, row regions, column regions), from
            :func:`acmix_mm.ops.shift_conv.folding.convolved_bias`, or None.
        out: output, (batch, ⌈height / stride⌉, ⌈width / stride⌉, groups, out channels), any
            strides.
        stride: distance between the positions of the output.
        dilation: distance between the taps of the kernel.
    """
    weights = kernels.unflatten(0, (maps.shape[3], -1)).flatten(3).permute(3, 2, 1, 0)
    run(maps, weights, bias, out, kernels.shape[-1], stride, dilation, transposed=False)


def convolve_maps_backward(grads: Tensor, kernels: Tensor, grad_maps: Tensor, stride: int,
                           dilation: int) -> None:
    """Write the gradient of the maps to ``grad_maps``, any strides."""
    weights = kernels.unflatten(0, (grads.shape[3], -1)).flatten(3).permute(3, 1, 2, 0)
    run(grads, weights, None, grad_maps, kernels.shape[-1], stride, dilation, transposed=True)


def convolve_kernels_backward(grads: Tensor, maps: Tensor, kernel_size: int, stride: int,
                              dilation: int) -> Tensor:
    """Return the gradient of the kernels, (groups · out channels, in channels, k, k), float32."""
    groups = maps.shape[3]
    taps, in_channels, out_channels = kernel_size**2, maps.shape[4], grads.shape[4]
    blocks = tiling(groups, out_channels)
    positions = grads.shape[0] * grads.shape[1] * grads.shape[2]
    rounds = triton.cdiv(max(positions, 1), blocks['POSITIONS'])
    rounds = min(triton.next_power_of_2(rounds), MAX_ROUNDS)
    shares = triton.cdiv(positions, rounds * blocks['POSITIONS'])
    partial = maps.new_empty(shares, taps, in_channels, out_channels, groups, dtype=torch.float32)
    grid = (shares * taps * in_channels * blocks['OUTPUT_BLOCKS'] * blocks['GROUP_BLOCKS'],)
    grad_kernels_kernel[grid](
        maps, grads, partial, *maps.stride(), *grads.stride(), *maps.shape[:3], *grads.shape[1:3],
        groups, out_channels, rounds, IN_CHANNELS=in_channels, KERNEL_SIZE=kernel_size,
        STRIDE=stride, DILATION=dilation, **blocks)
    kernels = partial.sum(0).permute(3, 2, 1, 0)
    return kernels.reshape(groups * out_channels, in_channels, kernel_size, kernel_size)


def run(maps: Tensor, weights: Tensor, bias: Optional[Tensor], out: Tensor, kernel_size: int,
        stride: int, dilation: int, transposed: bool) -> None:
    """Write the convolution, or the transposed convolution, of ``maps`` to ``out``.

    Args:
        maps: (batch, height, width, groups, in channels).
        weights: (k², in channels, out channels, groups).
        bias: see :func:`convolve`.
        out: (batch, out height, out width, groups, out channels).
    """
    groups, in_channels, out_channels = *maps.shape[3:], out.shape[4]
    blocks = tiling(groups, out_channels)
    positions = out.shape[0] * out.shape[1] * out.shape[2]
    grid = (blocks['OUTPUT_BLOCKS'] * blocks['GROUP_BLOCKS'] *
            triton.cdiv(positions, blocks['POSITIONS']),)
    weights = weights.float().contiguous()
    has_bias = bias is not None
    bias, regions = (bias.float().contiguous(), bias.shape[1:]) if has_bias else (weights, (1, 1))
    convolve_kernel[grid](
        maps, weights, bias, out, *maps.stride(), *out.stride(), *maps.shape[:3],
        *out.shape[1:3], groups, out_channels, *regions, HAS_BIAS=has_bias,
        IN_CHANNELS=in_channels, KERNEL_SIZE=kernel_size, STRIDE=stride, DILATION=dilation,
        TRANSPOSED=transposed, **blocks)


def tiling(groups: int, out_channels: int) -> dict:
    """Groups and positions per program, and blocks of groups and output channels in all."""
    group_block = min(triton.next_power_of_2(groups), MAX_GROUPS)
    return dict(GROUPS=group_block, POSITIONS=BLOCK // group_block,
                GROUP_BLOCKS=triton.cdiv(groups, group_block),
                OUTPUT_BLOCKS=triton.cdiv(out_channels, OUTPUTS))


@triton.jit
def split(positions, height, width):
    """Image, row and column of flat indices into a batch of maps."""
    row = positions // width
    return (row // height).to(tl.int64), row % height, positions % width


@triton.jit
def load_inputs(maps, image, row, column, is_inside, groups, is_group, height, width, stride_b,
                stride_y, stride_x, stride_g):
    """Load (positions, groups) in float32, zero outside the map."""
    is_inside = is_inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    place = image * stride_b + row * stride_y + column * stride_x
    return tl.load(maps + place[:, None] + groups[None, :] * stride_g,
                   mask=is_inside[:, None] & is_group[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_weights(place, mask):
    """Load (1, groups)."""
    return tl.load(place, mask=mask, other=0.0)[None, :]


@triton.jit
def groups_with(offset, output, groups, num_groups, out_channels):
    """The groups that have the output channel ``output + offset``: all or none, (groups)."""
    # Triton 3.9's interpreter broadcasts a comparison of two numbers to integers, not booleans.
    return groups < tl.where(output + offset < out_channels, num_groups, 0)


@triton.jit
def region_of(position, extent, regions):
    """The border region of a position along an axis; see acmix_mm.ops.shift_conv.folding."""
    return tl.maximum(tl.minimum(position, regions // 2), position - extent + regions)


@triton.jit(do_not_specialize=SIZES)
def convolve_kernel(maps, weights, bias, out, map_stride_b, map_stride_y, map_stride_x,
                    map_stride_g, map_stride_c, out_stride_b, out_stride_y, out_stride_x,
                    out_stride_g, out_stride_c, batch, height, width, out_height, out_width,
                    num_groups, out_channels, row_regions, column_regions, HAS_BIAS: tl.constexpr,
                    IN_CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
                    DILATION: tl.constexpr, TRANSPOSED: tl.constexpr, GROUPS: tl.constexpr,
                    POSITIONS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
                    OUTPUT_BLOCKS: tl.constexpr):
    """Programs that read the same positions run together."""
    rest = tl.program_id(0)
    output, rest = rest % OUTPUT_BLOCKS * 4, rest // OUTPUT_BLOCKS
    groups = rest % GROUP_BLOCKS * GROUPS + tl.arange(0, GROUPS)
    is_group = groups < num_groups
    positions = rest // GROUP_BLOCKS * POSITIONS + tl.arange(0, POSITIONS)
    is_inside = positions < batch * out_height * out_width
    image, out_row, out_column = split(positions, out_height, out_width)

    sum0 = tl.zeros((POSITIONS, GROUPS), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    has1 = groups_with(1, output, groups, num_groups, out_channels)
    has2 = groups_with(2, output, groups, num_groups, out_channels)
    has3 = groups_with(3, output, groups, num_groups, out_channels)
    reach: tl.constexpr = DILATION * (KERNEL_SIZE // 2)
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        down = tap // KERNEL_SIZE * DILATION - reach
        across = tap % KERNEL_SIZE * DILATION - reach
        if TRANSPOSED:
            row, column = out_row - down, out_column - across
            is_read = is_inside & (row >= 0) & (row % STRIDE == 0)
            is_read = is_read & (column >= 0) & (column % STRIDE == 0)
            row, column = row // STRIDE, column // STRIDE
        else:
            row, column = out_row * STRIDE + down, out_column * STRIDE + across
            is_read = is_inside
        for channel in range(IN_CHANNELS):
            inputs = load_inputs(maps + channel * map_stride_c, image, row, column, is_read,
                                 groups, is_group, height, width, map_stride_b, map_stride_y,
                                 map_stride_x, map_stride_g)
            place = weights + ((tap * IN_CHANNELS + channel) * out_channels + output) * num_groups
            place += groups
            sum0 += inputs * load_weights(place, is_group)
            sum1 += inputs * load_weights(place + num_groups, has1)
            sum2 += inputs * load_weights(place + 2 * num_groups, has2)
            sum3 += inputs * load_weights(place + 3 * num_groups, has3)

    # Interleave the output channels, so that stores are coalesced.
    sums = tl.interleave(tl.interleave(sum0, sum2), tl.interleave(sum1, sum3))
    index = tl.arange(0, GROUPS * 4)
    group, channel = rest % GROUP_BLOCKS * GROUPS + index // 4, output + index % 4
    mask = is_inside[:, None] & ((group < num_groups) & (channel < out_channels))[None, :]
    if HAS_BIAS:
        region = region_of(out_row * STRIDE, height, row_regions) * column_regions
        region += region_of(out_column * STRIDE, width, column_regions)
        place = (group * out_channels + channel)[None, :] * row_regions * column_regions
        sums += tl.load(bias + place + region[:, None], mask=mask, other=0.0)
    place = image * out_stride_b + out_row * out_stride_y + out_column * out_stride_x
    place = place[:, None] + (group * out_stride_g + channel * out_stride_c)[None, :]
    tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def grad_kernels_kernel(maps, grads, partial, map_stride_b, map_stride_y, map_stride_x,
                        map_stride_g, map_stride_c, grad_stride_b, grad_stride_y, grad_stride_x,
                        grad_stride_g, grad_stride_c, batch, height, width, out_height, out_width,
                        num_groups, out_channels, rounds, IN_CHANNELS: tl.constexpr,
                        KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
                        GROUPS: tl.constexpr, POSITIONS: tl.constexpr,
                        GROUP_BLOCKS: tl.constexpr, OUTPUT_BLOCKS: tl.constexpr):
    """Sum input · gradient over a share of the positions, for one tap and one input channel.

    ``partial`` is (shares, k², in channels, out channels, groups).
    """
    rest = tl.program_id(0)
    channel, rest = rest % IN_CHANNELS, rest // IN_CHANNELS
    output, rest = rest % OUTPUT_BLOCKS * 4, rest // OUTPUT_BLOCKS
    tap, rest = rest % (KERNEL_SIZE * KERNEL_SIZE), rest // (KERNEL_SIZE * KERNEL_SIZE)
    groups = rest % GROUP_BLOCKS * GROUPS + tl.arange(0, GROUPS)
    is_group = groups < num_groups
    share = rest // GROUP_BLOCKS

    sum0 = tl.zeros((POSITIONS, GROUPS), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    has1 = groups_with(1, output, groups, num_groups, out_channels)
    has2 = groups_with(2, output, groups, num_groups, out_channels)
    has3 = groups_with(3, output, groups, num_groups, out_channels)
    reach: tl.constexpr = DILATION * (KERNEL_SIZE // 2)
    down = tap // KERNEL_SIZE * DILATION - reach
    across = tap % KERNEL_SIZE * DILATION - reach
    total = batch * out_height * out_width
    block = share * rounds
    # Triton's interpreter takes no such range.
    while block < (share + 1) * rounds:
        positions = block * POSITIONS + tl.arange(0, POSITIONS)
        is_inside = positions < total
        image, out_row, out_column = split(positions, out_height, out_width)
        inputs = load_inputs(maps + channel * map_stride_c, image, out_row * STRIDE + down,
                             out_column * STRIDE + across, is_inside, groups, is_group, height,
                             width, map_stride_b, map_stride_y, map_stride_x, map_stride_g)
        place = grads + output * grad_stride_c
        sum0 += inputs * load_inputs(place, image, out_row, out_column, is_inside, groups,
                                     is_group, out_height, out_width, grad_stride_b, grad_stride_y,
                                     grad_stride_x, grad_stride_g)
        sum1 += inputs * load_inputs(place + grad_stride_c, image, out_row, out_column,
                                     is_inside, groups, has1, out_height, out_width,
                                     grad_stride_b, grad_stride_y, grad_stride_x, grad_stride_g)
        sum2 += inputs * load_inputs(place + 2 * grad_stride_c, image, out_row, out_column,
                                     is_inside, groups, has2, out_height, out_width,
                                     grad_stride_b, grad_stride_y, grad_stride_x, grad_stride_g)
        sum3 += inputs * load_inputs(place + 3 * grad_stride_c, image, out_row, out_column,
                                     is_inside, groups, has3, out_height, out_width,
                                     grad_stride_b, grad_stride_y, grad_stride_x, grad_stride_g)
        block += 1

    place = ((share * KERNEL_SIZE * KERNEL_SIZE + tap) * IN_CHANNELS + channel) * out_channels
    place = partial + (place + output) * num_groups + groups
    tl.store(place, tl.sum(sum0, 0), mask=is_group)
    tl.store(place + num_groups, tl.sum(sum1, 0), mask=has1)
    tl.store(place + 2 * num_groups, tl.sum(sum2, 0), mask=has2)
    tl.store(place + 3 * num_groups, tl.sum(sum3, 0), mask=has3)
