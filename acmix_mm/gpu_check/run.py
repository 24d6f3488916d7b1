"""Runs all checks and measurements within a time limit."""

import os
import sys
import time
from collections.abc import Iterator
from typing import Callable, NamedTuple, Optional

import torch

from acmix_mm.benchmark import processor
from acmix_mm.gpu_check.checks import Check, NotRun, check, first_line, planned_checks
from acmix_mm.gpu_check.measurements import Measurement, Sizes, comparisons, measure
from acmix_mm.gpu_check.targets import Target, targets
from acmix_mm.ops.backend import TRITON_VERSION, interprets_triton, triton_unavailable
from acmix_mm.utils.errors import UsageError

# What has not started then is reported as not run. The last step may take half a minute more.
MINUTES = 7.
# The part of it after which no check starts, so that the measurements have time.
CHECKS_PART = 0.55


class Report(NamedTuple):
    """Everything that was found.

    Attributes:
        statement: what ran, in a sentence.
        machine: device and versions.
        checks: comparisons with the reference.
        measurements: times.
        targets: the targets on an H200, with what was measured.
        not_run: what could not be run.
        minutes: how long it took.
    """

    statement: str
    machine: str
    checks: list[Check]
    measurements: list[Measurement]
    targets: list[Target]
    not_run: list[NotRun]
    minutes: float

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [each for each in self.checks if not each.passed]


def choose_device() -> tuple[str, Optional[str]]:
    """Choose the device, and make Triton interpret its kernels if there is no GPU.

    Returns:
        ``'cuda'`` and None, or ``'cpu'`` and why.

    Raises:
        UsageError: Triton is missing, or was imported before it could be made to interpret.
    """
    if interprets_triton():
        why = 'TRITON_INTERPRET=1 is set'
    else:
        why = triton_unavailable(torch.float32)
        if why is None:
            return 'cuda', None
        if 'triton' in sys.modules:
            raise UsageError('There is no GPU for the Triton kernels, and Triton is already '
                             'imported; set TRITON_INTERPRET=1 to run its interpreter.')
        # Triton reads it when it is imported.
        os.environ['TRITON_INTERPRET'] = '1'
        reason = triton_unavailable(torch.float32)
        if reason is not None:
            raise UsageError(f'gpu_check {reason}.')
    return 'cpu', why


def run_all(device: str, why_cpu: Optional[str], say: Callable[[str], None], *,
            sizes: Optional[Sizes] = None, minutes: float = MINUTES) -> Iterator[Report]:
    """Run everything that the device can run; yield a growing report, the last one complete.

    Args:
        device: ``'cuda'``, or ``'cpu'`` to run the kernels in Triton's interpreter.
        why_cpu: why there is no GPU.
        say: takes lines about the progress.
        sizes: of what is measured; those of the targets if None. On a CPU nothing is measured
            unless sizes are given.
        minutes: the time limit.
    """
    started = time.monotonic()
    checks: list[Check] = []
    measurements: list[Measurement] = []
    not_run: list[NotRun] = []

    def minutes_passed() -> float:
        return (time.monotonic() - started) / 60

    def report() -> Report:
        return Report(statement(device, why_cpu), machine(device), checks, measurements,
                      targets(measurements), not_run, minutes_passed())

    for plan in planned_checks(device):
        if isinstance(plan, NotRun):
            not_run.append(plan)
        elif minutes_passed() > CHECKS_PART * minutes:
            not_run.append(NotRun(str(plan), 'no time was left'))
        else:
            checks.append(check(plan, device))
            say(f'{"passed" if checks[-1].passed else "FAILED"}: {plan}')
    yield report()

    if device == 'cpu' and sizes is None:
        not_run.append(NotRun('all measurements', 'need a GPU'))
    else:
        for comparison in comparisons(device, sizes or Sizes()):
            what = f'{comparison.name}, {comparison.setting.dtype}'
            if minutes_passed() > minutes:
                not_run.append(NotRun(f'measuring {what}', 'no time was left'))
                continue
            say(f'measuring {what} …')
            try:
                found = measure(comparison)
            except Exception as error:
                # Such as a lack of memory, or a GPU that has failed in a check.
                found = [NotRun(f'measuring {what}', first_line(error))]
            for each in found:
                kind = {Check: checks, Measurement: measurements, NotRun: not_run}[type(each)]
                if each not in kind:
                    kind.append(each)
            yield report()
    yield report()


def statement(device: str, why_cpu: Optional[str]) -> str:
    """What a run on a device shows."""
    if device != 'cpu':
        return 'The kernels were compiled and run on a GPU.'
    return (f"No GPU was used ({why_cpu}): the kernels ran in Triton's interpreter, on small "
            'inputs. They were neither compiled nor timed, and no target was checked.')


def machine(device: str) -> str:
    """Device, versions and date."""
    parts = [time.strftime('%Y-%m-%d'), processor(device), f'torch {torch.__version__}',
             f'triton {TRITON_VERSION}']
    if device != 'cpu':
        parts += [f'CUDA {torch.version.cuda}', f'cuDNN {torch.backends.cudnn.version()}']
    return ', '.join(parts)
