"""Train a detector or segmentor.

Example: python tools/train.py configs/maskrcnn_acmix_swin_t.py --data-root data/coco
"""

import argparse

from acmix_mm.engine.cli import add_common_arguments, config_from, run_tool
from acmix_mm.engine.runner import scale_learning_rate, train, use_mixed_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    add_common_arguments(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from CHECKPOINT, or from the latest one in the work directory')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate linearly with the batch size')
    args = parser.parse_args()

    cfg = config_from(args)
    if args.amp:
        use_mixed_precision(cfg)
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    train(cfg)


if __name__ == '__main__':
    run_tool(main)
