"""Train a detector or segmentor.

Example: %(prog)s maskrcnn_acmix_swin_t --data-root data/coco
"""

import argparse

from acmix_mm.engine.cli import CONFIG_HELP, add_common_arguments, config_from
from acmix_mm.engine.runner import scale_learning_rate, train, use_mixed_precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', help=CONFIG_HELP)
    add_common_arguments(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from CHECKPOINT, or from the latest one in the work directory')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate linearly with the batch size')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    cfg = config_from(args)
    if args.amp:
        use_mixed_precision(cfg)
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    train(cfg)
