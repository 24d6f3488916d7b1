"""Triton kernels of compose_paths, forward and backward: many small products in one launch.

A program computes what belongs to one channel of the output, (depth, head) with depth among the
channels of a head: one row each of the projections to queries, keys and values, and one kernel of
the convolution. Sums are in float32.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

# Most input channels, or maps of the fc, that a program reads at once.
MAX_BLOCK = 128
# Its products are as precise as those of float32.
PRECISION = tl.constexpr('tf32x3')


def compose(tensors: Sequence[Any], outs: Sequence[Optional[Tensor]], group: int) -> None:
    """Write ``outs``.

    Args:
        tensors: the tensors that :func:`acmix_mm.ops.compose_paths` takes, in that order,
            contiguous.
        outs: the fields of :class:`acmix_mm.ops.path_weights.PathWeights`, contiguous but for the
            kernels.
        group: channels of a head in a group of the convolution; 0 for a dense one.
    """
    weight, bias, fc_weight, shift_weight, fc_bias, *rates_and_bias = tensors
    out_weight, out_bias, mixing, kernels, taps = outs
    inputs = weight, bias, fc_weight, fc_bias, shift_weight, *rates_and_bias
    sizes = constants(weight, fc_weight, shift_weight)
    grid = (len(shift_weight), triton.cdiv(weight.shape[1], sizes['BLOCK_IN']))
    if group == 0:
        compose_dense_kernel[grid](*inputs, out_weight, out_bias, kernels, taps, **sizes)
    else:
        compose_grouped_kernel[grid](*inputs, out_weight, out_bias, mixing, kernels, taps,
                                     GROUP=group, **sizes)


def compose_backward(grads: Sequence[Optional[Tensor]], tensors: Sequence[Any],
                     results: Sequence[Optional[Tensor]], group: int) -> None:
    """Write ``results``.

    Args:
        grads: of all outputs of :func:`compose`, in the same memory formats.
        tensors: see :func:`compose`.
        results: the gradients of ``tensors``, contiguous.
        group: see :func:`compose`.
    """
    weight, bias, fc_weight, shift_weight, fc_bias, *rates_and_bias = tensors
    inputs = weight, bias, fc_weight, fc_bias, shift_weight, *rates_and_bias
    (grad_weight, grad_bias, grad_fc_weight, grad_shift_weight, grad_fc_bias, grad_attention_rate,
     grad_convolution_rate, grad_attention_bias) = results
    grad_out_weight, grad_out_bias, grad_mixing, grad_kernels, grad_taps = grads
    sizes = constants(weight, fc_weight, shift_weight)
    channels, (num_shifts, num_maps) = len(shift_weight), fc_weight.shape
    # Shares of the programs in what all of them add to; the fc's bias follows its weight.
    fc_rows = channels if group == 0 else sizes['HEAD_DIMS']
    shares = weight.new_empty(fc_rows, num_shifts * (num_maps + 1), dtype=torch.float32)
    rate_shares = weight.new_empty(channels, 2, dtype=torch.float32)
    outputs = (grad_weight, grad_bias, grad_shift_weight, grad_attention_bias, shares, rate_shares)
    if group == 0:
        compose_dense_backward_kernel[(channels, 4)](
            grad_out_weight, grad_out_bias, grad_kernels, grad_taps, *inputs, *outputs, **sizes)
    else:
        compose_grouped_backward_kernel[(channels,)](
            grad_out_weight, grad_out_bias, grad_mixing, grad_kernels, grad_taps, *inputs,
            *outputs, GROUP=group, **sizes)
    columns = 16
    sum_shares_kernel[(triton.cdiv(shares.shape[1], columns) + 1,)](
        shares, rate_shares, grad_fc_weight, grad_fc_bias, grad_attention_rate,
        grad_convolution_rate, FC_ROWS=fc_rows, RATE_ROWS=channels, SHIFTS=num_shifts,
        NUM_MAPS=num_maps, COLUMNS=columns, ROWS=64)


def constants(weight: Tensor, fc_weight: Tensor, shift_weight: Tensor) -> dict:
    """The constants and options of the kernels."""
    num_shifts, num_maps = fc_weight.shape
    num_heads = num_maps // 3
    return dict(NUM_HEADS=num_heads, HEAD_DIMS=len(shift_weight) // num_heads, NUM_MAPS=num_maps,
                IN_CHANNELS=weight.shape[1], SHIFTS=num_shifts, BLOCK_SHIFTS=padded(num_shifts),
                BLOCK_IN=min(padded(weight.shape[1]), MAX_BLOCK),
                BLOCK_MAPS=min(padded(num_maps), MAX_BLOCK), num_warps=4)


def padded(length: int) -> int:
    """A length, padded for ``tl.dot``."""
    return max(triton.next_power_of_2(length), 16)


@triton.jit
def load(place, mask):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(place, values, mask):
    tl.store(place, values.to(place.dtype.element_ty), mask=mask)


@triton.jit
def load_rate(rate):
    """A rate; None stands for one."""
    value = 1.0
    if rate is not None:
        value = tl.load(rate).to(tl.float32)
    return value


@triton.jit
def load_shifts(shift_weight, channel, SHIFTS: tl.constexpr, BLOCK_SHIFTS: tl.constexpr):
    """The kernels of a channel: (shift, tap)."""
    index = tl.arange(0, BLOCK_SHIFTS)
    mask = (index < SHIFTS)[:, None] & (index < SHIFTS)[None, :]
    return load(shift_weight + channel * SHIFTS * SHIFTS + index[:, None] * SHIFTS + index[None, :],
                mask)


@triton.jit
def load_mixing(fc_weight, first, SHIFTS: tl.constexpr, BLOCK_SHIFTS: tl.constexpr,
                NUM_MAPS: tl.constexpr, BLOCK_MAPS: tl.constexpr):
    """The fc's weight: (shift, map from ``first`` on)."""
    index, maps = tl.arange(0, BLOCK_SHIFTS), first + tl.arange(0, BLOCK_MAPS)
    return load(fc_weight + index[:, None] * NUM_MAPS + maps[None, :],
                (index < SHIFTS)[:, None] & (maps < NUM_MAPS)[None, :])


