"""Resuming: from the newest intact checkpoint, with the same results as an uninterrupted run."""

import logging
import os
import re
import zipfile
from bisect import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mmengine.config import Config
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed

from acmix_mm.engine.samples import forget_images
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import CheckpointError

CHECKPOINT_NAME = re.compile(r'(epoch|iter)_(\d+)\.pth')
# Where a checkpoint records, in its message hub, the iteration of the last validation.
VALIDATED = 'last_validated_iter'
EARLY_STOPPING = 'early_stopping'


def repair_last_checkpoint(work_dir: str) -> None:
    """Make ``last_checkpoint``, from which MMEngine resumes, name the newest intact checkpoint.

    Prints which checkpoints are damaged. Nothing changes if there are no checkpoints.

    Raises:
        CheckpointError: there are checkpoints, but none is intact.
    """
    pointer = Path(work_dir, 'last_checkpoint')
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if '://' in named:
        return
    # The path is absolute, but the folder may have been moved.
    last = Path(named) if os.path.exists(named) else Path(work_dir, Path(named).name)
    folder = last.parent if named else Path(work_dir)
    written = [path for path in folder.glob('*.pth') if CHECKPOINT_NAME.fullmatch(path.name)]
    candidates = sorted(written, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if named:
        # Later ones are left from another run.
        candidates = [last, *(path for path in candidates if step_of(path) < step_of(last))]
    intact = next(filter(is_intact, candidates), None)
    damaged = candidates[:candidates.index(intact) if intact else None]
    if damaged and intact is None:
        raise CheckpointError(
            f'No checkpoint in {work_dir} is intact; missing or damaged: '
            f'{", ".join(path.name for path in damaged)}. Name another checkpoint with --resume '
            'CHECKPOINT, or delete these files to train from the start.')
    if damaged:
        print_log(f'Missing or damaged: {", ".join(map(str, damaged))}; resuming from {intact}.',
                  logger='current', level=logging.WARNING)
    if intact is not None and named != str(intact.absolute()):
        with atomic_write(pointer) as temporary:
            temporary.write_text(str(intact.absolute()))


def step_of(checkpoint: Path) -> int:
    """The epoch or iteration in the name of a checkpoint; 0 if it has none."""
    found = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(found[2]) if found else 0


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, by the checksums of torch's format.

    A folder, which sharded checkpoints are, counts as intact.
    """
    if checkpoint.is_dir():
        return True
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile):
        return False


def is_epoch_based(cfg: Config) -> bool:
    """Whether a config trains for epochs rather than iterations."""
    return cfg.train_cfg.get('by_epoch', 'max_epochs' in cfg.train_cfg)


def make_reproducible(cfg: Config) -> None:
    """Make a run with ``randomness.seed`` give the same results when it is interrupted and resumed.

    Other runs are not changed.
    """
    if (cfg.get('randomness') or {}).get('seed') is None:
        return
    hooks = list(cfg.get('custom_hooks') or [])
    for hook in (SeedSteps, KeepEarlyStopping, RepeatValidation):
        # Configs in work directories have them already.
        name = f'{__name__}.{hook.__name__}'
        if not any(isinstance(each, dict) and each['type'] == name for each in hooks):
            hooks.append(dict(type=name))
    cfg.custom_hooks = hooks
    if is_epoch_based(cfg):
        # Workers that live on would need their state saved. MMEngine's worker_init_fn would give
        # them the same seeds in each epoch.
        cfg.train_dataloader.persistent_workers = False
        cfg.train_dataloader.setdefault(
            'worker_init_fn', dict(type=f'{__name__}.{keep_torch_seed.__name__}'))


def keep_torch_seed(worker_id: int) -> None:
    """Do nothing, in place of MMEngine's worker_init_fn, so that workers keep torch's seeds."""


class SeedSteps(Hook):
    """Make random numbers depend only on the seed, the rank, and the iteration.

    A resumed run then gives the same results as an uninterrupted one, and networks that draw
    different random numbers see the same augmented images. In epoch-based training the seed is set
    once per epoch, for which the data loader must restart its workers. Transforms that keep images
    of earlier samples, such as CachedMosaic, then forget them in each epoch, also without workers.
    """

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop):
            # On resuming, the loop skips the batches that were already trained on.
            loop.dataloader_iterator = SeededBatches(loop.dataloader_iterator, runner.seed,
                                                     runner.rank)

    def before_train_epoch(self, runner: Runner) -> None:
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            set_random_seed(step_seed(runner.seed, runner.epoch, runner.rank))
            # Those of worker processes end with the workers.
            forget_images(runner.train_dataloader.dataset)


class SeededBatches:
    """Set the seed before each batch is loaded; training on the batch follows that seed."""

    def __init__(self, batches: Iterator, seed: int, rank: int) -> None:
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.step = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        set_random_seed(step_seed(self.seed, self.step, self.rank))
        self.step += 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """Load batches without training on them; MMEngine's fork calls this on resuming."""
        for _ in range(num_iters):
            next(self)


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


class KeepEarlyStopping(Hook):
    """Save how long early stopping has waited; MMEngine's hook would wait anew on resuming."""

    # With the same priority as early stopping, it follows because it is registered later.
    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        saved = runner.message_hub.runtime_info.get(EARLY_STOPPING, [])
        for hook, (wait_count, best_score) in zip(self.watched(runner), saved):
            hook.wait_count, hook.best_score = wait_count, best_score

    def after_val_epoch(self, runner: Runner, metrics: Optional[dict[str, float]] = None) -> None:
        states = [(hook.wait_count, float(hook.best_score)) for hook in self.watched(runner)]
        if states:
            runner.message_hub.update_info(EARLY_STOPPING, states)

    @staticmethod
    def watched(runner: Runner) -> list[EarlyStoppingHook]:
        return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


class RepeatValidation(Hook):
    """Repeat a validation that was interrupted, when training is resumed.

    MMEngine saves before it validates, and would continue with the next iteration.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        if runner.val_loop is not None and self.is_due(runner):
            runner.val_loop.run()

    def is_due(self, runner: Runner) -> bool:
        """Whether a validation is due at the loaded checkpoint, and not recorded in it."""
        loop = runner.train_loop
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
        interval = loop.dynamic_intervals[bisect(loop.dynamic_milestones, done + 1) - 1]
        return (done >= max(loop.val_begin, 1) and (done % interval == 0 or done >= last)
                and runner.message_hub.runtime_info.get(VALIDATED) != runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        # The next checkpoint is saved when the metrics are known, if they are the best.
        runner.message_hub.update_info(VALIDATED, runner.iter)
