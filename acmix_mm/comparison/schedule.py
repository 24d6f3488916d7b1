"""Training length of compared networks: the config's schedule, stretched to a budget if given."""

import argparse
import math
import re
from copy import deepcopy
from typing import NamedTuple, Optional, Union

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from acmix_mm.engine.resuming import is_epoch_based
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError

# Arguments of MMEngine's schedulers that are times or durations.
TIMES = ('begin', 'end', 'T_max', 'step_size', 'total_steps', 'milestones', 'periods')
# Schedulers without a duration that could be stretched.
WITHOUT_LENGTH = re.compile('Exponential|ReduceOnPlateau')
# Smallest number of checkpoints that an iteration-based run writes, to resume from.
CHECKPOINTS = 10


class Budget(NamedTuple):
    """The length of every run, in iterations or in minutes of training.

    Attributes:
        amount: the number of units.
        unit: ``'iters'`` or ``'minutes'``.
    """

    amount: float
    unit: str

    def __str__(self) -> str:
        return f'{self.amount:g} {self.unit.removesuffix("s") if self.amount == 1 else self.unit}'


def read_budget(text: str) -> Budget:
    """Convert ``300iters`` or ``20minutes`` to a budget, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    found = re.fullmatch(r'(\d+)\s*(iters)|(\d+(?:\.\d+)?)\s*(minutes)', text)
    amount = float(found[1] or found[3]) if found else 0.
    if amount == 0.:
        raise argparse.ArgumentTypeError('must be iterations or minutes of training, as in '
                                         f'300iters or 20minutes; got {text}')
    return Budget(amount, found[2] or found[4])


def iterations_of_epoch(cfg: Config, processes: int) -> int:
    """Build the training data, and return the number of batches of a process in an epoch."""
    batches = len(Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0))
    return math.ceil(batches / processes)


def iterations_of(cfg: Config, processes: int = 1) -> int:
    """Return the number of iterations of the config's own schedule."""
    if is_epoch_based(cfg):
        return cfg.train_cfg.max_epochs * iterations_of_epoch(cfg, processes)
    return cfg.train_cfg.max_iters


def stretch(cfg: Config, iterations: int, processes: int = 1) -> None:
    """Stretch the whole schedule of a config, warm-up included, to a number of iterations.

    Training becomes iteration-based; the number of validations stays the same.

    Raises:
        UsageError: a scheduler has no duration.
    """
    by_epoch = is_epoch_based(cfg)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]
    for scheduler in schedulers:
        name = type_name(scheduler.type)
        if WITHOUT_LENGTH.search(name):
            raise UsageError(f'--budget cannot stretch the scheduler {name}: set another '
                             'schedule with --cfg-options, or omit --budget.')
    epoch = 1
    if by_epoch or any(scheduler.get('by_epoch', True) for scheduler in schedulers):
        epoch = iterations_of_epoch(cfg, processes)
    own = cfg.train_cfg.max_epochs * epoch if by_epoch else cfg.train_cfg.max_iters
    factor = iterations / own
    stretched = [stretched_scheduler(scheduler, factor, epoch) for scheduler in schedulers]
    cfg.param_scheduler = [each for each in stretched if each is not None]

    unit = epoch if by_epoch else 1
    # Rounded up, so that no validation falls just before the one at the end.
    validation = {name: max(math.ceil(round(cfg.train_cfg[name] * unit * factor, 6)), 1)
                  for name in ('val_interval', 'val_begin') if name in cfg.train_cfg}
    cfg.train_cfg = ConfigDict(type='IterBasedTrainLoop', max_iters=iterations, **validation)
    sampler = cfg.train_dataloader.get('sampler')
    if sampler is not None and type_name(sampler.type) == 'DefaultSampler':
        sampler.type = 'InfiniteSampler'
    cfg.log_processor = {**(cfg.get('log_processor') or {}), 'by_epoch': False}
    cfg.default_hooks.logger.update(
        log_metric_by_epoch=False,
        interval=min(cfg.default_hooks.logger.get('interval', 10), max(iterations // 20, 1)))


def stretched_scheduler(scheduler: ConfigDict, factor: float, epoch: int) -> Optional[ConfigDict]:
    """Stretch a scheduler by a factor, and convert it to iterations.

    Returns None if it would last less than two iterations: a warm-up of one iteration would keep
    its start value for the rest of the training.
    """
    scheduler = deepcopy(scheduler)
    unit = epoch if scheduler.pop('by_epoch', True) else 1
    scheduler.pop('convert_to_iter_based', None)

    def scaled(value: Union[int, list]) -> Union[int, list]:
        if isinstance(value, (list, tuple)):
            return [scaled(each) for each in value]
        return round(value * unit * factor)

    for name in TIMES:
        if scheduler.get(name) is not None:
            scheduler[name] = scaled(scheduler[name])
    if 'end' in scheduler and scheduler.end - scheduler.get('begin', 0) < 2:
        return None
    scheduler.by_epoch = False
    return scheduler


def save_often(cfg: Config) -> None:
    """Make a run write checkpoints regularly, to resume from, and keep the last two."""
    by_epoch = is_epoch_based(cfg)
    interval = 1 if by_epoch else max(cfg.train_cfg.max_iters // CHECKPOINTS, 1)
    cfg.default_hooks.checkpoint.update(by_epoch=by_epoch, interval=interval, max_keep_ckpts=2)