@triton.jit
def load_projections(weight, first, depth, ins, HEAD_DIMS: tl.constexpr, NUM_MAPS: tl.constexpr,
                     BLOCK_MAPS: tl.constexpr, IN_CHANNELS: tl.constexpr):
    """The weight that projects to a depth: (map from ``first`` on, input)."""
    maps = first + tl.arange(0, BLOCK_MAPS)
    return load(weight + (maps * HEAD_DIMS + depth)[:, None] * IN_CHANNELS + ins[None, :],
                (maps < NUM_MAPS)[:, None] & (ins < IN_CHANNELS)[None, :])


@triton.jit
def load_bias(bias, first, depth, HEAD_DIMS: tl.constexpr, NUM_MAPS: tl.constexpr,
              BLOCK_MAPS: tl.constexpr):
    """The bias that belongs to :func:`load_projections`: (map,)."""
    maps = first + tl.arange(0, BLOCK_MAPS)
    return load(bias + maps * HEAD_DIMS + depth, maps < NUM_MAPS)


@triton.jit
def multiply(a, b):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def project(weight, bias, out_weight, out_bias, attention_rate, channel, ins,
            NUM_HEADS: tl.constexpr, HEAD_DIMS: tl.constexpr, IN_CHANNELS: tl.constexpr):
    """Write a row of queries, keys and values each; values are scaled."""
    row = channel % NUM_HEADS * HEAD_DIMS + channel // NUM_HEADS
    rate = load_rate(attention_rate)
    for part in tl.static_range(3):
        factor = rate if part == 2 else 1.0
        place = (part * NUM_HEADS * HEAD_DIMS + row) * IN_CHANNELS + ins
        values = load(weight + place, ins < IN_CHANNELS)
        store(out_weight + place, values * factor, ins < IN_CHANNELS)
        if bias is not None:
            place_bias = part * NUM_HEADS * HEAD_DIMS + row
            value = tl.load(bias + place_bias).to(tl.float32) * factor
            tl.store(out_bias + place_bias, value.to(out_bias.dtype.element_ty))


