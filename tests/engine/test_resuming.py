"""Resuming: from an intact checkpoint, and with the same results as an uninterrupted run."""

import logging
import os
import random
import signal
from copy import deepcopy
from types import SimpleNamespace

import mmdet.utils
import mmseg.utils
import pytest
import torch
import torchvision  # noqa: F401  MMEngine imports it in each process that trains.
from helpers.checkpoints import differing, training_state
from helpers.comparison import SEGMENTATION, TINY, config
from helpers.tools import free_port
from mmdet.datasets.transforms import CachedMixUp, CachedMosaic
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from acmix_mm.engine.resuming import make_reproducible, repair_last_checkpoint
from acmix_mm.engine.runner import train
from acmix_mm.engine.samples import forget_images
from acmix_mm.utils.errors import CheckpointError

SMALL_IMAGES = {
    'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='Resize', scale=(64, 64)), dict(type='RandomFlip', prob=0.5),
        dict(type='PhotoMetricDistortion'), dict(type='PackSegInputs')],
    **{f'{split}_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
        dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]
       for split in ('val', 'test')}}


@HOOKS.register_module()
class Kill(Hook):
    """Kills its process at the ``stage``-th of these stages, and numbers them in a file."""

    def __init__(self, stage):
        self.stage = stage
        self.passed = 0

    def kill(self, *args, **kwargs):
        self.passed += 1
        if self.passed == self.stage:
            os.kill(os.getpid(), signal.SIGKILL)

    before_train = before_train_iter = after_train_iter = kill
    before_val_iter = after_val_epoch = before_save_checkpoint = kill


@pytest.fixture(scope='module', autouse=True)
def _imported():
    """Import what MMEngine would otherwise import in each of the new processes."""
    mmdet.utils.register_all_modules(init_default_scope=False)
    mmseg.utils.register_all_modules(init_default_scope=False)


def run(cfg, ranks=1):
    """Train in ``ranks`` new processes; return whether they finished rather than being killed."""
    port = free_port()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # OpenMP's threads do not survive a fork.
                torch.set_num_threads(1)
                os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK=str(rank),
                                  LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                train(cfg)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    statuses = []
    while children:
        child, status = os.wait()
        children.remove(child)
        statuses.append(status)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
    # Processes of a killed one fail.
    assert signal.SIGKILL in statuses or not any(statuses)
    return not any(statuses)


@pytest.fixture
def segmentor(shapes, small_detector, tmp_path):
    """A config of a small segmentor that trains for four iterations with two workers."""
    cfg = config(SEGMENTATION, shapes, **TINY, **SMALL_IMAGES)
    cfg.merge_from_dict({
        'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2, 'val_dataloader.dataset.indices': 1,
        'val_dataloader.num_workers': 0, 'val_dataloader.persistent_workers': False,
        'default_hooks.checkpoint': dict(interval=2, max_keep_ckpts=1, save_best='mIoU')})
    return cfg


@pytest.fixture
def detector(small_detector):
    """A config of a small detector that trains for two epochs of two iterations."""
    return small_detector(**{
        'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 1, 'custom_hooks': [
            dict(type='EMAHook', ema_type='ExpMomentumEMA')],
        'train_dataloader.dataset.indices': 4, 'val_dataloader.dataset.indices': 1,
        'train_dataloader.num_workers': 1, 'train_dataloader.persistent_workers': True,
        'model.backbone.drop_path_rate': 0.2,
        'default_hooks.checkpoint': dict(max_keep_ckpts=1, save_best='coco/bbox_mAP')})


@pytest.mark.parametrize(('name', 'ranks', 'kills'), [
    ('segmentor', 1, 5), ('segmentor', 2, 1), ('detector', 1, 5), ('detector', 2, 1)])
def test_a_killed_run_gives_the_same_checkpoint(name, ranks, kills, request, tmp_path):
    cfg = request.getfixturevalue(name)
    cfg.update(randomness=dict(seed=3), launcher='none' if ranks == 1 else 'pytorch')

    def attempt(folder, number, **more):
        own = Config(deepcopy(cfg._cfg_dict.to_dict()))
        own.update(work_dir=str(tmp_path / folder), experiment_name=f'{folder}-{number}', **more)
        return run(own, ranks)

    assert attempt('whole', 0)
    rng = random.Random(0)
    killed = 0
    while killed < kills:
        hook = dict(type='Kill', stage=rng.randint(1, 8), priority='HIGHEST')
        finished = attempt('parts', killed, resume=True,
                           custom_hooks=[*(cfg.get('custom_hooks') or []), hook])
        assert not finished, f'only killed {killed} times'
        killed += 1
    assert attempt('parts', killed, resume=True)
    found = [sorted(path.name for path in (tmp_path / folder).glob('*.pth'))
             for folder in ('whole', 'parts')]
    assert found[0] == found[1]
    assert len(found[0]) == 2
    for file in found[0]:
        whole, parts = (training_state(tmp_path / folder / file) for folder in ('whole', 'parts'))
        assert not differing(parts, whole)


