"""Generate a small dataset of circles, squares and triangles with masks.

The folder has both COCO's and ADE20K's layout.

Example: python tools/make_shapes.py data/shapes
"""

import argparse

from acmix_mm.datasets.shapes import write_shapes
from acmix_mm.engine.cli import run_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', help='folder to create')
    parser.add_argument('--train-images', type=int, default=200, metavar='N',
                        help='number of training images (default: 200)')
    parser.add_argument('--val-images', type=int, default=50, metavar='N',
                        help='number of validation images (default: 50)')
    parser.add_argument('--image-size', type=int, default=192, metavar='PIXELS',
                        help='height and width of an image (default: 192)')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of the random number generator (default: 0)')
    args = parser.parse_args()
    write_shapes(**vars(args))
    print(f'Wrote {args.train_images} training and {args.val_images} validation images to '
          f'{args.root}.')


if __name__ == '__main__':
    run_tool(main)
