"""Count parameters and multiply-adds, of a config's model or of the networks of the paper.

Examples: python tools/get_flops.py configs/maskrcnn_acmix_swin_t.py --shape 800 1344
          python tools/get_flops.py --zoo
"""

import argparse

from acmix_mm.analysis.complexity import complexity_report, read_shape
from acmix_mm.analysis.published import zoo_table
from acmix_mm.engine.cli import run_tool
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config file')
    parser.add_argument('--shape', nargs='+', metavar=('H', 'W'),
                        help='height and width of the picture that the network sees (default: what '
                        'a segmentation config pads to, 800 1344 for detection)')
    parser.add_argument('--zoo', action='store_true',
                        help='published against counted, for the ten networks of the paper')
    args = parser.parse_args()
    if args.zoo == (args.config is not None):
        raise UsageError('Name a config to count, or pass --zoo: one of the two.')
    if args.zoo and args.shape is not None:
        raise UsageError('--zoo counts at 224×224, as published; leave out --shape.')

    if args.zoo:
        print(zoo_table())
        return
    shape = None if args.shape is None else read_shape(args.shape)
    check_mmcv()
    print(complexity_report(load_config(args.config), shape))


if __name__ == '__main__':
    run_tool(main)
