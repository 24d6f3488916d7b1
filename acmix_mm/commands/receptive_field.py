"""Measure the effective receptive field of each stage of a backbone, by gradients.

The figure shows which pixels affect the central position of each stage's output (Luo et al., arXiv
1701.04128). The tool prints the side of the smallest square that contains 90 %% of the squared
gradient, and of that which contains all of it. Each config gets a column, or one column per mixer
with --mixers.

Backbones load --checkpoints, or are initialised as for training: from their init_cfg or from
scratch. (The residual branches of a freshly initialised ACmix-ResNet are zero, so only its
shortcuts contribute.)

Examples: %(prog)s maskrcnn_acmix_swin_t
          --mixers acmix attn involution --cfg-options model.backbone.init_cfg=None
          %(prog)s shapes/maskrcnn_acmix_{swin,pvt}
          --checkpoints work_dirs/demo/epoch_10.pth work_dirs/pvt/epoch_10.pth --out fields.png
"""

import argparse

from acmix_mm.analysis.figures import check_png, draw_receptive_fields, save
from acmix_mm.analysis.receptive_field import (
    config_receptive_fields,
    mixer_variants,
    network_label,
    receptive_field_report,
    unique_names,
)
from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.commands import positive_int
from acmix_mm.engine.cli import CONFIG_HELP, add_cfg_options
from acmix_mm.engine.config import load_config
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help=CONFIG_HELP)
    parser.add_argument('--checkpoints', nargs='+', metavar='FILE',
                        help='trained weights of the backbone or the whole model, one per config')
    parser.add_argument('--mixers', nargs='+', choices=MIXERS, metavar='MIXER',
                        help='token mixers to measure in each config, among '
                        f"{', '.join(MIXERS)} (default: the config's own)")
    parser.add_argument('--shape', nargs=2, type=positive_int, default=(384, 384),
                        metavar=('H', 'W'),
                        help='height and width of the random images (default: 384 384)')
    parser.add_argument('--samples', type=positive_int, default=8, metavar='N',
                        help='number of random images to average over (default: 8)')
    parser.add_argument('--out', default='receptive_field.png', metavar='FILE',
                        help='output .png file (default: receptive_field.png)')
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    check_mmcv()
    check_png(args.out)
    if args.checkpoints and len(args.checkpoints) != len(args.configs):
        raise UsageError('--checkpoints takes one file per config, got '
                         f'{len(args.configs)} configs and {len(args.checkpoints)} files.')
    checkpoints = args.checkpoints or [None] * len(args.configs)
    columns = [
        (network_label(name, mixer, checkpoint),
         config_receptive_fields(cfg, tuple(args.shape), args.samples, checkpoint))
        for name, path, checkpoint in zip(unique_names(args.configs), args.configs, checkpoints)
        for mixer, cfg in mixer_variants(load_config(path, args.cfg_options), args.mixers)]
    save(draw_receptive_fields(columns), args.out)
    print(f'{receptive_field_report(columns)}\nWrote {args.out}.')
