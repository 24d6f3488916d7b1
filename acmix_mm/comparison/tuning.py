"""Tuning of one setting for each mixer, with equal effort, before the runs of a comparison."""

import argparse
import math
from collections.abc import Sequence
from typing import Any, Optional

from mmengine.config import Config, DictAction

from acmix_mm.comparison.runs import Run, quality
from acmix_mm.utils.errors import UsageError

# No run that is compared has this seed.
TUNING_SEED = 1_000_000


def check_tuning(cfg: Config, tune: Optional[Sequence[str]]) -> None:
    """Check the setting and the values to be tried.

    Args:
        cfg: the config.
        tune: the name of the setting, followed by its values; None if nothing is tuned.

    Raises:
        UsageError: the config has no such setting, or there are no two different values.
    """
    if tune is None:
        return
    name, *values = tune
    node: Any = cfg
    try:
        for part in name.split('.'):
            node = node[int(part) if isinstance(node, (list, tuple)) else part]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UsageError(f'--tune names the setting {name}, which the config {cfg.filename} does '
                         'not have.') from error
    # The values are also names of folders.
    if len(set(values)) < max(2, len(values)) or any('/' in value for value in values):
        raise UsageError('--tune takes the name of a setting and two or more different values, as '
                         f'in --tune optim_wrapper.optimizer.lr 3e-4 1e-3; got {" ".join(tune)}.')


def tuning_runs(out: str, mixers: Sequence[str], tune: Sequence[str], processes: int) -> list[Run]:
    """List the runs that try each value once for each mixer."""
    name, *values = tune
    return [Run(out, mixer, TUNING_SEED, processes, (name, value))
            for value in values for mixer in mixers]


def score(metrics: dict[str, float]) -> float:
    """Return the metric that decides: the first of the main metrics; NaN is the worst."""
    first = next(iter(quality(metrics).values()), math.nan)
    return -math.inf if math.isnan(first) else first


def best_values(runs: Sequence[Run]) -> dict[str, str]:
    """Return the value with the best final metric for each mixer; of equal ones, the first.

    Args:
        runs: finished runs, from :func:`tuning_runs`.
    """
    best: dict[str, Run] = {}
    scores = {run: score(run.result['metrics']) for run in runs}
    for run in runs:
        if run.mixer not in best or scores[run] > scores[best[run.mixer]]:
            best[run.mixer] = run
    return {mixer: run.setting[1] for mixer, run in best.items()}


def apply_setting(cfg: Config, name: str, value: str) -> None:
    """Change a setting of a config, as ``--cfg-options NAME=VALUE`` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs=1, action=DictAction)
    cfg.merge_from_dict(parser.parse_args(['--cfg-options', f'{name}={value}']).cfg_options)
