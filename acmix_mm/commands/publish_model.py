"""Publish a training checkpoint: keep only weights, config, classes and package versions.

Optimiser, schedulers, logs and the unaveraged weights of EMA are left out. The file name is DST and
the first 8 digits of the file's SHA-256, as for OpenMMLab's checkpoints. The file can be passed to
the command test and named in the init_cfg of a config.

Example: %(prog)s work_dirs/…/epoch_12.pth maskrcnn_acmix_swin_t
"""

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('src', metavar='SRC', help='checkpoint of a training run')
    parser.add_argument('dst', metavar='DST', help='file to write; becomes DST-xxxxxxxx.pth')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    from acmix_mm.deploy.publish import publish
    print(f'Reading {args.src} …', flush=True)
    published = publish(args.src, args.dst)
    before, after = (os.path.getsize(path) / 1e6 for path in (args.src, published))
    print(f'Wrote {published}: {after:.1f} MB, reduced from {before:.1f} MB.')
