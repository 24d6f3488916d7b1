"""The files of a run: checked before the work, written atomically, in a folder of its own."""

import contextlib
import logging
import os
import re
import resource
import signal

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import save_checkpoint

from acmix_mm.commands import errors_as_messages
from acmix_mm.engine.outputs import (
    AtomicCheckpointHook,
    atomic_files,
    check_outputs,
    exclusive_folder,
    training_folder,
)
from acmix_mm.engine.runner import test as evaluate
from acmix_mm.engine.runner import train
from acmix_mm.utils.errors import UsageError


@HOOKS.register_module()
class AfterEpoch(Hook):
    """Calls a function when the first epoch has been saved."""

    priority = 'LOWEST'
    function = None

    def after_train_epoch(self, runner):
        if runner.epoch == 0:
            AfterEpoch.function()


@pytest.fixture(autouse=True)
def _signals():
    """Restore the handlers of the signals that the tools handle."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGCHLD)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.fixture
def one_image_epochs(small_detector, monkeypatch):
    """A function that returns a config of epochs with one image, of which only the last is kept."""
    def make(after_first_epoch):
        monkeypatch.setattr(AfterEpoch, 'function', staticmethod(after_first_epoch))
        return small_detector(**{
            'train_cfg.max_epochs': 2, 'train_dataloader.dataset.indices': 1,
            'train_dataloader.batch_size': 1, 'default_hooks.checkpoint.max_keep_ckpts': 1,
            'custom_hooks': [dict(type='AfterEpoch')]})
    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def checkpoints(cfg):
    return [name for name in sorted(os.listdir(cfg.work_dir)) if name.endswith('.pth')]


def test_a_full_disk_keeps_the_last_checkpoint(one_image_epochs):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = one_image_epochs(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1])))
    try:
        with pytest.raises(UsageError, match='The disk is full: .*epoch_2.pth cannot be written .*'
                           f'{cfg.work_dir} are kept; free some space and pass --resume'):
            train(cfg)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(cfg) == ['epoch_1.pth']
    # After MMEngine's fork has loaded a checkpoint, torch.load refuses its classes again.
    saved = torch.load(f'{cfg.work_dir}/epoch_1.pth', weights_only=False)
    assert saved['meta']['epoch'] == 1
    with open(f'{cfg.work_dir}/last_checkpoint') as file:
        assert file.read() == f'{cfg.work_dir}/epoch_1.pth'


def test_log_messages_on_a_full_disk_print_nothing(tmp_path, capsys):
    handler = logging.FileHandler('/dev/full', delay=True)
    record = logging.makeLogRecord(dict(msg='message'))
    with training_folder(Config(dict(launcher='none', work_dir=str(tmp_path)))):
        handler.emit(record)
    assert capsys.readouterr().err == ''
    handler.emit(record)
    assert 'No space left on device' in capsys.readouterr().err
    with contextlib.suppress(OSError):
        handler.close()


def test_sigterm_interrupts_like_ctrl_c(one_image_epochs):
    cfg = one_image_epochs(lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match=r'^Interrupted\. Pass --resume to continue from the '
                       f'last checkpoint in {cfg.work_dir}'), errors_as_messages():
        train(cfg)
    assert checkpoints(cfg) == ['epoch_1.pth']


def test_a_signal_may_also_end_the_workers(tmp_path):
    cfg = Config(dict(launcher='none', work_dir=str(tmp_path)))
    with (pytest.raises(SystemExit, match=r'^Interrupted\. Pass --resume'), errors_as_messages(),
          training_folder(cfg)):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError('DataLoader worker is killed by signal: Terminated.')


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'epoch_1.pth'
    save_checkpoint(dict(weight=torch.zeros(1000)), str(path))
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        def put_half(self, content, target):
            with open(target, 'wb') as file:
                file.write(content[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

        LocalBackend.put = put_half
        with atomic_files():
            save_checkpoint(dict(weight=torch.ones(1000)), str(path))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == before
    partial, complete = names(tmp_path)
    assert re.fullmatch(r'\.partial\.\w+\.epoch_1\.pth', partial)
    assert complete == 'epoch_1.pth'
    # The next run cleans up.
    with training_folder(Config(dict(launcher='none', work_dir=str(tmp_path)))):
        assert names(tmp_path) == ['epoch_1.pth', 'lock']


@pytest.mark.parametrize('fails', [True, False])
def test_old_checkpoints_are_deleted_after_saving(fails, tmp_path):
    old, new = tmp_path / 'best_epoch_1.pth', tmp_path / 'best_epoch_2.pth'
    for path in (old, new):
        path.touch()
    hook = AtomicCheckpointHook(save_best='mIoU')
    hook.file_backend = LocalBackend()
    hook.best_ckpt_path = str(new)
    try:
        with hook.deletions_after_saving():
            for path in (old, new):
                assert hook.file_backend.isfile(str(path))
                hook.file_backend.remove(str(path))
            if fails:
                raise OSError
    except OSError:
        pass
    assert names(tmp_path) == (['best_epoch_1.pth'] if fails else []) + ['best_epoch_2.pth']
    assert type(hook.file_backend) is LocalBackend


def test_a_second_run_is_rejected_while_the_first_lives(small_detector, tmp_path):
    cfg = small_detector()
    ready, finish = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with exclusive_folder(cfg.work_dir):
            # As a data loader worker, which may outlive its parent for some seconds.
            if os.fork() == 0:
                os.read(finish[0], 1)
                os._exit(0)
            os.write(ready[1], b'!')
            signal.pause()
    os.read(ready[0], 1)
    with pytest.raises(UsageError, match=f'Another run is writing to {cfg.work_dir}; wait for it '
                       'to finish, or name another directory with --work-dir'):
        train(cfg)
    assert names(tmp_path / os.path.basename(cfg.work_dir)) == ['lock']
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with exclusive_folder(cfg.work_dir):
        pass
    os.write(finish[1], b'!')


@pytest.mark.parametrize(('option', 'value'), [
    ('work_dir', '{file}/work'), ('test_evaluator.outfile_prefix', '/proc/none/x'),
    ('test_evaluator.output_dir', '/proc/none'), ('test_evaluator.out_file_path', '{file}/out.pkl'),
    ('default_hooks.visualization.test_out_dir', '{file}'),
    ('default_hooks.checkpoint.out_dir', '{file}'), ('visualizer.save_dir', '/proc/none/x'),
])
def test_outputs_are_checked_before_the_work(option, value, small_detector, tmp_path):
    (tmp_path / 'file').touch()
    cfg = small_detector()
    check_outputs(cfg)
    assert names(tmp_path) == ['file']
    metrics = {'test_evaluator.output_dir': 'mmseg.IoUMetric',
               'test_evaluator.out_file_path': 'DumpDetResults'}
    if option in metrics:
        cfg.test_evaluator = dict(type=metrics[option])
    cfg.merge_from_dict({option: value.format(file=tmp_path / 'file')})
    with pytest.raises(UsageError, match=r'cannot be written .*; name another one'):
        check_outputs(cfg)
    # The checkpoint is not even looked for.
    cfg.load_from = 'none.pth'
    with pytest.raises(UsageError, match='cannot be written'):
        evaluate(cfg)
