"""Time ACmix against its rivals on the CPU, and measure the memory of each.

Cases: ACmixConv2d against the paper-shaped reference form (torch alone), and Swin-T against
MMDetection's plain one. Example: python tools/benchmark.py --cases conv-200x336
"""

import argparse
import json

import torch

from acmix_mm.benchmark import CASES, PASSES, compare, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), metavar='CASE',
                        help=f'any of {", ".join(CASES)} (default: all)')
    parser.add_argument('--repeats', type=int, default=5, help='counted runs of each (default: 5)')
    parser.add_argument('--threads', type=int, default=2, help='torch threads (default: 2)')
    parser.add_argument('--json', metavar='FILE', help='also write the results to FILE')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [result for case in args.cases for passes in PASSES
               for result in compare(case, passes, args.repeats)]
    print(table(results))
    if args.json:
        with open(args.json, 'w') as file:
            json.dump([result._asdict() for result in results], file, indent=2)


if __name__ == '__main__':
    main()
