"""Recording of runs, and their reproducibility."""

import json
from copy import deepcopy

import numpy as np
import pytest
from helpers.comparison import DETECTION, SEGMENTATION, TINY, config
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from acmix_mm.comparison.plan import config_of_run
from acmix_mm.comparison.record import loss_curve
from acmix_mm.engine.runner import train

SMALL_IMAGES = {
    'train_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='Resize', scale=(64, 64)), dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs')],
    **{f'{split}_dataloader.dataset.pipeline': [
        dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
        dict(type='LoadAnnotations', reduce_zero_label=True), dict(type='PackSegInputs')]
       for split in ('val', 'test')},
    **{f'{split}_dataloader.{name}': value for split in ('train', 'val') for name, value in (
        ('num_workers', 0), ('persistent_workers', False))}}
EPOCHS = {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 1, 'param_scheduler.1.T_max': 2,
          **{f'{split}_dataloader.dataset.pipeline.{index}.scale': (64, 64)
             for split, index in (('train', 2), ('val', 1), ('test', 1))},
          **{f'{split}_dataloader.{name}': value for split, number in (('train', 1), ('val', 0))
             for name, value in (('num_workers', number), ('persistent_workers', number > 0))},
          'model.backbone.drop_path_rate': 0.2}


class InterruptionError(Exception):
    pass


@HOOKS.register_module()
class Interrupt(Hook):
    """Interrupts a run before an iteration, or before a validation."""

    def __init__(self, iteration=None, validation=None):
        self.iteration = iteration
        self.validation = validation

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise InterruptionError

    def before_val(self, runner):
        if runner.iter == self.validation:
            raise InterruptionError


@pytest.mark.parametrize(('path', 'options', 'budget', 'interruptions'), [
    (SEGMENTATION, {**TINY, **SMALL_IMAGES}, 4, [dict(iteration=2), dict(validation=4)]),
    (DETECTION, EPOCHS, None, [dict(validation=8)]),
], ids=['iterations', 'epochs, workers'])
def test_an_interrupted_run_gives_the_same_results(path, options, budget, interruptions, shapes,
                                                    tmp_path):
    cfg = config(path, shapes, **options)
    cfg = config_of_run(cfg, cfg.model, budget)
    cfg.randomness = dict(seed=1)

    def run(folder, **more):
        own = Config(deepcopy(cfg._cfg_dict.to_dict()))
        own.update(work_dir=str(tmp_path / folder), launcher='none', **more)
        train(own)
        return json.loads((tmp_path / folder / 'result.json').read_text())

    whole = run('whole', experiment_name=f'{tmp_path.name}-whole')
    for number, interruption in enumerate(interruptions):
        hooks = [*cfg.custom_hooks, dict(type='Interrupt', **interruption)]
        with pytest.raises(InterruptionError):
            run('parts', custom_hooks=hooks, resume=number > 0,
                experiment_name=f'{tmp_path.name}-{number}')
        assert not (tmp_path / 'parts' / 'result.json').exists()
    parts = run('parts', resume=True, experiment_name=f'{tmp_path.name}-last')
    for key in ('seed', 'iterations', 'metrics', 'validations', 'loss'):
        assert parts[key] == whole[key]
    assert whole['training_seconds'] > 0
    assert whole['peak_memory_mib'] > 0


def test_loss_curve_preserves_the_mean():
    losses = np.arange(250, dtype=float)
    curve = loss_curve(losses)
    assert len(curve) == 100
    assert curve[-1][0] == 250
    ends = [0] + [end for end, _ in curve]
    assert np.dot(np.diff(ends), [mean for _, mean in curve]) == pytest.approx(losses.sum())
    assert loss_curve(np.array([1., np.nan])) == [[1, 1.], [2, None]]
