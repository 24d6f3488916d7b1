"""Compare token mixers (convolution, attention or both) in one network, at equal cost.

The first of the mixers is the reference. For each of the others the width of the backbone in CONFIG
and, if that is too coarse, its depth are changed until the model costs as much as the reference.
All models are trained with the same recipe and seeds. The work directory then contains report.md
with its figures, and every config and command. If the comparison is killed, the same command
resumes it.

Example: %(prog)s shapes/upernet_acmix_r50 --mixers acmix conv7 attn
         --match params --seeds 3 --budget 300iters
"""

import argparse
import os
from pathlib import Path

from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.commands import positive_int
from acmix_mm.comparison.plan import QUANTITIES, check_settings, make_plan
from acmix_mm.comparison.report import write_report
from acmix_mm.comparison.runs import all_runs, train_all
from acmix_mm.comparison.schedule import read_budget
from acmix_mm.engine.cli import add_config_arguments, config_from
from acmix_mm.engine.outputs import exclusive_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', help='config of a detector or segmentor with an ACmix backbone')
    add_config_arguments(parser, 'work_dirs/compare/CONFIG_NAME')
    parser.add_argument('--mixers', nargs='+', required=True, metavar='MIXER',
                        help=f'two or more of {", ".join(MIXERS)}; the first keeps its size')
    parser.add_argument('--match', choices=QUANTITIES, default='params',
                        help='the quantity in which the models match (default: params)')
    parser.add_argument('--seeds', type=positive_int, default=3, metavar='N',
                        help='number of runs of each mixer (default: 3); it can be raised later')
    parser.add_argument('--budget', type=read_budget, metavar='LENGTH',
                        help='stretch the schedule to equal iterations, as in 300iters, or equal '
                        "training time, as in 20minutes (default: the config's own schedule)")


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    cfg = config_from(args)
    out = args.work_dir or os.path.join('work_dirs', 'compare', Path(cfg.filename).stem)

    check_settings(cfg, args.mixers)
    with exclusive_folder(out):
        plan = make_plan(cfg, args.mixers, args.match, args.budget, out)
        runs = all_runs(out, args.mixers, args.seeds)
        iterations = {mixer: each['iterations'] for mixer, each in plan['variants'].items()}
        for mixer, variant in plan['variants'].items():
            print(f'{mixer}: changes {variant["change"]}; '
                  f'{variant["counts"]["params"] / 1e6:.3f}M parameters, '
                  f'{variant["counts"]["flops"] / 1e9:.3f}G multiply-adds, '
                  f'{variant["iterations"]} iterations')
        train_all(runs, iterations)
        report = write_report(plan, runs, args.command_line)
    print(f'Report: {report}')
