"""What is checked: operators and layers at sizes whose borders matter, as functions of tensors."""

import functools
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.func import functional_call

from acmix_mm.gpu_check.inputs import (
    aggregation_tensors,
    conv_tensors,
    encoding_tensors,
    features_tensors,
    involution_tensors,
    padded_window_tensors,
    projected_tensors,
    random_tensors,
    sliding_tensors,
    sum_tensors,
    weights_tensors,
    window_tensors,
)
from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.layers.window_acmix import relative_position_index
from acmix_mm.ops import (
    BlockPattern,
    add_paths,
    block_attention,
    compose_paths,
    global_attention,
    involution,
    patch_aggregation,
    patch_features,
    position_bias,
    position_encoding,
    projected_shift_conv,
    roll_map,
    shift_conv,
    sliding_window_attention,
    window_attention,
)

# Strips and tiles, heads of all widths, borders, strides, dilations, and heads adjacent in memory.
SLIDING = (
    # (batch, heads, head_dims, height, width, heads_last), kernel_size, stride, dilation
    ((2, 2, 16, 10, 18), 7, 1, 1),
    ((1, 2, 16, 4, 4), 7, 1, 1),
    ((1, 1, 24, 9, 7), 5, 1, 1),
    ((1, 1, 32, 5, 17), 7, 1, 1),
    ((1, 1, 16, 2, 9), 3, 1, 1),
    ((1, 1, 16, 1, 2), 7, 1, 1),
    ((1, 2, 16, 9, 13), 7, 2, 1),
    ((1, 2, 16, 9, 13), 7, 1, 2),
    ((1, 1, 64, 9, 5), 7, 1, 1),
    ((1, 1, 128, 5, 9), 7, 1, 1),
    ((1, 2, 16, 9, 8, True), 7, 1, 1),
)
INTERPRETED_SLIDING = (((1, 1, 16, 5, 9), 7, 1, 1), ((1, 1, 16, 5, 4), 3, 2, 1),
                       ((1, 1, 16, 5, 4), 3, 1, 2))
# Windows of 2 to 12, shifted and not.
WINDOWS = (
    # (batch, grid, window_size, heads, head_dims), shift_size
    ((2, (2, 3), (7, 7), 3, 32), 3),
    ((1, (1, 2), (7, 7), 2, 32), 0),
    ((1, (2, 2), (2, 2), 2, 16), 1),
    ((1, (2, 1), (12, 12), 1, 32), 6),
    ((1, (1, 1), (5, 6), 2, 32), 0),
)
INTERPRETED_WINDOWS = (((1, (2, 1), (3, 3), 1, 16), 1), ((1, (1, 2), (2, 2), 1, 16), 0))
# Maps that windows do not divide, padded and rolled by the operator.
PADDED_WINDOWS = (
    # (batch, size, window_size, heads, head_dims), shift_size
    ((2, (9, 17), (7, 7), 3, 32), 3),
    ((1, (13, 8), (12, 12), 1, 32), 6),
    ((1, (5, 5), (2, 2), 2, 16), 0),
)
INTERPRETED_PADDED_WINDOWS = (((1, (4, 5), (3, 3), 1, 16), 1),)
# Folded and in two steps, both layouts, with and without bias.
SHIFTS = (
    # (batch, heads, head_dims, height, width, kernel_size, bias, channels_last), stride, dilation
    ((2, 4, 16, 9, 13, 3, True, True), 1, 1),
    ((1, 5, 8, 5, 6, 3, True, True), 1, 1),
    ((1, 3, 32, 9, 13, 3, False, False), 2, 1),
    ((1, 4, 16, 9, 13, 3, True, True), 1, 2),
    ((1, 1, 4, 7, 4, 5, True, True), 2, 3),
)
INTERPRETED_SHIFTS = (((1, 1, 4, 4, 5, 3, True, False), 2, 1),
                      ((1, 1, 4, 4, 5, 3, False, True), 1, 2))
# Dense and grouped, with and without each bias and the rates.
WEIGHTS = (
    # (in_channels, heads, head_dims, kernel_size, bias, fc_bias, rates, attention_bias), is_grouped
    ((32, 2, 16, 3, True, True, True, True), False),
    ((200, 2, 24, 3, True, True, True, True), True),
    ((96, 12, 32, 3, True, True, True, False), True),
    ((64, 4, 16, 5, True, False, True, False), False),
    ((64, 4, 16, 3, False, False, True, False), False),
)
INTERPRETED_WEIGHTS = (((5, 2, 2, 3, True, True, True, True), False),
                       ((5, 2, 2, 3, True, True, True, True), True))
