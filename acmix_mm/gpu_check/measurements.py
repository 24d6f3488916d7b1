"""Times of operators, layers and backbones against their baselines, in interleaved runs."""

import functools
from collections.abc import Sequence
from typing import Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

from acmix_mm.benchmark import (
    COPY,
    DTYPES,
    PASSES,
    Case,
    Implementation,
    PeakMemory,
    Setting,
    bytes_moved,
    convolve,
    copy_of,
    interleaved_seconds,
    step,
    swin_tiny,
)
from acmix_mm.gpu_check.baselines import dense_conv, natten, neighbourhood_flex, window_flex
from acmix_mm.gpu_check.checks import (
    LAYER_FACTOR,
    TOLERANCE,
    Check,
    NotRun,
    first_line,
    full_precision,
    largest_error,
)
from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.ops import (
    projected_shift_conv,
    sliding_window_attention,
    use_backend,
    window_attention,
)
from acmix_mm.ops.backend import raising_kernel_errors

OURS, REFERENCE, PLAIN_SWIN = 'acmix_mm', 'reference', 'plain Swin-T'
SDPA, FLEX, NATTEN, DENSE_CONV = 'SDPA', 'flex_attention', 'NATTEN', "torch's 3×3 convolution"
CONV_LAYER, WINDOW_LAYER, BACKBONE = 'ACmixConv2d', 'WindowACmix', 'Swin-T'
REPEATS = 5
# flex_attention takes long to compile, for each pass and width.
FLEX_HEAD_DIMS = (16, 32)


class Sizes(NamedTuple):
    """Sizes of inputs.

    Attributes:
        batch: the batch size.
        map_size: (height, width) of maps, multiples of 8 and 16.
        window_map: (height, width) of maps that windows of 7 divide.
        image: (height, width) of images.
    """

    batch: int = 8
    map_size: tuple[int, int] = (200, 336)
    window_map: tuple[int, int] = (224, 336)
    image: tuple[int, int] = (800, 1344)


class Comparison(NamedTuple):
    """Implementations that run interleaved.

    Attributes:
        name: what they compute.
        setting: device, dtype and batch size.
        cases: implementations by name; those of one case have the same inputs. The first case has
            ``OURS`` and, if there is one, ``REFERENCE``.
    """

    name: str
    setting: Setting
    cases: Sequence[Case]


class Measurement(NamedTuple):
    """The median time of an implementation, and the peak of its memory.

    ``of_copy`` is the time of a copy of as many bytes as inputs, outputs and their gradients have,
    relative to its time; see :class:`acmix_mm.benchmark.Result`.
    """

    name: str
    dtype: str
    passes: str
    implementation: str
    milliseconds: float
    mebibytes: float
    of_copy: float


def sliding_name(head_dims: int) -> str:
    """The name of the comparison of sliding attention with 4 heads of ``head_dims``."""
    return f'sliding_window_attention, {head_dims} channels per head'


def comparisons(device: str, sizes: Sizes) -> list[Comparison]:
    """All comparisons, the most important ones first."""
    half = Setting(device, 'bfloat16', sizes.batch)
    conv_layer = layer_case(functools.partial(ACmixConv2d, 64, 64), (64, *sizes.map_size))
    window_layer = Case({
        REFERENCE: Implementation(functools.partial(ReferenceWindows, 96, 3, 7, 3), REFERENCE),
        OURS: Implementation(functools.partial(WindowACmix, 96, 3, 7, 3))},
        [(None, *sizes.map_size, 96)])
    return [
        Comparison(CONV_LAYER, half, [conv_layer]),
        Comparison(CONV_LAYER, half._replace(dtype='float32'), [conv_layer]),
        sliding_comparison(half, sizes, 16),
        Comparison(BACKBONE, half, [Case({
            PLAIN_SWIN: Implementation(plain_swin(sizes.image)),
            OURS: Implementation(functools.partial(swin_tiny, True))},
            [(None, 3, *sizes.image)], autocast=True)]),
        Comparison(WINDOW_LAYER, half, [window_layer]),
        sliding_comparison(half, sizes, 32),
        sliding_comparison(half, sizes, 64),
        window_comparison(half, sizes),
        *conv_comparisons(half, sizes),
    ]


def layer_case(build: Callable[[], nn.Module], shape: Sequence[int]) -> Case:
    return Case({REFERENCE: Implementation(build, REFERENCE), OURS: Implementation(build)},
                [(None, *shape)])


class ReferenceWindows(WindowACmix):
    """WindowACmix whose attention runs in SDPA: memory of its reference grows with the square of
    the map.
    """

    def attend(self, *projected: Tensor) -> Tensor:
        with use_backend('sdpa'):
            return super().attend(*projected)


def plain_swin(image: tuple[int, int]) -> Callable[[], nn.Module]:
    """Build MMDetection's Swin-T or, without MMDetection, timm's."""
    def build() -> nn.Module:
        try:
            return swin_tiny(False)
        except ImportError as error:
            try:
                import timm
            except ImportError:
                raise error from None
            return timm.create_model('swin_tiny_patch4_window7_224', features_only=True,
                                     img_size=image, drop_path_rate=0.)
    return build


