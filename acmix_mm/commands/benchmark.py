"""Measure time and peak memory of ACmix and of its baselines.

Operators and layers (the first seven cases) need torch alone. Blocks and backbones are compared
with MMDetection's Swin; mask-rcnn is a whole detector. On a GPU, the table also gives the bandwidth
and its ratio to that of a copy of as many bytes.

Examples: %(prog)s --cases conv-200x336
          %(prog)s --device cuda --dtype bfloat16 --batch 8 --cases swin-t-800x1344
"""

import argparse
import json

import torch

from acmix_mm.benchmark import CASES, DTYPES, PASSES, Setting, compare, machine, results_table
from acmix_mm.commands import positive_int
from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.output_paths import file_to_write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE',
                        help=f'any of {", ".join(CASES)} (default: all)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='float32')
    parser.add_argument('--batch', type=positive_int, default=1, help='batch size (default: 1)')
    parser.add_argument('--repeats', type=positive_int, default=5,
                        help='timed runs of each (default: 5)')
    parser.add_argument('--threads', type=positive_int, default=2,
                        help='torch threads (default: 2)')
    parser.add_argument('--json', metavar='FILE', help='also write the results to FILE')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UsageError('--device cuda needs a GPU that torch can use; there is none.')
    if args.json:
        file_to_write(args.json)
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
