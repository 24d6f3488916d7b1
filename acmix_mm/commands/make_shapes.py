"""Generate a small dataset of circles, squares and triangles with masks.

The folder has both COCO's and ADE20K's layout.

Example: %(prog)s data/shapes
"""

import argparse

from acmix_mm.datasets.shapes import write_shapes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('root', help='folder to create')
    parser.add_argument('--train-images', type=int, default=200, metavar='N',
                        help='number of training images (default: 200)')
    parser.add_argument('--val-images', type=int, default=50, metavar='N',
                        help='number of validation images (default: 50)')
    parser.add_argument('--image-size', type=int, default=192, metavar='PIXELS',
                        help='height and width of an image (default: 192)')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of the random number generator (default: 0)')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    write_shapes(args.root, args.train_images, args.val_images, args.image_size, args.seed)
    print(f'Wrote {args.train_images} training and {args.val_images} validation images to '
          f'{args.root}.')
