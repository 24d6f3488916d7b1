"""Write a small generated dataset: circles, squares and triangles with masks.

One folder in COCO's and in ADE20K's layout at once. Example:
python tools/make_shapes.py data/shapes
"""

import argparse

from acmix_mm.datasets.shapes import write_shapes
from acmix_mm.engine.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='folder to write')
    parser.add_argument('--train-images', type=int, default=200, metavar='N')
    parser.add_argument('--val-images', type=int, default=50, metavar='N')
    parser.add_argument('--image-size', type=int, default=192, metavar='PIXELS')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    write_shapes(**vars(args))
    print(f'Wrote {args.train_images} training and {args.val_images} validation pictures to '
          f'{args.root}.')


if __name__ == '__main__':
    run_tool(main)
