"""Evaluate a checkpoint of a detector or segmentor, or one that was exported to ONNX.

An ONNX file runs in ONNX Runtime on the CPU, on the config's test data.

Examples: %(prog)s maskrcnn_acmix_swin_t work_dirs/…/epoch_12.pth
          %(prog)s maskrcnn_acmix_swin_t maskrcnn.onnx
"""

import argparse

from acmix_mm.deploy.runtime import test_onnx
from acmix_mm.engine.cli import CONFIG_HELP, add_common_arguments, config_from
from acmix_mm.engine.runner import augment_test, save_predictions, show_predictions, test


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', help='checkpoint file, or a file '
                        'from tools/export_onnx.py (.onnx)')
    add_common_arguments(parser)
    parser.add_argument('--out', metavar='PATH', help='save the predictions to PATH: detections '
                        'as a pickle (PATH ends in .pkl or .pickle), segmentations as label maps '
                        'in the directory PATH')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save drawings of the predictions '
                        'to DIR; detections are drawn next to the ground truth')
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS',
                        help='how long --show displays each image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: average '
                        'predictions over augmented copies of each image')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    cfg = config_from(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        show_predictions(cfg, args.show, args.show_dir, args.wait_time)
    if args.out:
        save_predictions(cfg, args.out)
    if args.tta:
        augment_test(cfg)
    if args.checkpoint.endswith('.onnx'):
        test_onnx(cfg, args.checkpoint)
    else:
        test(cfg)