# Rolled, in the memory order of images, with strides and dilations, without taps.
SUMS = (
    # (batch, height, width, channels, kernel_size), options
    ((2, 9, 13, 32, 3), dict(size=(9, 13), shift_size=3)),
    ((1, 5, 70, 24, 3), dict(size=(5, 70), channels_first=True)),
    ((1, 3, 9, 70, 5), dict(size=(5, 18), stride=2, dilation=2, channels_first=True)),
    ((2, 4, 5, 16, 1), dict(size=(4, 5))),
    ((1, 1, 9, 8), dict(size=(1, 9), shift_size=3)),
)
INTERPRETED_SUMS = (((1, 2, 5, 4, 3), dict(size=(2, 5), shift_size=3)),
                    ((1, 2, 3, 4, 3), dict(size=(3, 6), stride=2, channels_first=True)))
# Wide maps, and maps of one row or column.
ENCODINGS = (
    # head_dims, height, width
    (16, 5, 70), (24, 33, 1), (1, 1, 3),
)
INTERPRETED_ENCODINGS = ((4, 2, 33),)
# Tables of larger windows, and windows larger than a warp.
BIASES = (
    # heads, side, window_size
    (3, 7, (7, 7)), (2, 4, (2, 3)), (1, 12, (12, 12)),
)
INTERPRETED_BIASES = ((2, 3, (2, 3)),)
ROLLS = (
    # shape, shift_size
    ((2, 9, 33, 32), -3), ((1, 3, 5, 200), 2), ((1, 1, 9, 4), -7),
)
INTERPRETED_ROLLS = (((1, 3, 33, 2), -2), ((1, 1, 3, 130), 7))


class Subject(NamedTuple):
    """An operator or a layer, with its arguments.

    Attributes:
        name: of the operator or the layer.
        case: its arguments.
        run: takes tensors; returns one.
        tensors: makes these tensors, float32 on the CPU; some may be None.
        is_layer: whether it is a layer.
    """

    name: str
    case: str
    run: Callable[..., Tensor]
    tensors: Callable[[], list[Optional[Tensor]]]
    is_layer: bool


def operators(interpreted: bool) -> list[Subject]:
    """Every operator; the first case of each with kernels also runs compiled and in CUDA graphs.

    Args:
        interpreted: only what Triton's interpreter runs in a few seconds: small cases of the
            operators with kernels of their own.
    """
    if interpreted:
        return [*sliding_cases(INTERPRETED_SLIDING), *window_cases(INTERPRETED_WINDOWS),
                *padded_window_cases(INTERPRETED_PADDED_WINDOWS), *shift_cases(INTERPRETED_SHIFTS),
                *weights_cases(INTERPRETED_WEIGHTS), *sum_cases(INTERPRETED_SUMS),
                *encoding_cases(INTERPRETED_ENCODINGS), *bias_cases(INTERPRETED_BIASES),
                *roll_cases(INTERPRETED_ROLLS)]
    return [*sliding_cases(SLIDING), *window_cases(WINDOWS), *padded_window_cases(PADDED_WINDOWS),
            *shift_cases(SHIFTS), *projected_cases(), *weights_cases(WEIGHTS), *sum_cases(SUMS),
            *encoding_cases(ENCODINGS), *bias_cases(BIASES), *roll_cases(ROLLS), *other_cases()]


def layers(interpreted: bool) -> list[Subject]:
    """Both layers, at sizes that strides and windows do not divide; see :func:`operators`."""
    if interpreted:
        conv, window = (1, 4, 4, 5), (1, 4, 5, 4)
        narrow = functools.partial(ACmixConv2d, 4, 4, num_heads=1)
        return [layer('ACmixConv2d', '4 channels', narrow, conv),
                layer('WindowACmix', 'window 3, shift 1',
                      functools.partial(WindowACmix, 4, 1, 3, shift_size=1), window)]
    conv, window = (1, 32, 9, 13), (2, 10, 17, 32)
    strided = functools.partial(ACmixConv2d, 32, 64, num_heads=4)
    wide = functools.partial(WindowACmix, 32, 2)
    return [
        layer('ACmixConv2d', '2 heads of 16', lambda: ACmixConv2d(32, 32, num_heads=2), conv),
        layer('ACmixConv2d', 'stride 2', functools.partial(strided, stride=2), conv),
        layer('ACmixConv2d', 'dilation 2', functools.partial(strided, dilation=2), conv),
        layer('ACmixConv2d', 'channels last', lambda: ACmixConv2d(32, 32, num_heads=2), conv, True),
        layer('WindowACmix', 'window 7, shift 3', lambda: wide(7, shift_size=3), window),
        layer('WindowACmix', 'window 7', lambda: wide(7), window),
        layer('WindowACmix', 'window 4, shift 1', lambda: wide(4, shift_size=1), window),
        layer('WindowACmix', 'a map below one window', lambda: wide(18, shift_size=9), window),
    ]


