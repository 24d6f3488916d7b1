"""From a config to the networks that are compared, each with a config file of its own."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Optional

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from acmix_mm.backbones.token_mixers import MIXERS, mixer_options
from acmix_mm.benchmark import processor
from acmix_mm.comparison.matching import (
    TOLERANCE,
    BackboneSize,
    Family,
    match,
    match_by_measuring,
)
from acmix_mm.comparison.record import seed_by_epoch, write_json
from acmix_mm.comparison.schedule import Budget, is_epoch_based, iterations_of, save_often, stretch
from acmix_mm.comparison.timing import iteration_seconds, latencies, picture_shape
from acmix_mm.engine.config import check_data
from acmix_mm.engine.runner import checkpoint_sources
from acmix_mm.environment import versions
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError

PLAN = 'plan.json'
QUANTITIES = dict(params='parameters', flops='multiply-adds', latency='latency', none='nothing')


def make_plan(cfg: Config, mixers: Sequence[str], quantity: str, budget: Optional[Budget],
              out: str) -> dict[str, Any]:
    """Decide what is compared, or read what was decided before.

    Matching by latency and budgets in minutes are measured, so that a second time would not give
    the same networks. The plan is therefore kept in ``plan.json``, beside a config for each mixer.

    Args:
        cfg: of a detector or segmentor with one of our backbones.
        mixers: the reference, which keeps its size, first.
        quantity: a key of ``QUANTITIES``.
        budget: of each run; the config's own schedule if None.
        out: folder of the comparison.

    Returns:
        What ``plan.json`` says: ``settings``, ``shape`` of the picture that costs are of, and of
        each mixer in ``variants`` its ``change``, ``counts``, ``latency``, ``iterations`` and more.

    Raises:
        UsageError: the settings cannot be met, or the folder is another comparison's.
    """
    settings = dict(config=os.path.relpath(cfg.filename), mixers=list(mixers), match=quantity,
                    budget=None if budget is None else str(budget),
                    options=digest(cfg))
    path = os.path.join(out, PLAN)
    if os.path.exists(path):
        with open(path) as file:
            plan = json.load(file)
        differing = [key for key in settings if plan['settings'][key] != settings[key]]
        if differing:
            raise UsageError(f'{out} holds another comparison, with other '
                             f'{", ".join(differing)}; name another folder with --work-dir.')
        return plan

    # MMEngine tells at length what it builds, and here that is not what trains.
    MMLogger.get_instance('compare', log_level='WARNING')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    shape = picture_shape(cfg)
    families = {mixer: Family(cfg.model, mixer, shape) for mixer in mixers}
    sizes = match_all(families, quantity)
    check_pretraining(cfg, families, sizes)
    models = {mixer: family.config(sizes[mixer]) for mixer, family in families.items()}
    print('Timing predictions …', flush=True)
    measured = latencies(models, shape)
    # The data that tells how long an epoch is may take a while to load.
    iterations = (dict.fromkeys(mixers, iterations_of(cfg)) if budget is None
                  else allot(cfg, models, budget))

    variants = {}
    for mixer, family in families.items():
        config = config_of_run(cfg, models[mixer], budget and iterations[mixer])
        write_config(config, os.path.join(out, mixer, 'config.py'))
        variants[mixer] = dict(
            change=family.describe(sizes[mixer]),
            counts=family.counts(sizes[mixer])._asdict(),
            latency={name: each._asdict() for name, each in measured[mixer]._asdict().items()},
            iterations=iterations[mixer])
    plan = dict(settings=settings, shape=shape, epoch_based=is_epoch_based(cfg) and budget is None,
                start=checkpoint_sources(cfg.model) or ['scratch'],
                machine=processor(get_device()), versions=versions(),
                date=time.strftime('%Y-%m-%d'), variants=variants)
    write_json(path, plan)
    return plan


def digest(cfg: Config) -> str:
    """Of all that a config says, other than where its results go."""
    content = {key: value for key, value in cfg.items() if key != 'work_dir'}
    return hashlib.sha256(Config(content).pretty_text.encode()).hexdigest()


def check_settings(cfg: Config, mixers: Sequence[str]) -> None:
    """Raise UsageError unless these mixers can be compared in this config."""
    unknown = [mixer for mixer in mixers if mixer not in MIXERS]
    if unknown:
        raise UsageError(f'--mixers does not know {", ".join(unknown)}; it knows '
                         f'{", ".join(MIXERS)}.')
    if len(set(mixers)) < 2 or len(set(mixers)) < len(mixers):
        raise UsageError('--mixers takes two or more, each once, the reference first; got '
                         f'{" ".join(mixers)}.')
    for part in ('model', 'val_dataloader', 'val_evaluator', 'train_dataloader'):
        if not cfg.get(part):
            raise UsageError(f'The config {cfg.filename} has no {part}; name one that trains and '
                             'evaluates a model.')
    for mixer in mixers:
        mixer_options((cfg.model.get('backbone') or {}).get('type'), mixer)
    check_data(cfg, ('train', 'val'))


def match_all(families: dict[str, Family], quantity: str) -> dict[str, BackboneSize]:
    """The size of each family at which it costs what the first one does.

    Raises:
        UsageError: a family has no such size.
    """
    sizes = {mixer: family.own_size for mixer, family in families.items()}
    if quantity == 'none':
        return sizes
    first, *others = families
    reference = families[first].counts(sizes[first])._asdict()
    for mixer in others:
        print(f'Matching the {QUANTITIES[quantity]} of {mixer} …', flush=True)
        family = families[mixer]
        if quantity == 'latency':
            ratios: dict[BackboneSize, float] = {}

            def ratio(size: BackboneSize, family: Family = family,
                      ratios: dict = ratios) -> float:
                models = {'reference': families[first].config(sizes[first]),
                          'variant': family.config(size)}
                ratios[size] = latencies(models, family.shape)['variant'].ratio.median
                return ratios[size]

            size = match_by_measuring(family, ratio)
            error, allowed = abs(ratios[size] - 1), TOLERANCE
            whose = "the reference's"
        else:
            target = reference[quantity]
            of_backbone = reference[f'backbone_{quantity}']
            size = match(family, quantity, target, TOLERANCE * of_backbone)
            error, allowed = abs(family.count(quantity, size) - target) / of_backbone, TOLERANCE
            whose = "the reference's backbone"
        if error > allowed:
            raise UsageError(
                f'{mixer} cannot be brought within {TOLERANCE:.0%} of the {QUANTITIES[quantity]} '
                f'of {whose}: the nearest, which changes {family.describe(size)}, is off by '
                f'{error:.1%}; take another reference or config, or --match none.')
        sizes[mixer] = size
    return sizes


def check_pretraining(cfg: Config, families: dict[str, Family],
                      sizes: dict[str, BackboneSize]) -> None:
    """Raise UsageError if a network changed its size and weights of the old one are to be loaded.

    Networks that start from different knowledge are not compared, and these would not fit.
    """
    sources = checkpoint_sources(cfg.model) + [each for each in [cfg.get('load_from')] if each]
    for mixer, family in families.items():
        if sources and sizes[mixer] != family.own_size:
            raise UsageError(
                f'{mixer} is matched by {family.describe(sizes[mixer])}, and {sources[0]} does '
                'not fit that size: start all networks from scratch with --cfg-options '
                'model.backbone.init_cfg=None, or pass --match none.')


def allot(cfg: Config, models: dict[str, Any], budget: Budget) -> dict[str, int]:
    """How many iterations each network gets."""
    if budget.unit == 'iters':
        return dict.fromkeys(models, int(budget.amount))
    print('Timing training …', flush=True)
    seconds = iteration_seconds(cfg, models)
    return {mixer: max(int(60 * budget.amount / each), 1) for mixer, each in seconds.items()}


def config_of_run(cfg: Config, model: Any, iterations: Optional[int]) -> Config:
    """The config that trains one network, its schedule stretched to a number of iterations."""
    cfg = deepcopy(cfg)
    cfg.model = deepcopy(model)
    cfg.pop('work_dir', None)
    if iterations is not None:
        stretch(cfg, iterations)
    save_often(cfg)
    if is_epoch_based(cfg):
        cfg.default_hooks.logger.log_metric_by_epoch = False
        seed_by_epoch(cfg.train_dataloader)
    imports = cfg.setdefault('custom_imports', dict(imports=[])).imports
    imports.append('acmix_mm.comparison.record')
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='SeedSteps'),
                        dict(type='RecordRun')]
    return cfg


def write_config(cfg: Config, path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as beside:
        cfg.dump(beside)
