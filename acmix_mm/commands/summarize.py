"""Summarise several comparisons in a table and a figure.

Each comparison has a label: its task or, with --sweep, the value of a number that differs between
the comparisons, such as a distance. The folder then contains summary.md, a table of the labels
against the mixers, and summary.png.

Examples: %(prog)s outline=work_dirs/outline match=work_dirs/match --out work_dirs/tasks
          %(prog)s 8=work_dirs/cue_8 16=work_dirs/cue_16 32=work_dirs/cue_32
          --sweep 'distance of the cue (pixels)' --reach conv=14 attn=20 --out work_dirs/cue
"""

import argparse

from acmix_mm.comparison.summary import read_reports, write_summary
from acmix_mm.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('comparisons', nargs='+', type=pair, metavar='LABEL=DIR',
                        help='label and work directory of a comparison')
    parser.add_argument('--sweep', metavar='NAME',
                        help='name of the number that the labels are: plot the metrics against it')
    parser.add_argument('--reach', nargs='+', type=number_pair, default=[],
                        metavar='MIXER=NUMBER',
                        help='with --sweep: mark a place on its axis for each mixer, such as half '
                        'the side of a receptive field that receptive_field prints')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to write to')


def pair(text: str) -> tuple[str, str]:
    """Split an argument at the first ``=``, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it has no ``=``.
    """
    name, equals, value = text.partition('=')
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f'takes NAME=VALUE pairs, got {text!r}')
    return name, value


def number_pair(text: str) -> tuple[str, float]:
    """Split an argument at the first ``=`` and convert what follows to a number.

    Raises:
        argparse.ArgumentTypeError: it has no ``=``, or no number follows.
    """
    name, value = pair(text)
    return name, number(value)


def number(text: str) -> float:
    """Convert an argument to a number, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be a number, got {text!r}') from None


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    folders = dict(args.comparisons)
    if len(folders) < len(args.comparisons):
        raise UsageError('The labels of the comparisons must differ.')
    if args.reach and args.sweep is None:
        raise UsageError('--reach needs --sweep, whose axis it marks.')
    if args.sweep is not None:
        try:
            for label in folders:
                number(label)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f'With --sweep, each label {error}.') from None
    path = write_summary(read_reports(folders), args.out, args.sweep or 'task',
                         args.sweep is not None, dict(args.reach))
    print(f'Wrote {path}.')
