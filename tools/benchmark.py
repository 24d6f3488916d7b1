"""Measure time and peak memory of ACmix and of its baselines.

Operators and layers (the first seven cases) need torch alone. Blocks and backbones are compared
with MMDetection's Swin; mask-rcnn is a whole detector. On a GPU, the table also gives the bandwidth
and its ratio to that of a copy of as many bytes.

Examples: python tools/benchmark.py --cases conv-200x336
          python tools/benchmark.py --device cuda --dtype bfloat16 --batch 8 --cases swin-t-800x1344
"""

import argparse
import json

import torch

from acmix_mm.benchmark import CASES, DTYPES, PASSES, Setting, compare, machine, results_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE',
                        help=f'any of {", ".join(CASES)} (default: all)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='float32')
    parser.add_argument('--batch', type=int, default=1, help='batch size (default: 1)')
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each (default: 5)')
    parser.add_argument('--threads', type=int, default=2, help='torch threads (default: 2)')
    parser.add_argument('--json', metavar='FILE', help='also write the results to FILE')
    args = parser.parse_args()
    for name in ('batch', 'repeats', 'threads'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be a positive integer, got {getattr(args, name)}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a GPU that torch can use; there is none.')
    torch.set_num_threads(args.threads)
    setting = Setting(args.device, args.dtype, args.batch)
    results = []
    for case in args.cases:
        for passes in PASSES:
            print(f'{case}, {passes} …', flush=True)
            results += compare(case, passes, setting, args.repeats)
    print(f'\n{machine(setting)}, median of {args.repeats}\n\n{results_table(results)}')
    if args.json:
        with open(args.json, 'w') as file:
            json.dump([result._asdict() for result in results], file, indent=2)


if __name__ == '__main__':
    main()
