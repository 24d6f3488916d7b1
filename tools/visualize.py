"""Visualize a detector or segmentor: predictions, attention, and the contribution of each path.

Writes NAME_predictions.png for each image. For the last ACmix layer in each stage of the backbone,
it also writes NAME_attention_stage_N.png, the attention weights of one point for each head; and
NAME_energy.png, how much attention and convolution contribute to the output of these layers.

Example: python tools/visualize.py configs/shapes/maskrcnn_acmix_swin.py work_dirs/demo/epoch_10.pth
         data/shapes/val2017/00000.jpg --out-dir figures --point 60 110
"""

import argparse

from acmix_mm.analysis.visualize import visualize
from acmix_mm.engine.cli import add_cfg_options, run_tool
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='image files')
    parser.add_argument('--out-dir', required=True, metavar='DIR', help='output folder')
    parser.add_argument('--point', nargs=2, type=int, metavar=('X', 'Y'),
                        help='point whose attention is drawn, in pixels (default: the centre)')
    add_cfg_options(parser)
    args = parser.parse_args()
    check_mmcv()
    cfg = load_config(args.config, args.cfg_options)
    for path in visualize(cfg, args.checkpoint, args.images, args.out_dir, args.point):
        print(path)


if __name__ == '__main__':
    run_tool(main)
