"""Plot the rates of the two paths against depth: |α|, |β| and log|α/β| of every ACmix layer.

Checkpoints stand side by side, of the same network or of others; of a work directory, all its
epoch_N.pth or iter_N.pth lie over each other. It needs no config.

Examples: python tools/plot_rates.py work_dirs/demo/epoch_10.pth
          python tools/plot_rates.py work_dirs/demo work_dirs/other/epoch_12.pth --out rates.png
"""

import argparse

from acmix_mm.analysis.figures import check_png, draw_rates, save
from acmix_mm.analysis.rates import read_rates
from acmix_mm.engine.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoints', nargs='+', metavar='CHECKPOINT',
                        help='a checkpoint, or the work directory of a run')
    parser.add_argument('--out', default='rates.png', metavar='FILE',
                        help='the .png file to write (default: rates.png)')
    args = parser.parse_args()
    check_png(args.out)
    columns = [read_rates(source) for source in args.checkpoints]
    save(draw_rates(columns), args.out)
    for history in columns:
        rates = history[-1]
        print(f'{rates.source}: {rates.network}, {len(rates.layers)} layers, |α| > |β| in '
              f'{(rates.bias > 0).sum()} of them')
    print(f'Wrote {args.out}.')


if __name__ == '__main__':
    run_tool(main)
