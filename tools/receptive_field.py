"""Measure the effective receptive field of backbones, stage by stage, by gradients.

The figure shows, for the central position of each stage's output, which pixels move it (Luo et al.,
arXiv 1701.04128); the numbers are sides of the smallest square that holds 90 % of the squared
gradient. Configs stand side by side, and with --mixers the variants of each.

Backbones have the weights of --checkpoints, or start as in a training, from their init_cfg or from
scratch. (An ACmix-ResNet starts with blocks that add nothing: only its shortcuts see.)

Examples: python tools/receptive_field.py configs/maskrcnn_acmix_swin_t.py
          --mixers acmix attn involution --cfg-options model.backbone.init_cfg=None
          python tools/receptive_field.py configs/shapes/maskrcnn_acmix_{swin,pvt}.py
          --checkpoints work_dirs/demo/epoch_10.pth work_dirs/pvt/epoch_10.pth --out fields.png
"""

import argparse

from acmix_mm.analysis.complexity import read_shape
from acmix_mm.analysis.config_receptive_field import fields_of, label, report, short_names, variants
from acmix_mm.analysis.figures import check_png, draw_receptive_fields, save
from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.engine.cli import KeyValue, run_tool
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config files')
    parser.add_argument('--checkpoints', nargs='+', metavar='FILE',
                        help='trained weights, one file for each config, whole detectors too')
    parser.add_argument('--mixers', nargs='+', choices=MIXERS, metavar='MIXER',
                        help=f'the variants of each config to measure, of {", ".join(MIXERS)} '
                        '(default: its own)')
    parser.add_argument('--shape', nargs='+', default=['384', '384'], metavar=('H', 'W'),
                        help='height and width of the random pictures (default: 384 384)')
    parser.add_argument('--samples', type=int, default=8, metavar='N',
                        help='random pictures to average over (default: 8)')
    parser.add_argument('--out', default='receptive_field.png', metavar='FILE',
                        help='the .png file to write (default: receptive_field.png)')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE',
                        help='override settings of all configs, as for tools/train.py')
    args = parser.parse_args()
    check_mmcv()
    check_png(args.out)
    shape = read_shape(args.shape)
    if args.samples < 1:
        raise UsageError(f'--samples takes a positive number, got {args.samples}.')
    if args.checkpoints and len(args.checkpoints) != len(args.configs):
        raise UsageError(f'--checkpoints takes one file for each config: there are '
                         f'{len(args.configs)} configs and {len(args.checkpoints)} files.')
    checkpoints = args.checkpoints or [None] * len(args.configs)
    columns = [
        (label(name, mixer, checkpoint), fields_of(cfg, shape, args.samples, checkpoint))
        for name, path, checkpoint in zip(short_names(args.configs), args.configs, checkpoints)
        for mixer, cfg in variants(load_config(path, args.cfg_options), args.mixers)]
    save(draw_receptive_fields(columns), args.out)
    print(f'{report(columns)}\nWrote {args.out}.')


if __name__ == '__main__':
    run_tool(main)
