"""The files that a run writes: checked beforehand, written atomically, by one run at a time."""

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional, Union

from filelock import FileLock, Timeout
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from acmix_mm.engine.config import evaluator_configs
from acmix_mm.engine.resuming import repair_last_checkpoint
from acmix_mm.utils.atomic_write import PARTIAL, atomic_write
from acmix_mm.utils.errors import UsageError, is_interruption
from acmix_mm.utils.output_paths import folder_to_write

# Each launcher's environment variable for the rank of a process.
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_outputs(cfg: Config) -> None:
    """Check that all files of a run can be written, so that it does not fail at its end.

    Raises:
        UsageError: a directory is not writable.
    """
    hooks = cfg.get('default_hooks') or {}
    folders = [cfg.get('work_dir'), (hooks.get('checkpoint') or {}).get('out_dir'),
               (hooks.get('visualization') or {}).get('test_out_dir'),
               (cfg.get('visualizer') or {}).get('save_dir')]
    for evaluator in evaluator_configs(cfg):
        folders.append(evaluator.get('output_dir'))
        for key in ('outfile_prefix', 'out_file_path'):
            if evaluator.get(key):
                folders.append(os.path.dirname(evaluator[key]) or '.')
    for folder in folders:
        if folder and '://' not in folder:
            folder_to_write(folder)


@contextlib.contextmanager
def exclusive_folder(folder: str) -> Iterator[None]:
    """Lock a folder, which is created if necessary, against other runs.

    Raises:
        UsageError: another process has locked the folder, or it cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        # On Linux an flock, which the kernel releases even if the process is killed.
        lock = FileLock(os.path.join(folder, 'lock')).acquire(blocking=False)
    except Timeout as error:
        raise UsageError(f'Another run is writing to {folder}; wait for it to finish, or name '
                         'another directory with --work-dir.') from error
    except OSError as error:
        raise UsageError(f'The directory {folder} cannot be written ({error.strerror}); name '
                         'another one with --work-dir.') from error
    with lock:
        yield


@contextlib.contextmanager
def training_folder(cfg: Config) -> Iterator[None]:
    """Reserve the work directory for one training run, and prepare it for resuming.

    Raises:
        UsageError: another run is writing to it, no checkpoint in it can be resumed from, or the
            disk is full.
    """
    is_main = cfg.launcher == 'none' or os.environ.get(RANKS[cfg.launcher], '0') == '0'
    with exclusive_folder(cfg.work_dir) if is_main else contextlib.nullcontext():
        if is_main:
            for path in Path(cfg.work_dir).glob(f'{PARTIAL}*'):
                path.unlink()
        if is_main and cfg.get('resume') and not cfg.get('load_from'):
            repair_last_checkpoint(cfg.work_dir)
        # Each log message would print a traceback when the disk is full.
        raise_exceptions, logging.raiseExceptions = logging.raiseExceptions, False
        try:
            with atomic_files():
                yield
        except (KeyboardInterrupt, RuntimeError) as error:
            if not is_interruption(error):
                raise
            raise KeyboardInterrupt('Pass --resume to continue from the last checkpoint in '
                                    f'{cfg.work_dir}.') from None
        except (OSError, UsageError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in DISK_FULL:
                raise
            raise UsageError(f'The disk is full: {str(error).rstrip(".")}. Complete checkpoints '
                             f'in {cfg.work_dir} are kept; free some space and pass --resume to '
                             'continue from the last one.') from error
        finally:
            logging.raiseExceptions = raise_exceptions


class AtomicLocalBackend(LocalBackend):
    """MMEngine's access to local files, which writes each file completely or not at all."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(filepath)), exist_ok=True)
        with atomic_write(filepath) as temporary:
            super().put(obj, str(temporary))

    def put_text(self, obj: str, filepath: Union[str, Path], encoding: str = 'utf-8') -> None:
        os.makedirs(os.path.dirname(os.path.abspath(filepath)), exist_ok=True)
        with atomic_write(filepath) as temporary:
            super().put_text(obj, str(temporary), encoding)


@contextlib.contextmanager
def atomic_files() -> Iterator[None]:
    """Make MMEngine write local files atomically: checkpoints, and predictions of a test."""
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
    try:
        yield
    finally:
        register_backend('local', LocalBackend, force=True, prefixes='')


def use_atomic_checkpoints(cfg: Config) -> None:
    """Replace MMEngine's ``CheckpointHook`` in a config by :class:`AtomicCheckpointHook`."""
    hooks = cfg.setdefault('default_hooks', {})
    # A config without this entry gets MMEngine's hook; None disables it.
    hook = hooks.setdefault('checkpoint', dict(type='CheckpointHook'))
    if hook and hook['type'] in ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook):
        hook['type'] = f'{__name__}.{AtomicCheckpointHook.__name__}'


class PostponedDeletions:
    """A file backend that collects deletions instead of carrying them out.

    Args:
        backend: the backend, which serves everything else.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.files: list[str] = []
        self.folders: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self.files.append(path)

    def rmtree(self, path: str) -> None:
        self.folders.append(path)


class AtomicCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, which deletes a checkpoint only after writing its successor.

    It takes the arguments of ``CheckpointHook``, which deletes first: a run that is killed while it
    saves would lose its last checkpoint, or the best one.
    """

    @contextlib.contextmanager
    def deletions_after_saving(self) -> Iterator[None]:
        """Postpone deletions to the end of the context; if it raises, nothing is deleted."""
        backend = self.file_backend
        self.file_backend = postponed = PostponedDeletions(backend)
        try:
            yield
        finally:
            self.file_backend = backend
        best = [getattr(self, 'best_ckpt_path', None),
                *getattr(self, 'best_ckpt_path_dict', {}).values()]
        for path in postponed.files:
            if path not in (self.last_ckpt, *best):
                backend.remove(path)
        for path in postponed.folders:
            if path not in (self.last_ckpt, *best):
                backend.rmtree(path)

    def after_train_epoch(self, runner: Runner) -> None:
        with self.deletions_after_saving():
            super().after_train_epoch(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: Optional[dict] = None) -> None:
        with self.deletions_after_saving():
            super().after_train_iter(runner, batch_idx, data_batch, outputs)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        with self.deletions_after_saving():
            super().after_val_epoch(runner, metrics)
