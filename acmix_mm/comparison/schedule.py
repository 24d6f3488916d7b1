"""How long a compared network trains: the config's own schedule, or that schedule stretched."""

import math
import re
from copy import deepcopy
from typing import NamedTuple, Optional, Union

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from acmix_mm.utils.errors import UsageError

# Arguments of MMEngine's schedulers that are points in time, or spans of it.
TIMES = ('begin', 'end', 'T_max', 'step_size', 'total_steps', 'milestones', 'periods')
# Their steps have no length that could be stretched.
WITHOUT_LENGTH = re.compile('Exponential|ReduceOnPlateau')
# How many checkpoints a run writes at least, which is what it can resume from.
CHECKPOINTS = 10


class Budget(NamedTuple):
    """Equal iterations, or equal minutes of training, for every run."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f'{self.amount:g} {self.unit.removesuffix("s") if self.amount == 1 else self.unit}'


def read_budget(text: Optional[str]) -> Optional[Budget]:
    """Read ``300iters`` or ``20minutes``; None stays None.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    found = re.fullmatch(r'(\d+)\s*(iters)|(\d+(?:\.\d+)?)\s*(minutes)', text)
    amount = float(found[1] or found[3]) if found else 0.
    if amount == 0.:
        raise UsageError(f'--budget takes iterations or minutes of training, as in 300iters or '
                         f'20minutes; got {text}.')
    return Budget(amount, found[2] or found[4])


def is_epoch_based(cfg: Config) -> bool:
    return cfg.train_cfg.get('by_epoch', 'max_epochs' in cfg.train_cfg)


def iterations_of_epoch(cfg: Config) -> int:
    """How many batches an epoch has, by building the training data."""
    return len(Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0))


def iterations_of(cfg: Config) -> int:
    """How many iterations the config's own schedule has."""
    if is_epoch_based(cfg):
        return cfg.train_cfg.max_epochs * iterations_of_epoch(cfg)
    return cfg.train_cfg.max_iters


def stretch(cfg: Config, iterations: int) -> None:
    """Change the whole schedule of a config, warm-up included, to a number of iterations.

    What goes by epochs goes by iterations then; validations stay as many as they were.

    Raises:
        UsageError: a scheduler has no length.
    """
    by_epoch = is_epoch_based(cfg)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]
    for scheduler in schedulers:
        if WITHOUT_LENGTH.search(scheduler.type):
            raise UsageError(f'--budget cannot stretch the scheduler {scheduler.type}: set another '
                             'schedule with --cfg-options, or leave out --budget.')
    epoch = 1
    if by_epoch or any(scheduler.get('by_epoch', True) for scheduler in schedulers):
        epoch = iterations_of_epoch(cfg)
    own = cfg.train_cfg.max_epochs * epoch if by_epoch else cfg.train_cfg.max_iters
    factor = iterations / own
    stretched = [stretched_scheduler(scheduler, factor, epoch) for scheduler in schedulers]
    cfg.param_scheduler = [each for each in stretched if each is not None]

    unit = epoch if by_epoch else 1
    # Rounded up, so that none falls just before the end, where there is one anyway.
    validation = {name: max(math.ceil(round(cfg.train_cfg[name] * unit * factor, 6)), 1)
                  for name in ('val_interval', 'val_begin') if name in cfg.train_cfg}
    cfg.train_cfg = ConfigDict(type='IterBasedTrainLoop', max_iters=iterations, **validation)
    sampler = cfg.train_dataloader.get('sampler')
    if sampler is not None and sampler.type == 'DefaultSampler':
        sampler.type = 'InfiniteSampler'
    cfg.log_processor = {**(cfg.get('log_processor') or {}), 'by_epoch': False}
    cfg.default_hooks.logger.update(
        log_metric_by_epoch=False,
        interval=min(cfg.default_hooks.logger.get('interval', 10), max(iterations // 20, 1)))


def stretched_scheduler(scheduler: ConfigDict, factor: float, epoch: int) -> Optional[ConfigDict]:
    """A scheduler stretched by a factor, in iterations; None if its span comes to less than two.

    A warm-up of one iteration would never leave its start.
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
    """Let a run write checkpoints often enough to resume from, and keep the last two."""
    by_epoch = is_epoch_based(cfg)
    interval = 1 if by_epoch else max(cfg.train_cfg.max_iters // CHECKPOINTS, 1)
    cfg.default_hooks.checkpoint.update(by_epoch=by_epoch, interval=interval, max_keep_ckpts=2)