def sliding_comparison(setting: Setting, sizes: Sizes, head_dims: int) -> Comparison:
    """Sliding attention over 7×7 positions, 4 heads."""
    (height, width), heads, kernel_size = sizes.map_size, 4, 7
    run = functools.partial(sliding_window_attention, kernel_size=kernel_size)
    cases = [
        Case({OURS: Implementation(lambda: run), SDPA: Implementation(lambda: run, 'dense')},
             [(None, height, width, 3, heads, head_dims), (height, width, head_dims)]),
        Case({NATTEN: Implementation(functools.partial(natten, kernel_size))},
             [(None, height, width, heads, head_dims)] * 3)]
    if head_dims in FLEX_HEAD_DIMS:
        flex = functools.partial(neighbourhood_flex, height, width, kernel_size, setting.device)
        cases.append(Case({FLEX: Implementation(flex)},
                          [(None, heads, height * width, head_dims)] * 3))
    return Comparison(sliding_name(head_dims), setting, cases)


def window_comparison(setting: Setting, sizes: Sizes) -> Comparison:
    """Attention in windows of 7×7, shifted except in flex_attention; 3 heads of 32 channels."""
    (height, width), heads, head_dims = sizes.window_map, 3, 32
    run = functools.partial(window_attention, window_size=(7, 7), shift_size=3)
    windows = setting.batch * height * width // 49
    return Comparison('window_attention', setting, [
        Case({OURS: Implementation(lambda: run), SDPA: Implementation(lambda: run, 'sdpa')},
             [(None, height, width, 3, heads, head_dims), (heads, 49, 49)]),
        Case({FLEX: Implementation(functools.partial(window_flex, setting.device))},
             [*[(windows, heads, 49, head_dims)] * 3, (heads, 49, 49)])])


def conv_comparisons(setting: Setting, sizes: Sizes) -> list[Comparison]:
    """The convolution path from projections and from the input; 64 channels, 4 heads."""
    height, width = sizes.map_size
    dense = Case({DENSE_CONV: Implementation(lambda: dense_conv)},
                 [(None, height, width, 64), (64, 64, 3, 3)])
    weights = [(9, 12), (64, 9, 3, 3)]
    return [
        Comparison('shift_conv', setting, [
            Case({OURS: Implementation(lambda: convolve)},
                 [(None, height, width, 3, 4, 16), *weights]), dense]),
        Comparison('projected_shift_conv', setting, [
            Case({OURS: Implementation(lambda: project_and_convolve)},
                 [(None, height, width, 64), (192, 64), (192,), *weights]), dense])]


def project_and_convolve(x: Tensor, *weights: Tensor) -> Tensor:
    """:func:`acmix_mm.ops.projected_shift_conv` of (batch, height, width, channels)."""
    return projected_shift_conv(x.permute(0, 3, 1, 2), *weights).permute(0, 2, 3, 1)


def measure(comparison: Comparison,
            repeats: int = REPEATS) -> list[Union[Measurement, NotRun, Check]]:
    """Time all implementations, forward and with the backward pass.

    A baseline that fails is reported as not run; ``OURS`` as a failed check. Where there is a
    reference, a check compares the results at this size.
    """
    found: list[Union[Measurement, NotRun, Check]] = []
    for passes in PASSES:
        with raising_kernel_errors():
            found += measure_pass(comparison, passes, repeats)
        if comparison.setting.device != 'cpu':
            # The reference takes most of the memory.
            torch.cuda.empty_cache()
    return found


def measure_pass(comparison: Comparison, passes: str,
                 repeats: int) -> list[Union[Measurement, NotRun, Check]]:
    found: list[Union[Measurement, NotRun, Check]] = []
    name, setting = comparison.name, comparison.setting
    runs: dict[str, Callable[[], object]] = {}
    for case in comparison.cases:
        inputs = setting.inputs(case, requires_grad=passes != 'forward')
        results: dict[str, list[Tensor]] = {}
        for each in case.implementations:
            try:
                # The same weights for each.
                torch.manual_seed(0)
                run = functools.partial(step, setting.build(case, each), inputs, passes)
                with full_precision():
                    outputs = run()
                if setting.device != 'cpu':
                    # Errors of its kernels are raised here.
                    torch.cuda.synchronize()
                results[each] = [*outputs, *(tensor.grad for tensor in inputs
                                             if tensor.grad is not None)]
            except Exception as error:
                message = first_line(error)
                if isinstance(error, ImportError):
                    found.append(NotRun(f'{each}: {name}', message))
                elif each == OURS:
                    found.append(size_check(comparison, passes, None, message))
                else:
                    found.append(NotRun(f'{each}: {name}, {setting.dtype}, {passes}', message))
                continue
            runs[each] = run
            if each == OURS:
                moved = bytes_moved(inputs, outputs, passes)
                runs[COPY] = copy_of(moved, setting.device)
        if OURS in results and REFERENCE in results:
            error = largest_error(results[OURS],
                                  [each.double() for each in results[REFERENCE]])
            found.append(size_check(comparison, passes, error, None))
    if OURS not in runs:
        return found
    seconds = interleaved_seconds(runs, setting.device, repeats)
    for each, run in runs.items():
        peak = PeakMemory(setting.device)
        run()
        found.append(Measurement(name, setting.dtype, passes, each, 1000 * seconds[each],
                                 peak.mebibytes(), seconds[COPY] / seconds[each]))
    return found


def size_check(comparison: Comparison, passes: str, error: Optional[float],
               message: Optional[str]) -> Check:
    """A check of ``OURS`` against the reference in the same dtype, whose errors are as large."""
    dtype = comparison.setting.dtype
    tolerance = 2 * LAYER_FACTOR * TOLERANCE[DTYPES[dtype]]
    return Check(comparison.name, f'as measured, {passes}', 'automatic', dtype, 'eager', error,
                 tolerance, 0., message, error is not None and error <= tolerance)
