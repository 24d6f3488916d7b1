"""Plot the rates of the two paths against depth: |α|, |β| and log|α/β| of every ACmix layer.

Each checkpoint gets a column; the networks may differ. For a work directory, all of its
epoch_N.pth or iter_N.pth are overlaid in one column. No config is needed.

Examples: %(prog)s work_dirs/demo/epoch_10.pth
          %(prog)s work_dirs/demo work_dirs/other/epoch_12.pth --out rates.png
"""

import argparse

from acmix_mm.analysis.figures import check_png, draw_rates, save
from acmix_mm.analysis.rates import read_rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT',
                        help='a checkpoint, or the work directory of a training run')
    parser.add_argument('--out', default='rates.png', metavar='FILE',
                        help='output .png file (default: rates.png)')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    check_png(args.out)
    columns = [read_rates(source) for source in args.checkpoints]
    save(draw_rates(columns), args.out)
    for history in columns:
        rates = history[-1]
        print(f'{rates.source}: {rates.network}, {len(rates.layers)} layers, |α| > |β| in '
              f'{(rates.log_ratio > 0).sum()} of them')
    print(f'Wrote {args.out}.')
