"""Visualize a detector or segmentor: predictions, attention, and the contribution of each path.

Writes NAME_predictions.png for each image. For the last ACmix layer in each stage of the backbone,
it also writes NAME_attention_stage_N.png, the attention weights of one point for each head; and
NAME_energy.png, how much attention and convolution contribute to the output of these layers.

Example: %(prog)s shapes/maskrcnn_acmix_swin work_dirs/demo/epoch_10.pth
         data/shapes/val2017/00000.jpg --out-dir figures --point 60 110
"""

import argparse

from acmix_mm.analysis.visualize import visualize
from acmix_mm.engine.cli import CONFIG_HELP, add_cfg_options
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', help=CONFIG_HELP)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    parser.add_argument('--out-dir', required=True, metavar='DIR', help='output folder')
    parser.add_argument('--point', nargs=2, type=int, metavar=('X', 'Y'),
                        help='point whose attention is drawn, in pixels (default: the centre)')
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    check_mmcv()
    cfg = load_config(args.config, args.cfg_options)
    for path in visualize(cfg, args.checkpoint, args.images, args.out_dir, args.point):
        print(path)
