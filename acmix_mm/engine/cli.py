"""Command-line options that several commands share."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from mmengine.config import Config, DictAction

from acmix_mm.engine.config import load_config, set_classes, set_data_root
from acmix_mm.environment import check_mmcv

CONFIG_HELP = 'config file, or the name of an installed config'


class KeyValue(DictAction):
    """MMEngine's ``DictAction``, which raises a bare ValueError for a value without ``=``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: Sequence[str], option_string: Optional[str] = None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE pairs, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, as MMDetection's tools have it."""
    parser.add_argument('--cfg-options', nargs='+', action=KeyValue, metavar='KEY=VALUE',
                        help='override settings of the config, e.g. train_dataloader.batch_size=4; '
                        'write lists as "[1,2]" and tuples as "(1,2)", without spaces')


def add_config_arguments(parser: argparse.ArgumentParser,
                         default_work_dir: str = 'work_dirs/CONFIG_NAME') -> None:
    """Add the options that change a config: MMDetection's, and two for custom datasets."""
    parser.add_argument('--work-dir', metavar='DIR',
                        help=f'directory for logs and checkpoints (default: {default_work_dir})')
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
    os.environ.setdefault('LOCAL_RANK', os.environ.get('SLURM_LOCALID', str(args.local_rank)))
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(cfg.filename).stem)
    if args.data_root is not None:
        set_data_root(cfg, args.data_root)
    if args.classes is not None:
        set_classes(cfg, args.classes)
    return cfg
