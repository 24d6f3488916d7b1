"""The plan of a comparison: networks of equal cost, with a config file for each."""

import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from acmix_mm.backbones.token_mixers import mixer_options
from acmix_mm.benchmark import processor
from acmix_mm.comparison.matching import (
    LATENCY_TOLERANCE,
    TOLERANCE,
    BackboneSize,
    Family,
    match,
    match_by_measuring,
)
from acmix_mm.comparison.record import write_json
from acmix_mm.comparison.schedule import Budget, iterations_of, save_often, stretch
from acmix_mm.comparison.timing import iteration_seconds, latencies, validation_image_size
from acmix_mm.comparison.tuning import apply_setting
from acmix_mm.engine.resuming import is_epoch_based
from acmix_mm.engine.runner import check_run, checkpoint_sources
from acmix_mm.environment import versions
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError

PLAN = 'plan.json'
QUANTITIES = dict(params='parameters', flops='multiply-adds', latency='latency', none='nothing')


def make_plan(cfg: Config, mixers: Sequence[str], quantity: str, budget: Optional[Budget],
              out: str, processes: int = 1,
              tune: Optional[Sequence[str]] = None) -> dict[str, Any]:
    """Plan a comparison, or read the plan of an earlier call.

    Matching by latency and budgets in minutes rely on measurements, which a second call would not
    reproduce. The plan is therefore saved in ``plan.json``, next to a config for each mixer.

    Args:
        cfg: config of a detector or segmentor with an ACmix backbone.
        mixers: names of the token mixers; the first is the reference, which keeps its size.
        quantity: what the models have in common, a key of ``QUANTITIES``.
        budget: length of each run; None for the config's own schedule.
        out: folder of the comparison.
        processes: processes of a run.
        tune: name and values of a setting to be tuned for each mixer.

    Returns:
        The contents of ``plan.json``: ``settings``; ``shape``, the image size that costs are
        measured at; and in ``variants`` for each mixer its ``change``, ``counts``, ``latency`` and
        ``iterations``, and ``tuned``, the value of the tuned setting, once it is known.

    Raises:
        UsageError: no network matches, or the folder belongs to another comparison.
    """
    # The classes in a pure Python config become names, as in the files that MMEngine writes.
    cfg = Config(cfg.to_dict(), filename=cfg.filename)
    settings = dict(config=os.path.relpath(cfg.filename), mixers=list(mixers), match=quantity,
                    budget=None if budget is None else str(budget),
                    options=digest(cfg), gpus_per_run=processes,
                    tune=None if tune is None else list(tune))
    path = os.path.join(out, PLAN)
    if os.path.exists(path):
        with open(path) as file:
            plan = json.load(file)
        differing = [key for key in settings if plan['settings'][key] != settings[key]]
        if differing:
            raise UsageError(f'{out} belongs to another comparison, which differs in '
                             f'{", ".join(differing)}; name another folder with --work-dir.')
        # A config is a program; the one in the folder may have been replaced.
        write_configs(cfg, plan, out)
        return plan

    # MMEngine would log the details of every model that is built for matching.
    MMLogger.get_instance('compare', log_level='WARNING')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    shape = validation_image_size(cfg)
    families = {mixer: Family(cfg.model, mixer, shape) for mixer in mixers}
    sizes = match_all(families, quantity)
    check_pretraining(cfg, families, sizes)
    models = {mixer: family.config(sizes[mixer]) for mixer, family in families.items()}
    print('Measuring latencies …', flush=True)
    measured = latencies(models, shape)
    iterations = (dict.fromkeys(mixers, iterations_of(cfg, processes)) if budget is None
                  else iterations_of_budget(cfg, models, budget))

    variants = {}
    for mixer, family in families.items():
        variants[mixer] = dict(
            size=sizes[mixer]._asdict(),
            change=family.describe(sizes[mixer]),
            counts=family.counts(sizes[mixer])._asdict(),
            latency={name: each._asdict() for name, each in measured[mixer]._asdict().items()},
            iterations=iterations[mixer])
    plan = dict(settings=settings, shape=shape, epoch_based=is_epoch_based(cfg) and budget is None,
                start=checkpoint_sources(cfg.model) or ['scratch'],
                machine=processor(get_device()), versions=versions(),
                date=time.strftime('%Y-%m-%d'), variants=variants)
    write_configs(cfg, plan, out)
    write_json(path, plan)
    return plan


