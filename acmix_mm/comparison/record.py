"""A hook that records a compared run."""

import json
import math
import os
import time
from copy import deepcopy
from typing import Any, Optional

import numpy as np
from mmengine.device import get_device
from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from acmix_mm.benchmark import PeakMemory
from acmix_mm.engine.resuming import VALIDATED
from acmix_mm.utils.atomic_write import atomic_write

RESULT = 'result.json'
# Largest number of points in a loss curve.
CURVE_POINTS = 100


@HOOKS.register_module()
class RecordRun(Hook):
    """Write ``result.json`` to the work directory when training ends.

    Its entries are ``seed``; ``iterations``; ``training_seconds``, without validation and saving,
    summed over interruptions; ``peak_memory_mib``, the memory that one training step adds;
    ``metrics`` of the last validation; ``validations``, pairs of iteration and metrics; and
    ``loss``, pairs of iteration and mean loss since the previous pair.

    Checkpoints contain the record so far. Distributed, all processes validate with the buffers of
    the first, such as running statistics.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.recorded: dict[str, Any] = dict(
            training_seconds=0., peak_memory_mib=None, validations=[])
        self.started: Optional[float] = None
        self.memory: Optional[PeakMemory] = None
        self.steps = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.recorded = checkpoint.get('comparison', self.recorded)
        # A checkpoint that was saved for its best metrics does not have their record yet.
        validations = [iteration for iteration, _ in self.recorded['validations']]
        info = checkpoint['message_hub']['runtime_info']
        if info.get(VALIDATED) not in validations:
            info.pop(VALIDATED, None)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.stop()
        checkpoint['comparison'] = deepcopy(self.recorded)

    def before_train(self, runner: Runner) -> None:
        self.start()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.steps += 1
        # The first step of a process also makes allocations that stay.
        if self.steps == 2 and self.recorded['peak_memory_mib'] is None:
            self.memory = PeakMemory(get_device())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Optional[dict] = None) -> None:
        self.stop()
        self.start()

    def after_train_epoch(self, runner: Runner) -> None:
        self.start()

    def before_val(self, runner: Runner) -> None:
        self.stop()
        # Processes have running statistics of their own, of which a checkpoint has those of the
        # first. All validate with these, so that a resumed run has the same metrics.
        for buffer in runner.model.buffers():
            broadcast(buffer)

    def after_val_epoch(self, runner: Runner, metrics: Optional[dict[str, float]] = None) -> None:
        numbers = {key: float(value) for key, value in (metrics or {}).items()
                   if np.isscalar(value) and not isinstance(value, str)}
        self.recorded['validations'].append([runner.iter, numbers])

    def after_val(self, runner: Runner) -> None:
        self.start()

    def start(self) -> None:
        """Start timing. MMEngine's IterTimerHook would include evaluation and saving."""
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Add the time since :meth:`start` to the record; a second call adds nothing."""
        if self.memory is not None:
            self.recorded['peak_memory_mib'] = self.memory.mebibytes()
            self.memory = None
        if self.started is not None:
            self.recorded['training_seconds'] += time.perf_counter() - self.started
            self.started = None

    def after_train(self, runner: Runner) -> None:
        if runner.rank == 0:
            losses, _ = runner.message_hub.get_scalar('train/loss').data
            validations = self.recorded['validations']
            write_json(os.path.join(runner.work_dir, RESULT), dict(
                seed=runner.seed, iterations=runner.iter, **self.recorded,
                metrics=validations[-1][1] if validations else {}, loss=loss_curve(losses)))


def loss_curve(losses: np.ndarray) -> list[list[float]]:
    """Return pairs of iteration and mean loss since the previous pair, at most ``CURVE_POINTS``."""
    ends = np.unique(np.linspace(0, len(losses), CURVE_POINTS + 1).round().astype(int))
    means = [float(np.mean(losses[begin:end])) for begin, end in zip(ends, ends[1:])]
    # JSON cannot represent the infinities and NaNs of a diverged run.
    return [[int(end), mean if math.isfinite(mean) else None]
            for end, mean in zip(ends[1:], means)]


def write_json(path: str, content: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