def runner_with_early_stopping():
    """A runner with nothing but hooks; early stopping ends it at the third validation."""
    cfg = Config(dict(randomness=dict(seed=0), train_cfg=dict(by_epoch=False), custom_hooks=[
        dict(type='EarlyStoppingHook', monitor='mIoU', patience=2)]))
    make_reproducible(cfg)
    runner = object.__new__(Runner)
    runner._hooks, runner._val_loop = [], None
    runner._train_loop = object.__new__(EpochBasedTrainLoop)
    runner._train_loop.stop_training = False
    runner.message_hub, runner.logger = MessageHub('early_stopping'), logging.getLogger()
    runner.register_custom_hooks(cfg.custom_hooks)
    return runner


@pytest.mark.parametrize('interrupted_after', [1, 2])
def test_early_stopping_continues_where_it_was(interrupted_after):
    runner = runner_with_early_stopping()
    for validation in range(3):
        if validation == interrupted_after:
            saved = runner.message_hub.state_dict()
            runner = runner_with_early_stopping()
            runner.message_hub.load_state_dict(saved)
            runner.call_hook('before_train')
        assert not runner.train_loop.stop_training
        runner.call_hook('after_val_epoch', metrics=dict(mIoU=0.5))
    assert runner.train_loop.stop_training


@pytest.mark.parametrize('transform', [CachedMosaic, CachedMixUp])
def test_images_of_the_last_epoch_are_forgotten(transform):
    cached = transform(img_scale=(8, 8))
    cached.results_cache.append(dict(img=None))
    forget_images(SimpleNamespace(dataset=SimpleNamespace(pipeline=Compose([cached]))))
    assert cached.results_cache == []


def test_other_configs_are_not_changed(detector):
    before = detector.to_dict()
    make_reproducible(detector)
    assert detector.to_dict() == before
    detector.randomness = dict(seed=0)
    make_reproducible(detector)
    again = detector.to_dict()
    assert again != before
    make_reproducible(detector)
    assert detector.to_dict() == again


def write_checkpoints(folder, *names):
    """Write checkpoints, the last one last, and its path as MMEngine does."""
    for time, name in enumerate(names):
        torch.save(dict(weight=torch.ones(1000)), folder / name)
        os.utime(folder / name, (time, time))
    (folder / 'last_checkpoint').write_text(str(folder / names[-1]))


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


def last_checkpoint(folder):
    return (folder / 'last_checkpoint').read_text()


def test_a_truncated_checkpoint_is_skipped(tmp_path, log_text):
    write_checkpoints(tmp_path, 'epoch_9.pth', 'epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth')
    repair_last_checkpoint(str(tmp_path))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_3.pth')
    assert log_text() == ''
    truncate(tmp_path / 'epoch_3.pth')
    repair_last_checkpoint(str(tmp_path))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')
    assert log_text() == (f'Missing or damaged: {tmp_path}/epoch_3.pth; resuming from '
                          f'{tmp_path}/epoch_2.pth.')
    # Epoch 9 is of an earlier run.
    (tmp_path / 'epoch_2.pth').unlink()
    truncate(tmp_path / 'epoch_1.pth')
    with pytest.raises(CheckpointError, match=r'damaged: epoch_2.pth, epoch_1.pth\. Name another'):
        repair_last_checkpoint(str(tmp_path))


@pytest.mark.parametrize('named', ['', '/moved/since/iter_4.pth', None])
def test_last_checkpoint_is_repaired(named, tmp_path):
    write_checkpoints(tmp_path, 'iter_2.pth', 'iter_4.pth')
    if named is None:
        (tmp_path / 'last_checkpoint').unlink()
    else:
        (tmp_path / 'last_checkpoint').write_text(named)
    repair_last_checkpoint(str(tmp_path))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'iter_4.pth')


def test_a_truncated_first_checkpoint_does_not_start_from_scratch(detector, tmp_path):
    detector.update(resume=True, work_dir=str(tmp_path))
    write_checkpoints(tmp_path, 'epoch_1.pth')
    (tmp_path / 'last_checkpoint').unlink()
    truncate(tmp_path / 'epoch_1.pth')
    with pytest.raises(CheckpointError, match='delete these files to train from the start'):
        train(detector)
    assert not (tmp_path / 'last_checkpoint').exists()


def test_without_checkpoints_training_starts(tmp_path):
    repair_last_checkpoint(str(tmp_path))
    assert not any(tmp_path.iterdir())
