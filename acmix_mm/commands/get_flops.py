"""Count parameters and multiply-adds of a config's model, or of the networks in the paper.

Examples: %(prog)s maskrcnn_acmix_swin_t --shape 800 1344
          %(prog)s --zoo
"""

import argparse

from acmix_mm.analysis.complexity import complexity_report
from acmix_mm.analysis.published import published_counts_table
from acmix_mm.commands import positive_int
from acmix_mm.engine.cli import CONFIG_HELP
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', nargs='?', help=CONFIG_HELP)
    parser.add_argument('--shape', nargs=2, type=positive_int, metavar=('H', 'W'),
                        help='height and width of the input image (default: the size to which '
                        'the config pads images or, if it has none, 800 1344)')
    parser.add_argument('--zoo', action='store_true',
                        help="compare the paper's ten networks with the published counts")


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    if args.zoo == (args.config is not None):
        raise UsageError('Pass either a config or --zoo.')
    if args.zoo and args.shape is not None:
        raise UsageError('--zoo counts at 224×224, as published; omit --shape.')

    if args.zoo:
        print(published_counts_table())
        return
    check_mmcv()
    print(complexity_report(load_config(args.config), args.shape))