def layer(name: str, case: str, build: Callable[[], nn.Module], shape: Sequence[int],
          channels_last: bool = False) -> Subject:
    """A layer as a function of its input and its parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build()
    names = [each for each, _ in module.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        # Buffers are indices.
        buffers = {each: buffer.to(x.device) for each, buffer in module.named_buffers()}
        return functional_call(module, {**dict(zip(names, parameters)), **buffers}, (x,))

    def tensors() -> list[Optional[Tensor]]:
        x = torch.randn(*shape)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        # Where a layer starts, some gradients are zero.
        return [x, *(each.detach() + 0.1 * torch.randn_like(each)
                     for each in module.parameters())]
    return Subject(name, case, run, tensors, True)


def operator(run: Callable[..., Tensor], make: Callable, arguments: Sequence,
             **options: object) -> Subject:
    """An operator with options, on the tensors that ``make`` returns."""
    case = ', '.join([f'{make.__name__}{tuple(arguments)}',
                      *(f'{key}={value}' for key, value in options.items())])
    return Subject(run.__name__, case, functools.partial(run, **options),
                   lambda: make(*arguments), False)


def sliding_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(sliding_window_attention, sliding_tensors, arguments, kernel_size=kernel_size,
                     stride=stride, dilation=dilation)
            for arguments, kernel_size, stride, dilation in cases]


def window_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(window_attention, window_tensors, arguments, window_size=arguments[2],
                     shift_size=shift_size) for arguments, shift_size in cases]


def padded_window_cases(cases: Sequence[tuple]) -> list[Subject]:
    """Maps that are rolled by the operator, and maps that have been rolled."""
    def window_attention_in_place(qkv: Tensor, bias: Tensor, padding: Tensor,
                                  **options: Any) -> Tensor:
        return window_attention(qkv, bias, padding=padding, **options)

    return [operator(window_attention_in_place, padded_window_tensors, arguments,
                     window_size=arguments[2], shift_size=shift_size, is_rolled=is_rolled)._replace(
                         name='window_attention')
            for arguments, shift_size in cases for is_rolled in (False, True)]


def shift_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(shift_conv, conv_tensors, arguments, stride=stride, dilation=dilation)
            for arguments, stride, dilation in cases]


def weights_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(composed_weights, weights_tensors, arguments, is_grouped=is_grouped)._replace(
        name='compose_paths') for arguments, is_grouped in cases]


def composed_weights(weight: Tensor, *others: Optional[Tensor], **options: Any) -> Tensor:
    """All results of :func:`acmix_mm.ops.compose_paths` in one tensor."""
    results = compose_paths(weight, *others, weight.dtype, **options)
    return torch.cat([each.flatten().to(weight.dtype) for each in results if each is not None])


def sum_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(add_paths, sum_tensors, arguments, **options) for arguments, options in cases]


def encoding_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(encoding, encoding_tensors, (head_dims,), height=height,
                     width=width)._replace(name='position_encoding')
            for head_dims, height, width in cases]


def encoding(weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """:func:`acmix_mm.ops.position_encoding`, rounded to the dtype of its weight."""
    return position_encoding(weight, bias, dtype=weight.dtype, **options).to(weight.dtype)


def bias_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(biases, random_tensors, ((2 * side - 1)**2, heads), side=side,
                     window_size=window_size)._replace(name='position_bias')
            for heads, side, window_size in cases]


def biases(table: Tensor, side: int, **options: Any) -> Tensor:
    """:func:`acmix_mm.ops.position_bias` for windows of ``side``."""
    return position_bias(table, relative_position_index(side).to(table.device), **options)


def roll_cases(cases: Sequence[tuple]) -> list[Subject]:
    return [operator(rolled, random_tensors, shape, shift_size=shift_size)._replace(
        name='roll_map') for shape, shift_size in cases]


def rolled(x: Tensor, **options: Any) -> Tensor:
    """:func:`acmix_mm.ops.roll_map` without a change of dtype."""
    return roll_map(x, dtype=x.dtype, **options)


def projected_cases() -> list[Subject]:
    """With and without each bias."""
    cases = [
        # batch, in_channels, heads, head_dims, height, width, kernel_size, bias, fc_bias; stride
        # and dilation
        ((2, 32, 2, 16, 9, 13, 3, True, True), 1, 1),
        ((1, 32, 2, 16, 9, 13, 3, True, False), 2, 1),
        ((1, 32, 2, 16, 9, 13, 3, False, True), 1, 2),
    ]
    return [operator(projected_shift_conv, projected_tensors, arguments, stride=stride,
                     dilation=dilation) for arguments, stride, dilation in cases]


def other_cases() -> list[Subject]:
    """The operators that have no kernels of their own."""
    return [operator(patch_features, features_tensors, (1, 8, 6, 7, 3), kernel_size=3),
            operator(patch_aggregation, aggregation_tensors, (1, 8, 6, 7, 3), kernel_size=3),
            operator(involution, involution_tensors, (1, 2, 4, 9, 8, 3, 2), stride=2),
            operator(global_attention, sliding_tensors, (2, 2, 16, 9, 14)),
            operator(block_attention, sliding_tensors, (2, 2, 16, 9, 14),
                     pattern=BlockPattern(4, 3)),
            operator(block_attention, sliding_tensors, (2, 2, 16, 9, 14),
                     pattern=BlockPattern(4, 3, 4, has_window=True), stride=2)]
