"""Generate a small dataset of shapes with masks.

The folder has both COCO's and ADE20K's layout. What the class of a shape depends on is the task:
outline, on its outline: circle, square or triangle;
match, on whether a disc at distance --radius has its color;
cue, on a mark at --distance;
count, on the number of such shapes in the image, 1 to --number.

Example: %(prog)s data/cue --task cue --distance 32 --image-size 96
"""

import argparse

from acmix_mm.analysis.figures import check_png, draw_task, save
from acmix_mm.datasets.shapes import write_shapes
from acmix_mm.datasets.tasks import DIFFICULTY, TASKS, make_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('root', help='folder to create')
    parser.add_argument('--task', choices=TASKS, default='outline',
                        help='what the class of a shape depends on (default: outline)')
    parser.add_argument('--radius', type=int, metavar='PIXELS',
                        help='of match: distance of the discs to compare with (default: 12)')
    parser.add_argument('--distance', type=int, metavar='PIXELS',
                        help='of cue: distance between a shape and its mark (default: 24)')
    parser.add_argument('--number', type=int, metavar='N',
                        help='of count: the largest number to count to (default: 3)')
    parser.add_argument('--train-images', type=int, default=200, metavar='N',
                        help='number of training images (default: 200)')
    parser.add_argument('--val-images', type=int, default=50, metavar='N',
                        help='number of validation images (default: 50)')
    parser.add_argument('--image-size', type=int, default=192, metavar='PIXELS',
                        help='height and width of an image (default: 192)')
    parser.add_argument('--seed', type=int, default=0,
                        help='seed of the random number generator (default: 0)')
    parser.add_argument('--illustration', metavar='FILE.png',
                        help='also draw a figure of the first images and their classes')


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    task = make_task(args.task, **{name: getattr(args, name) for name in DIFFICULTY.values()
                                   if getattr(args, name) is not None})
    if args.illustration:
        check_png(args.illustration)
    write_shapes(args.root, args.train_images, args.val_images, args.image_size, args.seed, task)
    print(f'Wrote {args.train_images} training and {args.val_images} validation images to '
          f'{args.root}.')
    if args.illustration:
        save(draw_task(task, args.task, args.image_size, args.seed), args.illustration)
        print(f'Illustration: {args.illustration}')
