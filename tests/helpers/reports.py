"""Invented comparisons, for the tests of reports and figures."""

import json
import os

from acmix_mm.comparison.runs import all_runs


def invented_plan(mixers, **settings):
    """A plan, in which each mixer costs a quarter more than the one before."""
    variants = {}
    for index, mixer in enumerate(mixers):
        factor = 1.25**index
        variants[mixer] = dict(
            change='nothing', iterations=6,
            counts=dict(params=int(1e6 * factor), flops=int(2e9 * factor),
                        backbone_params=int(4e5 * factor), backbone_flops=int(1e9 * factor)),
            latency=dict(seconds=dict(low=0.009 * factor, median=0.01 * factor, high=0.02 * factor),
                         ratio=dict(low=factor, median=factor, high=factor)))
    return dict(
        settings=dict(config='net.py', mixers=list(mixers), match='none', budget='6 iters',
                      options='', gpus_per_run=1, tune=None, **settings),
        shape=[64, 96], start=['scratch'], machine='a machine', versions=dict(torch='2'),
        date='2026-01-01', variants=variants)


def write_result(run, miou, seconds=60.):
    """Write the result of a run whose last validation has this mIoU, and half of it before."""
    os.makedirs(run.folder, exist_ok=True)
    validations = [[3, dict(mIoU=miou / 2, aAcc=1.)], [6, dict(mIoU=miou, aAcc=1.)]]
    with open(os.path.join(run.folder, 'result.json'), 'w') as file:
        json.dump(dict(seed=run.seed, iterations=6, training_seconds=seconds, peak_memory_mib=5.,
                       metrics=validations[-1][1], validations=validations,
                       loss=[[index, miou / index] for index in range(1, 7)]), file)


def invented_runs(out, mious):
    """Finished and missing runs by mixer, from the mIoU of each seed; None for a missing run."""
    runs = all_runs(str(out), list(mious), max(map(len, mious.values())))
    for run in runs:
        value = mious[run.mixer][run.seed]
        if value is not None:
            write_result(run, value, seconds=60. + 60 * run.seed)
    return runs
