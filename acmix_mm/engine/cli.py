"""Command-line options and error handling shared by the tools."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, Optional

from mmengine.config import Config, DictAction
from torch import distributed

from acmix_mm.engine.config import load_config, set_classes, set_data_root
from acmix_mm.environment import check_mmcv
from acmix_mm.utils.errors import DataError, UsageError


class KeyValue(DictAction):
    """MMEngine's ``DictAction``, which raises a bare ValueError for a value without ``=``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Sequence[str], option_string: Optional[str] = None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE pairs, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def positive_int(text: str) -> int:
    """Convert an argument to a positive integer, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'must be a positive integer, got {text!r}')
    return int(text)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, as MMDetection's tools have it."""
    parser.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE',
                        help='override settings of the config, e.g. train_dataloader.batch_size=4; '
                        'write lists as "[1,2]" and tuples as "(1,2)", without spaces')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that change a config: MMDetection's, and two for custom datasets."""
    parser.add_argument('--work-dir', metavar='DIR',
                        help='directory for logs and checkpoints (default: work_dirs/CONFIG_NAME)')
    parser.add_argument('--data-root', metavar='DIR',
                        help="read all data from DIR, which has the same layout as the config's "
                        'data_root')
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help='class names, in label order')
    add_cfg_options(parser)
    parser.set_defaults(launcher='none', local_rank=0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by training and testing: config overrides and distributed launch."""
    add_config_arguments(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='launcher of a distributed job')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help=argparse.SUPPRESS)


def config_from(args: argparse.Namespace) -> Config:
    """Load the config described by the common options.

    Raises:
        UsageError: mmcv does not work, or an option does not match the config.
    """
    check_mmcv()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    if args.classes is not None:
        set_classes(cfg, args.classes)
    return cfg


def file_to_write(name: str) -> Path:
    """Return the path of an output file, after checking that its directory is writable.

    Raises:
        UsageError: the directory does not exist or is not writable.
    """
    path = Path(name)
    if not path.parent.is_dir():
        raise UsageError(f'The directory {path.parent} does not exist; create it, or name another '
                         'file.')
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f'The directory {path.parent} is not writable; name another file.')
    return path


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's main function; print a user-facing error and exit with status 1.

    Any other exception is a bug: its traceback is followed by how to report it.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Interrupted.')
    except UsageError as error:
        # Only one process per node prints a message that all have; data is read by one alone.
        prints = os.environ.get('LOCAL_RANK', '0') == '0' or isinstance(error, DataError)
        sys.exit(f'error: {error}' if prints else 1)
    except Exception as error:
        traceback.print_exc()
        sys.exit(f'internal error ({type(error).__name__}): please report the traceback above, '
                 'with the command and the output of `python -m acmix_mm.environment`.')
    exit_after_gloo()


def exit_after_gloo() -> None:
    """Exit immediately if this is a process of a distributed CPU job.

    Gloo's threads sometimes outlive the interpreter and abort a finished process ("terminate
    called without an active exception"), which torchrun then reports as a failure.
    """
    running = distributed.is_available() and distributed.is_initialized()
    if running and distributed.get_backend() == 'gloo':
        distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
