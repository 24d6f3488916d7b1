"""Look into a detector or segmentor at work: predictions, attention, and both paths.

For each image NAME_predictions.png; and of the last ACmix layer in each stage of the backbone
NAME_attention_stage_N.png, the weights with which one point attends to its neighbourhood, head by
head, and NAME_energy.png, how much attention and convolution add to the output.

Example: python tools/visualize.py configs/shapes/maskrcnn_acmix_swin.py work_dirs/demo/epoch_10.pth
         data/shapes/val2017/00000.jpg --out-dir pictures --point 60 110
"""

import argparse

from acmix_mm.analysis.visualize import visualize
from acmix_mm.engine.cli import KeyValue, run_tool
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='pictures to look at')
    parser.add_argument('--out-dir', required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--point', nargs=2, type=int, metavar=('X', 'Y'),
                        help='whose attention to draw, in pixels (default: the centre)')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE',
                        help='override settings of the config')
    args = parser.parse_args()
    check_mmcv()
    cfg = load_config(args.config, args.cfg_options)
    point = None if args.point is None else tuple(args.point)
    for path in visualize(cfg, args.checkpoint, args.images, args.out_dir, point):
        print(path)


if __name__ == '__main__':
    run_tool(main)
