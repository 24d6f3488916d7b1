"""Compare mixers in one network, at equal cost: convolution, attention, or both.

Each mixer takes its place in the backbone of CONFIG; width, and where that is too coarse depth, is
changed until the model costs what the first one does; all are trained with the same recipe and
seeds. The folder then has report.md, its pictures, and every config and command. Killed, the same
command goes on where it was.

Example: python tools/compare.py configs/shapes/upernet_acmix_r50.py --mixers acmix conv7 attn
         --match params --seeds 3 --budget 300iters
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.comparison.plan import QUANTITIES, check_settings, make_plan
from acmix_mm.comparison.report import write_report
from acmix_mm.comparison.runs import all_runs, exclusive_folder, train_all
from acmix_mm.comparison.schedule import read_budget
from acmix_mm.engine.cli import add_config_arguments, config_from, run_tool
from acmix_mm.utils.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of a detector or a segmentor with our backbone')
    add_config_arguments(parser)
    parser.add_argument('--mixers', nargs='+', required=True, metavar='MIXER',
                        help=f'two or more of {", ".join(MIXERS)}; the first keeps its size')
    parser.add_argument('--match', choices=QUANTITIES, default='params',
                        help='what the models have in common (default: params)')
    parser.add_argument('--seeds', type=int, default=3, metavar='N',
                        help='runs of each mixer (default: 3); more may follow later')
    parser.add_argument('--budget', metavar='LENGTH', help='equal iterations, as in 300iters, or '
                        'equal training time, as in 20minutes, the schedule stretched to it '
                        "(default: the config's own schedule)")
    args = parser.parse_args()
    if args.seeds < 1:
        raise UsageError(f'--seeds takes a number from 1 up, got {args.seeds}.')
    budget = read_budget(args.budget)
    cfg = config_from(args)
    out = args.work_dir or os.path.join('work_dirs', 'compare', Path(args.config).stem)

    check_settings(cfg, args.mixers)
    with exclusive_folder(out):
        plan = make_plan(cfg, args.mixers, args.match, budget, out)
        runs = all_runs(out, args.mixers, args.seeds)
        iterations = {mixer: each['iterations'] for mixer, each in plan['variants'].items()}
        for mixer, variant in plan['variants'].items():
            print(f'{mixer}: changed {variant["change"]}; '
                  f'{variant["counts"]["params"] / 1e6:.3f}M parameters, '
                  f'{variant["counts"]["flops"] / 1e9:.3f}G multiply-adds, '
                  f'{variant["iterations"]} iterations')
        train_all(runs, iterations, str(Path(__file__).with_name('train.py')))
        report = write_report(plan, runs, shlex.join(['python', *sys.argv]))
    print(f'Report: {report}')


if __name__ == '__main__':
    run_tool(main)