def write_configs(cfg: Config, plan: dict[str, Any], out: str) -> None:
    """Write the config of each network of a plan, ``config.py`` in the folder of its mixer."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    for mixer in plan['settings']['mixers']:
        variant = plan['variants'][mixer]
        width, blocks = variant['size'].values()
        size = BackboneSize(int(width), tuple(map(int, blocks)))
        model = Family(cfg.model, mixer, plan['shape']).config(size)
        iterations = int(variant['iterations']) if plan['settings']['budget'] else None
        own = config_of_run(cfg, model, iterations, plan['settings']['gpus_per_run'])
        if 'tuned' in variant:
            apply_setting(own, plan['settings']['tune'][0], variant['tuned'])
        path = os.path.join(out, mixer, 'config.py')
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as temporary:
            own.dump(temporary)


def record_tuning(cfg: Config, plan: dict[str, Any], best: dict[str, str], out: str) -> None:
    """Add the value of the tuned setting to each variant of a plan, and to its config."""
    for mixer, value in best.items():
        plan['variants'][mixer]['tuned'] = value
    write_configs(cfg, plan, out)
    write_json(os.path.join(out, PLAN), plan)


def digest(cfg: Config) -> str:
    """Hash a config, except for its ``work_dir``."""
    content = {key: value for key, value in cfg.items() if key != 'work_dir'}
    return hashlib.sha256(Config(content).pretty_text.encode()).hexdigest()


def check_settings(cfg: Config, mixers: Sequence[str]) -> None:
    """Check that these mixers can be compared in this config.

    Raises:
        UsageError: the mixers are invalid, or the config cannot be trained or evaluated.
    """
    if len(set(mixers)) < max(2, len(mixers)):
        raise UsageError('--mixers takes two or more different mixers, the reference first; got '
                         f'{" ".join(mixers)}.')
    for part in ('model', 'val_dataloader', 'val_evaluator', 'train_dataloader'):
        if not cfg.get(part):
            raise UsageError(f'The config {cfg.filename} has no {part}; name a config that trains '
                             'and evaluates a model.')
    for mixer in mixers:
        mixer_options((cfg.model.get('backbone') or {}).get('type'), mixer)
    check_run(cfg, ('train', 'val'))


def match_all(families: dict[str, Family], quantity: str) -> dict[str, BackboneSize]:
    """Find the size at which each family costs the same as the first, the reference.

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
            ratio = functools.cache(functools.partial(
                latency_ratio, families[first].config(sizes[first]), family))
            size = match_by_measuring(family, ratio)
            error, tolerance = abs(ratio(size) - 1), LATENCY_TOLERANCE
            whose = "the reference's"
        else:
            target = reference[quantity]
            of_backbone = reference[f'backbone_{quantity}']
            size = match(family, quantity, target, TOLERANCE * of_backbone)
            error, tolerance = abs(family.count(quantity, size) - target) / of_backbone, TOLERANCE
            whose = "the reference's backbone"
        if error > tolerance:
            raise UsageError(
                f'{mixer} cannot be matched within {tolerance:.0%} of the {QUANTITIES[quantity]} '
                f'of {whose}: the closest network, which changes {family.describe(size)}, is off '
                f'by {error:.2%}; use another reference or config, or pass --match none.')
        sizes[mixer] = size
    return sizes


def latency_ratio(reference: ConfigDict, family: Family, size: BackboneSize) -> float:
    """Measure the latency of a network, relative to that of the reference."""
    models = dict(reference=reference, variant=family.config(size))
    return latencies(models, family.shape)['variant'].ratio.median


def check_pretraining(cfg: Config, families: dict[str, Family],
                      sizes: dict[str, BackboneSize]) -> None:
    """Check that pretrained weights fit all networks, so that all start from the same weights.

    Raises:
        UsageError: the config loads pretrained weights, and matching changed the size of a network.
    """
    sources = checkpoint_sources(cfg.model) + [each for each in [cfg.get('load_from')] if each]
    for mixer, family in families.items():
        if sources and sizes[mixer] != family.own_size:
            raise UsageError(
                f'{mixer} is matched with {family.describe(sizes[mixer])}, but {sources[0]} does '
                'not fit that size: train all networks from scratch with --cfg-options '
                'model.backbone.init_cfg=None, or pass --match none.')


def iterations_of_budget(cfg: Config, models: dict[str, Any], budget: Budget) -> dict[str, int]:
    """Return the number of iterations that the budget allows each network."""
    if budget.unit == 'iters':
        return dict.fromkeys(models, int(budget.amount))
    print('Measuring the time of training iterations …', flush=True)
    seconds = iteration_seconds(cfg, models)
    return {mixer: max(int(60 * budget.amount / each), 1) for mixer, each in seconds.items()}


def config_of_run(cfg: Config, model: Any, iterations: Optional[int],
                  processes: int = 1) -> Config:
    """Return the config that trains a model, its schedule stretched to ``iterations`` if given."""
    cfg = deepcopy(cfg)
    cfg.model = deepcopy(model)
    cfg.pop('work_dir', None)
    if iterations is not None:
        stretch(cfg, iterations, processes)
    save_often(cfg)
    if is_epoch_based(cfg):
        cfg.default_hooks.logger.log_metric_by_epoch = False
    cfg.setdefault('custom_imports', dict(imports=[]))
    cfg.custom_imports.imports.append('acmix_mm.comparison.record')
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='RecordRun')]
    return cfg