@triton.jit
def tap_of_attention(attention_bias, attention_rate, channel, SHIFTS: tl.constexpr,
                     BLOCK_SHIFTS: tl.constexpr):
    """What each tap of a channel adds for attention's bias; zero if there is none."""
    added = 0.0
    if attention_bias is not None:
        added = tl.load(attention_bias + channel).to(tl.float32) * load_rate(attention_rate)
    # The tap in the centre lies on the map everywhere.
    return tl.where(tl.arange(0, BLOCK_SHIFTS) == SHIFTS // 2, added, 0.0)


@triton.jit
def mix_biases(bias, fc_weight, fc_bias, depth, HEAD_DIMS: tl.constexpr, NUM_MAPS: tl.constexpr,
               BLOCK_MAPS: tl.constexpr, SHIFTS: tl.constexpr, BLOCK_SHIFTS: tl.constexpr):
    """The fc of the biases at a depth: (shift,)."""
    index = tl.arange(0, BLOCK_SHIFTS)
    sums = tl.zeros((BLOCK_SHIFTS,), tl.float32)
    if fc_bias is not None:
        sums += load(fc_bias + index, index < SHIFTS)
    if bias is not None:
        for first in range(0, NUM_MAPS, BLOCK_MAPS):
            mix = load_mixing(fc_weight, first, SHIFTS, BLOCK_SHIFTS, NUM_MAPS, BLOCK_MAPS)
            values = load_bias(bias, first, depth, HEAD_DIMS, NUM_MAPS, BLOCK_MAPS)
            sums += tl.sum(mix * values[None, :], 1)
    return sums


@triton.jit
def compose_dense_kernel(weight, bias, fc_weight, fc_bias, shift_weight, attention_rate,
                         convolution_rate, attention_bias, out_weight, out_bias, kernels, taps,
                         NUM_HEADS: tl.constexpr, HEAD_DIMS: tl.constexpr, NUM_MAPS: tl.constexpr,
                         BLOCK_MAPS: tl.constexpr, IN_CHANNELS: tl.constexpr, SHIFTS: tl.constexpr,
                         BLOCK_SHIFTS: tl.constexpr, BLOCK_IN: tl.constexpr):
    channel = tl.program_id(0)
    ins = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    project(weight, bias, out_weight, out_bias, attention_rate, channel, ins, NUM_HEADS, HEAD_DIMS,
            IN_CHANNELS)

    index = tl.arange(0, BLOCK_SHIFTS)
    shifts = load_shifts(shift_weight, channel, SHIFTS, BLOCK_SHIFTS) * load_rate(convolution_rate)
    sum_kernels = tl.zeros((BLOCK_SHIFTS, BLOCK_IN), tl.float32)
    sum_taps = tl.zeros((BLOCK_SHIFTS,), tl.float32)
    for first in range(0, NUM_MAPS, BLOCK_MAPS):
        mix = load_mixing(fc_weight, first, SHIFTS, BLOCK_SHIFTS, NUM_MAPS, BLOCK_MAPS)
        values = load_projections(weight, first, channel // NUM_HEADS, ins, HEAD_DIMS, NUM_MAPS,
                                  BLOCK_MAPS, IN_CHANNELS)
        folded = multiply(tl.trans(shifts), mix)
        sum_kernels += multiply(folded, values)
        if bias is not None:
            values = load_bias(bias, first, channel // NUM_HEADS, HEAD_DIMS, NUM_MAPS, BLOCK_MAPS)
            sum_taps += tl.sum(folded * values[None, :], 1)
    place = (channel * SHIFTS + index)[:, None] * IN_CHANNELS + ins[None, :]
    store(kernels + place, sum_kernels, (index < SHIFTS)[:, None] & (ins < IN_CHANNELS)[None, :])
    if taps is not None:
        if fc_bias is not None:
            sum_taps += tl.sum(shifts * load(fc_bias + index, index < SHIFTS)[:, None], 0)
        sum_taps += tap_of_attention(attention_bias, attention_rate, channel, SHIFTS, BLOCK_SHIFTS)
        store(taps + channel * SHIFTS + index, sum_taps, index < SHIFTS)


@triton.jit
def compose_dense_backward_kernel(
        grad_out_weight, grad_out_bias, grad_kernels, grad_taps, weight, bias, fc_weight, fc_bias,
        shift_weight, attention_rate, convolution_rate, attention_bias, grad_weight, grad_bias,
        grad_shift_weight, grad_attention_bias, shares, rate_shares, NUM_HEADS: tl.constexpr,
        HEAD_DIMS: tl.constexpr, NUM_MAPS: tl.constexpr, BLOCK_MAPS: tl.constexpr,
        IN_CHANNELS: tl.constexpr, SHIFTS: tl.constexpr, BLOCK_SHIFTS: tl.constexpr,
        BLOCK_IN: tl.constexpr):
    """Of four programs, three compute a row of the projections, and the last a shift kernel."""
    channel, part = tl.program_id(0), tl.program_id(1)
    depth, head = channel // NUM_HEADS, channel % NUM_HEADS
    index = tl.arange(0, BLOCK_SHIFTS)
    is_shift = index < SHIFTS
    rate = load_rate(convolution_rate)
    if part < 3:
        factor = 1.0
        if attention_rate is not None:
            factor = tl.where(part == 2, load_rate(attention_rate), 1.0)
        row = (part * NUM_HEADS + head) * HEAD_DIMS + depth
        mix = load(fc_weight + index * NUM_MAPS + part * NUM_HEADS + head, is_shift) * rate
        share = 0.0
        for first in range(0, IN_CHANNELS, BLOCK_IN):
            ins = first + tl.arange(0, BLOCK_IN)
            grad = load(grad_out_weight + row * IN_CHANNELS + ins, ins < IN_CHANNELS)
            values = load(weight + row * IN_CHANNELS + ins, ins < IN_CHANNELS)
            share += tl.sum(grad * values, 0)
            grad *= factor
            mask = is_shift[:, None] & (ins < IN_CHANNELS)[None, :]
            for each in range(NUM_HEADS):
                other = depth * NUM_HEADS + each
                shifts = load_shifts(shift_weight, other, SHIFTS, BLOCK_SHIFTS)
                folded = tl.sum(shifts * mix[:, None], 0)
                place = (other * SHIFTS + index)[:, None] * IN_CHANNELS + ins[None, :]
                grad += tl.sum(folded[:, None] * load(grad_kernels + place, mask), 0)
            store(grad_weight + row * IN_CHANNELS + ins, grad, ins < IN_CHANNELS)
        if bias is not None:
            grad_value = tl.load(grad_out_bias + row).to(tl.float32)
            share += grad_value * tl.load(bias + row).to(tl.float32)
            grad_value *= factor
            for each in range(NUM_HEADS):
                other = depth * NUM_HEADS + each
                shifts = load_shifts(shift_weight, other, SHIFTS, BLOCK_SHIFTS)
                folded = tl.sum(shifts * mix[:, None], 0)
                grad_value += tl.sum(folded * load(grad_taps + other * SHIFTS + index, is_shift), 0)
            tl.store(grad_bias + row, grad_value.to(grad_bias.dtype.element_ty))
        if part == 2:
            if attention_bias is not None:
                grad_value = tl.load(grad_taps + channel * SHIFTS + SHIFTS // 2).to(tl.float32)
                share += grad_value * tl.load(attention_bias + channel).to(tl.float32)
                tl.store(grad_attention_bias + channel,
                         (grad_value * factor).to(grad_attention_bias.dtype.element_ty))
            tl.store(rate_shares + 2 * channel, share)
    else:
        shifts = load_shifts(shift_weight, channel, SHIFTS, BLOCK_SHIFTS)
        sum_shifts = tl.zeros((BLOCK_SHIFTS, BLOCK_SHIFTS), tl.float32)
        shares += channel * SHIFTS * (NUM_MAPS + 1)
        if fc_bias is not None:
            of_taps = load(grad_taps + channel * SHIFTS + index, is_shift)
            sum_shifts += load(fc_bias + index, is_shift)[:, None] * of_taps[None, :]
            store(shares + index * (NUM_MAPS + 1) + NUM_MAPS,
                  rate * tl.sum(shifts * of_taps[None, :], 1), is_shift)
        for first_map in range(0, NUM_MAPS, BLOCK_MAPS):
            maps = first_map + tl.arange(0, BLOCK_MAPS)
            # The gradient of what the forward pass calls folded.
            grad_folded = tl.zeros((BLOCK_SHIFTS, BLOCK_MAPS), tl.float32)
            for first in range(0, IN_CHANNELS, BLOCK_IN):
                ins = first + tl.arange(0, BLOCK_IN)
                place = (channel * SHIFTS + index)[:, None] * IN_CHANNELS + ins[None, :]
                grads = load(grad_kernels + place,
                             is_shift[:, None] & (ins < IN_CHANNELS)[None, :])
                values = load_projections(weight, first_map, depth, ins, HEAD_DIMS, NUM_MAPS,
                                          BLOCK_MAPS, IN_CHANNELS)
                grad_folded += multiply(grads, tl.trans(values))
            if bias is not None:
                values = load_bias(bias, first_map, depth, HEAD_DIMS, NUM_MAPS, BLOCK_MAPS)
                grad_folded += (load(grad_taps + channel * SHIFTS + index, is_shift)[:, None] *
                                values[None, :])
            mix = load_mixing(fc_weight, first_map, SHIFTS, BLOCK_SHIFTS, NUM_MAPS, BLOCK_MAPS)
            sum_shifts += multiply(mix, tl.trans(grad_folded))
            store(shares + index[:, None] * (NUM_MAPS + 1) + maps[None, :],
                  rate * multiply(shifts, grad_folded),
                  is_shift[:, None] & (maps < NUM_MAPS)[None, :])
        place = channel * SHIFTS * SHIFTS + index[:, None] * SHIFTS + index[None, :]
        store(grad_shift_weight + place, rate * sum_shifts, is_shift[:, None] & is_shift[None, :])
        tl.store(rate_shares + 2 * channel + 1, tl.sum(tl.sum(shifts * sum_shifts, 1), 0))


@triton.jit
def compose_grouped_kernel(weight, bias, fc_weight, fc_bias, shift_weight, attention_rate,
                           convolution_rate, attention_bias, out_weight, out_bias, mixing,
                           kernels, taps, GROUP: tl.constexpr, NUM_HEADS: tl.constexpr,
                           HEAD_DIMS: tl.constexpr, NUM_MAPS: tl.constexpr,
                           BLOCK_MAPS: tl.constexpr, IN_CHANNELS: tl.constexpr,
                           SHIFTS: tl.constexpr, BLOCK_SHIFTS: tl.constexpr,
                           BLOCK_IN: tl.constexpr):
    """The first program of a depth also computes its rows of the linear layer."""
    channel = tl.program_id(0)
    depth = channel // NUM_HEADS
    ins = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    project(weight, bias, out_weight, out_bias, attention_rate, channel, ins, NUM_HEADS, HEAD_DIMS,
            IN_CHANNELS)

    index = tl.arange(0, BLOCK_SHIFTS)
    is_shift = index < SHIFTS
    shifts = load_shifts(shift_weight, channel, SHIFTS, BLOCK_SHIFTS) * load_rate(convolution_rate)
    for each in range(GROUP):
        place = ((channel * SHIFTS + index[None, :]) * GROUP + each) * SHIFTS + index[:, None]
        store(kernels + place, tl.where(each == depth % GROUP, shifts, 0.0),
              is_shift[:, None] & is_shift[None, :])
    if taps is not None:
        biases = mix_biases(bias, fc_weight, fc_bias, depth, HEAD_DIMS, NUM_MAPS, BLOCK_MAPS,
                            SHIFTS, BLOCK_SHIFTS)
        sum_taps = tl.sum(shifts * biases[:, None], 0)
        sum_taps += tap_of_attention(attention_bias, attention_rate, channel, SHIFTS, BLOCK_SHIFTS)
        store(taps + channel * SHIFTS + index, sum_taps, is_shift)

    if channel % NUM_HEADS == 0:
        sums = tl.zeros((BLOCK_SHIFTS, BLOCK_IN), tl.float32)
        for first in range(0, NUM_MAPS, BLOCK_MAPS):
            mix = load_mixing(fc_weight, first, SHIFTS, BLOCK_SHIFTS, NUM_MAPS, BLOCK_MAPS)
            values = load_projections(weight, first, depth, ins, HEAD_DIMS, NUM_MAPS, BLOCK_MAPS,
                                      IN_CHANNELS)
            sums += multiply(mix, values)
        rows = depth * SHIFTS + index
        store(mixing + rows[:, None] * IN_CHANNELS + ins[None, :], sums,
              is_shift[:, None] & (ins < IN_CHANNELS)[None, :])


@triton.jit
def compose_grouped_backward_kernel(
        grad_out_weight, grad_out_bias, grad_mixing, grad_kernels, grad_taps, weight, bias,
        fc_weight, fc_bias, shift_weight, attention_rate, convolution_rate, attention_bias,
        grad_weight, grad_bias, grad_shift_weight, grad_attention_bias, shares, rate_shares,
        GROUP: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIMS: tl.constexpr,
        NUM_MAPS: tl.constexpr, BLOCK_MAPS: tl.constexpr, IN_CHANNELS: tl.constexpr,
        SHIFTS: tl.constexpr, BLOCK_SHIFTS: tl.constexpr, BLOCK_IN: tl.constexpr):
    channel = tl.program_id(0)
    depth, head = channel // NUM_HEADS, channel % NUM_HEADS
    index = tl.arange(0, BLOCK_SHIFTS)
    is_shift = index < SHIFTS
    rows = depth * SHIFTS + index
    shares += depth * SHIFTS * (NUM_MAPS + 1)
    rate, factor = load_rate(convolution_rate), load_rate(attention_rate)
    share = 0.0
    # The gradient of what mix_biases returns.
    grad_biases = tl.zeros((BLOCK_SHIFTS,), tl.float32)
    if grad_taps is not None:
        for each in range(NUM_HEADS):
            other = depth * NUM_HEADS + each
            grads = load(grad_taps + other * SHIFTS + index, is_shift)
            grad_biases += tl.sum(
                load_shifts(shift_weight, other, SHIFTS, BLOCK_SHIFTS) * grads[None, :], 1)
        grad_biases *= rate
    for part in tl.static_range(3):
        row = (part * NUM_HEADS + head) * HEAD_DIMS + depth
        mix = load(fc_weight + index * NUM_MAPS + part * NUM_HEADS + head, is_shift)
        grad_mix = tl.zeros((BLOCK_SHIFTS,), tl.float32)
        for first in range(0, IN_CHANNELS, BLOCK_IN):
            ins = first + tl.arange(0, BLOCK_IN)
            grad = load(grad_out_weight + row * IN_CHANNELS + ins, ins < IN_CHANNELS)
            values = load(weight + row * IN_CHANNELS + ins, ins < IN_CHANNELS)
            if part == 2:
                share += tl.sum(grad * values, 0)
                grad *= factor
            grads = load(grad_mixing + rows[:, None] * IN_CHANNELS + ins[None, :],
                         is_shift[:, None] & (ins < IN_CHANNELS)[None, :])
            grad += tl.sum(mix[:, None] * grads, 0)
            grad_mix += tl.sum(grads * values[None, :], 1)
            store(grad_weight + row * IN_CHANNELS + ins, grad, ins < IN_CHANNELS)
        if bias is not None:
            grad_value = tl.load(grad_out_bias + row).to(tl.float32)
            value = tl.load(bias + row).to(tl.float32)
            if part == 2:
                share += grad_value * value
                grad_value *= factor
            grad_mix += grad_biases * value
            grad_value += tl.sum(mix * grad_biases, 0)
            tl.store(grad_bias + row, grad_value.to(grad_bias.dtype.element_ty))
        store(shares + index * (NUM_MAPS + 1) + part * NUM_HEADS + head, grad_mix, is_shift)
    if fc_bias is not None:
        store(shares + index * (NUM_MAPS + 1) + NUM_MAPS, grad_biases, is_shift & (head == 0))

    place = ((channel * SHIFTS + index[None, :]) * GROUP + depth % GROUP) * SHIFTS + index[:, None]
    mask = is_shift[:, None] & is_shift[None, :]
    grad_shifts = load(grad_kernels + place, mask)
    if grad_taps is not None:
        biases = mix_biases(bias, fc_weight, fc_bias, depth, HEAD_DIMS, NUM_MAPS, BLOCK_MAPS,
                            SHIFTS, BLOCK_SHIFTS)
        grads_of_taps = load(grad_taps + channel * SHIFTS + index, is_shift)
        grad_shifts += biases[:, None] * grads_of_taps[None, :]
    shifts = load_shifts(shift_weight, channel, SHIFTS, BLOCK_SHIFTS)
    tl.store(rate_shares + 2 * channel + 1, tl.sum(tl.sum(shifts * grad_shifts, 1), 0))
    store(grad_shift_weight + channel * SHIFTS * SHIFTS + index[:, None] * SHIFTS + index[None, :],
          grad_shifts * rate, mask)
    if attention_bias is not None:
        grad_value = tl.load(grad_taps + channel * SHIFTS + SHIFTS // 2).to(tl.float32)
        share += grad_value * tl.load(attention_bias + channel).to(tl.float32)
        tl.store(grad_attention_bias + channel,
                 (grad_value * factor).to(grad_attention_bias.dtype.element_ty))
    tl.store(rate_shares + 2 * channel, share)


@triton.jit
def sum_rows(values, num_rows, columns, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum some columns of (num_rows, num_columns)."""
    row = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = 0
    while first < num_rows:
        place = (first + row)[:, None] * num_columns + columns[None, :]
        mask = (first + row < num_rows)[:, None] & (columns < num_columns)[None, :]
        sums += load(values + place, mask)
        first += ROWS
    return tl.sum(sums, 0)


@triton.jit
def sum_shares_kernel(shares, rate_shares, grad_fc_weight, grad_fc_bias, grad_attention_rate,
                      grad_convolution_rate, FC_ROWS: tl.constexpr, RATE_ROWS: tl.constexpr,
                      SHIFTS: tl.constexpr, NUM_MAPS: tl.constexpr, COLUMNS: tl.constexpr,
                      ROWS: tl.constexpr):
    """Sum over programs. The last program sums the rates, the others some columns of the fc."""
    if tl.program_id(0) < tl.num_programs(0) - 1:
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        total = sum_rows(shares, FC_ROWS, columns, SHIFTS * (NUM_MAPS + 1), ROWS, COLUMNS)
        shift, each = columns // (NUM_MAPS + 1), columns % (NUM_MAPS + 1)
        store(grad_fc_weight + shift * NUM_MAPS + each, total, (shift < SHIFTS) & (each < NUM_MAPS))
        if grad_fc_bias is not None:
            store(grad_fc_bias + shift, total, (shift < SHIFTS) & (each == NUM_MAPS))
    else:
        columns = tl.arange(0, COLUMNS)
        total = sum_rows(rate_shares, RATE_ROWS, columns, 2, ROWS, COLUMNS)
        if grad_attention_rate is not None:
            store(grad_attention_rate + columns, total, columns == 0)
        if grad_convolution_rate is not None:
            store(grad_convolution_rate + columns - 1, total, columns == 1)
