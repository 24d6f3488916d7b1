"""Timing rivals against each other, and the memory that each of them takes.

Rivals of a case run turn and turn about in one process, so that a machine that drifts drifts for
all; memory is taken in a fresh process for each, as the peak above the process before the call.
"""

import functools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

PASSES = ('forward', 'forward + backward')


class Case(NamedTuple):
    """Rivals by name, the slower or plain one first, and the input that they all take.

    A rival builds what is timed: a function from the input to tensors.
    """

    rivals: dict[str, Callable[[], Callable]]
    input_shape: tuple[int, ...]


class Result(NamedTuple):
    """Median seconds, and peak memory above the idle process in MiB, of one rival."""

    case: str
    passes: str
    rival: str
    seconds: float
    mebibytes: float


def acmix_conv(reference: bool) -> Callable[[Tensor], Tensor]:
    """An ACmixConv2d of 64 channels, on the reference form of its operators or as it runs."""
    from acmix_mm.layers import ACmixConv2d
    from acmix_mm.layers import acmix_conv as module
    layer = ACmixConv2d(64, 64)
    if not reference:
        return layer
    forms = {name: functools.partial(getattr(module, name), form='reference')
             for name in ('shift_conv', 'sliding_window_attention')}

    def run(x: Tensor) -> Tensor:
        with mock.patch.multiple(module, **forms):
            return layer(x)
    return run


def acmix_swin() -> nn.Module:
    from acmix_mm.backbones import ACmixSwinTransformer
    return ACmixSwinTransformer(drop_path_rate=0.)


def plain_swin() -> nn.Module:
    from mmdet.models.backbones.swin import SwinTransformer
    return SwinTransformer(drop_path_rate=0.)


def conv_case(height: int, width: int) -> Case:
    return Case(dict(reference=functools.partial(acmix_conv, True),
                     ACmixConv2d=functools.partial(acmix_conv, False)), (1, 64, height, width))


CASES = {
    'conv-100x168': conv_case(100, 168),
    'conv-200x336': conv_case(200, 336),
    'conv-400x672': conv_case(400, 672),
    'swin-t-896x1344': Case(dict(SwinTransformer=plain_swin, ACmixSwinTransformer=acmix_swin),
                            (1, 3, 896, 1344)),
}


def step(run: Callable, x: Tensor, passes: str) -> None:
    """Run once, forward or forward and backward."""
    with torch.set_grad_enabled(passes != 'forward'):
        out = run(x)
    if passes != 'forward':
        outs = [out] if isinstance(out, Tensor) else out
        sum(each.sum() for each in outs).backward()


def compare(name: str, passes: str, repeats: int) -> list[Result]:
    """Time the rivals of a case turn and turn about, after one round of warm-up."""
    case = CASES[name]
    x = torch.randn(case.input_shape, requires_grad=passes != 'forward')
    rivals = {rival: build() for rival, build in case.rivals.items()}
    seconds: dict[str, list[float]] = {rival: [] for rival in rivals}
    for _ in range(repeats + 1):
        for rival, run in rivals.items():
            start = time.perf_counter()
            step(run, x, passes)
            seconds[rival].append(time.perf_counter() - start)
    return [Result(name, passes, rival, statistics.median(seconds[rival][1:]),
                   peak_memory(name, passes, rival)) for rival in rivals]


def peak_memory(name: str, passes: str, rival: str) -> float:
    """Measure one rival in a process of its own; see :func:`report_peak_memory`. Linux alone."""
    code = f'import acmix_mm.benchmark as b; b.report_peak_memory({name!r}, {passes!r}, {rival!r})'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def report_peak_memory(name: str, passes: str, rival: str) -> None:
    """Print the MiB by which a pass raises this process's resident memory at its peak."""
    case = CASES[name]
    run = case.rivals[rival]()
    # What the first call loads for good is not the pass's own.
    step(run, torch.randn(*case.input_shape[:2], 32, 32), passes)
    x = torch.randn(case.input_shape, requires_grad=passes != 'forward')
    with open('/proc/self/clear_refs', 'w') as peak:
        peak.write('5')
    idle = resident('VmRSS')
    step(run, x, passes)
    print(resident('VmHWM') - idle)


def resident(entry: str) -> float:
    """MiB of an entry of this process's status, ``VmRSS`` or ``VmHWM``."""
    with open('/proc/self/status') as status:
        return int(re.search(rf'{entry}:\s+(\d+) kB', status.read()).group(1)) / 1024


def table(results: list[Result]) -> str:
    """The results as a Markdown table, with each rival's ratio to the first of its case."""
    lines = ['| case | pass | rival | seconds | ratio | peak MiB | ratio |',
             '|---|---|---|---|---|---|---|']
    first: dict[tuple[str, str], Result] = {}
    for result in results:
        base = first.setdefault((result.case, result.passes), result)
        lines.append(f'| {result.case} | {result.passes} | {result.rival} | {result.seconds:.3f} | '
                     f'{result.seconds / base.seconds:.3f} | {result.mebibytes:.0f} | '
                     f'{result.mebibytes / base.mebibytes:.3f} |')
    return '\n'.join(lines)
