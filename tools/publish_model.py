"""Publish a training checkpoint: keep only weights, config, classes and package versions.

Optimiser, schedulers, logs and the unaveraged weights of EMA are left out. The file name is DST and
the first 8 digits of the file's SHA-256, as for OpenMMLab's checkpoints. The file can be passed to
tools/test.py and named in the init_cfg of a config.

Example: python tools/publish_model.py work_dirs/…/epoch_12.pth maskrcnn_acmix_swin_t
"""

import argparse
import os

from acmix_mm.engine.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='checkpoint of a training run')
    parser.add_argument('dst', metavar='DST', help='file to write; becomes DST-xxxxxxxx.pth')
    args = parser.parse_args()

    from acmix_mm.deploy.publish import publish
    print(f'Reading {args.src} …', flush=True)
    published = publish(args.src, args.dst)
    before, after = (os.path.getsize(path) / 1e6 for path in (args.src, published))
    print(f'Wrote {published}: {after:.1f} MB, reduced from {before:.1f} MB.')


if __name__ == '__main__':
    run_tool(main)
