"""Count parameters and multiply-adds of a config's model, or of the networks in the paper.

Examples: python tools/get_flops.py configs/maskrcnn_acmix_swin_t.py --shape 800 1344
          python tools/get_flops.py --zoo
"""

import argparse

from acmix_mm.analysis.complexity import complexity_report
from acmix_mm.analysis.published import published_counts_table
from acmix_mm.engine.cli import positive_int, run_tool
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument('--shape', nargs=2, type=positive_int, metavar=('H', 'W'),
                        help='height and width of the input image (default: the size to which '
                        'the config pads images or, if it has none, 800 1344)')
    parser.add_argument('--zoo', action='store_true',
                        help="compare the paper's ten networks with the published counts")
    args = parser.parse_args()
    if args.zoo == (args.config is not None):
        raise UsageError('Pass either a config or --zoo.')
    if args.zoo and args.shape is not None:
        raise UsageError('--zoo counts at 224×224, as published; omit --shape.')

    if args.zoo:
        print(published_counts_table())
        return
    check_mmcv()
    print(complexity_report(load_config(args.config), args.shape))


if __name__ == '__main__':
    run_tool(main)
