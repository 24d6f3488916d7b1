"""What the command-line tools share: options, and errors as plain messages."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Optional

from mmengine.config import Config, DictAction
from torch import distributed

from acmix_mm.engine.config import load_config, set_classes, set_data_root
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import UsageError


class KeyValue(DictAction):
    """MMEngine's KEY=VALUE pairs, refused in words where there is no pair."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Sequence[str], option_string: Optional[str] = None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE pairs, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def positive_int(text: str) -> int:
    """Parse a positive integer; an argparse ``type``."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a positive integer, got {text!r}')
    return int(text)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that change a config; MMDetection's, and two for own data."""
    parser.add_argument('--work-dir', metavar='DIR',
                        help='where logs and checkpoints go (default: work_dirs/NAME OF CONFIG)')
    parser.add_argument('--data-root', metavar='DIR',
                        help="read all data from below DIR, laid out as the config's own")
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help='names of the classes, in the order of their labels')
    parser.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE',
                        help='override settings of the config, e.g. train_dataloader.batch_size=4; '
                        'lists as "[1,2]", tuples as "(1,2)", without spaces')
    parser.set_defaults(launcher='none', local_rank=0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share: on the config, and of distributed jobs."""
    add_config_arguments(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='how a distributed job was started')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help=argparse.SUPPRESS)


def config_from(args: argparse.Namespace) -> Config:
    """Load the config that the common options describe.

    Raises:
        UsageError: mmcv does not work, or the options do not fit.
    """
    check_mmcv()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = os.path.splitext(os.path.basename(args.config))[0]
        cfg.work_dir = os.path.join('work_dirs', name)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    if args.classes is not None:
        set_classes(cfg, args.classes)
    return cfg


def file_to_write(name: str) -> Path:
    """The path of a file that a tool is to write.

    Raises:
        UsageError: its folder does not exist, or nothing can be written there.
    """
    path = Path(name)
    if not path.parent.is_dir():
        raise UsageError(f'The folder {path.parent} does not exist; make it, or name another file.')
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f'Nothing can be written to the folder {path.parent}; name another file.')
    return path


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool; print an error that the user can mend as one message and exit with status 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Interrupted.')
    except UsageError as error:
        # One process of a node speaks for all.
        sys.exit(f'error: {error}' if os.environ.get('LOCAL_RANK', '0') == '0' else 1)
    leave_gloo()


def leave_gloo() -> None:
    """End a finished process of a distributed CPU run at once.

    Gloo's threads now and then outlive the interpreter, and abort a process that has done its
    work ("terminate called without an active exception"); torchrun then reports a failure.
    """
    running = distributed.is_available() and distributed.is_initialized()
    if running and distributed.get_backend() == 'gloo':
        distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
