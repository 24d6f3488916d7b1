"""The targets of the kernels on an H200, and whether measurements meet them."""

from collections.abc import Sequence
from typing import NamedTuple, Optional

from acmix_mm.benchmark import COPY, PASSES
from acmix_mm.gpu_check.measurements import (
    BACKBONE,
    CONV_LAYER,
    FLEX,
    FLEX_HEAD_DIMS,
    NATTEN,
    OURS,
    PLAIN_SWIN,
    REFERENCE,
    Measurement,
    sliding_name,
)


class Target(NamedTuple):
    """A measure and its bound.

    Attributes:
        measure: what is measured.
        target: the bound, as text.
        value: the measured value, as text; None if it was not measured.
        met: whether it meets the bound; None if it was not measured.
    """

    measure: str
    target: str
    value: Optional[str]
    met: Optional[bool]


def targets(measurements: Sequence[Measurement]) -> list[Target]:
    """All targets, with what was measured."""
    times = {(each.name, each.dtype, each.passes, each.implementation): each.milliseconds
             for each in measurements}

    def speedup(name: str, passes: str, baseline: str, dtype: str = 'bfloat16') -> Optional[float]:
        """How many times longer the baseline takes."""
        ours, others = (times.get((name, dtype, passes, each)) for each in (OURS, baseline))
        return None if ours is None or others is None else others / ours

    found = []
    for dtype in ('bfloat16', 'float32'):
        for passes, bound in zip(PASSES, (20, 15)):
            found.append(at_least(
                f'{CONV_LAYER}, {dtype}, {passes}, against the reference', bound, f'{bound}×',
                '{:.1f}×', speedup(CONV_LAYER, passes, REFERENCE, dtype)))
    for head_dims, bound in ((16, 0.3), (32, 0.6), (64, 0.6)):
        for passes in PASSES:
            name = sliding_name(head_dims)
            found.append(at_least(f'{name}, {passes}, bandwidth against a copy', bound,
                                  f'{bound:.0%}', '{:.0%}', speedup(name, passes, COPY)))
    for head_dims in (16, 32, 64):
        for passes in PASSES:
            name = sliding_name(head_dims)
            for baseline in (NATTEN, FLEX) if head_dims in FLEX_HEAD_DIMS else (NATTEN,):
                ratio = speedup(name, passes, baseline)
                found.append(Target(f'{name}, {passes}, against {baseline}', 'faster',
                                    None if ratio is None else f'{ratio:.2f}×',
                                    None if ratio is None else ratio > 1))
    for passes in PASSES:
        ratio = speedup(BACKBONE, passes, PLAIN_SWIN)
        found.append(Target(
            f'{BACKBONE}, bfloat16 autocast, {passes}, time relative to plain Swin-T', '≤ 1.0×',
            None if ratio is None else f'{1 / ratio:.3f}×', None if ratio is None else ratio >= 1))
    return found


def at_least(measure: str, bound: float, bound_text: str, form: str,
             value: Optional[float]) -> Target:
    return Target(measure, f'≥ {bound_text}', None if value is None else form.format(value),
                  None if value is None else value >= bound)
