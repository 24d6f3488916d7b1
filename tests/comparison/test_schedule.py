"""Stretching the schedule of a config to a budget."""

import argparse

import numpy as np
import pytest
import torch
from helpers.comparison import DETECTION, SEGMENTATION, config
from mmengine.config import ConfigDict
from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, PolyLR

from acmix_mm.comparison.schedule import Budget, read_budget, stretch
from acmix_mm.utils.errors import UsageError

WARM_UP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10)


def learning_rates(schedulers, iterations, epoch_length):
    """The learning rate in each iteration, as MMEngine's schedulers set it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
    classes = dict(LinearLR=LinearLR, CosineAnnealingLR=CosineAnnealingLR, MultiStepLR=MultiStepLR,
                 PolyLR=PolyLR)
    built = []
    for given in schedulers:
        given = dict(given)
        scheduler_class = classes[given.pop('type')]
        convert = given.pop('convert_to_iter_based', False)
        built.append(scheduler_class.build_iter_from_epoch(
            optimizer, **given, epoch_length=epoch_length)
            if convert else scheduler_class(optimizer, **given))
    found = []
    for iteration in range(1, iterations + 1):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for each in built:
            if not each.by_epoch or iteration % epoch_length == 0:
                each.step()
    return np.array(found)


@pytest.mark.parametrize('schedule', [
    [WARM_UP, dict(type='MultiStepLR', by_epoch=True, begin=0, end=25, milestones=[12, 20])],
    [WARM_UP, dict(type='CosineAnnealingLR', by_epoch=True, T_max=25, convert_to_iter_based=True)],
    [WARM_UP, dict(type='PolyLR', by_epoch=False, begin=10, end=100, power=0.9)],
])
@pytest.mark.parametrize('factor', [0.5, 3])
def test_a_stretched_schedule_has_the_same_learning_rates(schedule, factor, shapes):
    """Compare the learning rates of 25 epochs of four batches, at every tenth of the way."""
    cfg = config(DETECTION, shapes)
    cfg.train_cfg.update(max_epochs=25, val_interval=5)
    cfg.param_scheduler = schedule
    before = learning_rates(cfg.param_scheduler, 100, 4)
    stretch(cfg, int(100 * factor))
    after = learning_rates(cfg.param_scheduler, int(100 * factor), 4)
    assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=100 * factor,
                                 val_interval=20 * factor)
    assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
    assert not cfg.log_processor.by_epoch
    tenths = np.arange(4, 100, 10)
    # They may differ by a step of the shorter schedule.
    np.testing.assert_allclose(after[(tenths * factor).astype(int)], before[tenths], atol=0.12)
    assert after[-1] == pytest.approx(before[-1], abs=0.03)


def test_schedulers_without_duration_cannot_be_stretched(shapes):
    cfg = config(SEGMENTATION, shapes)
    cfg.param_scheduler = [ConfigDict(type='ExponentialLR', gamma=0.9)]
    with pytest.raises(UsageError, match='cannot stretch the scheduler ExponentialLR'):
        stretch(cfg, 10)


def test_reads_a_budget():
    assert read_budget('300iters') == Budget(300, 'iters')
    assert read_budget('1.5minutes') == Budget(1.5, 'minutes')
    for wrong in ('300', 'minutes', '1.5iters', '0iters', '3hours'):
        with pytest.raises(argparse.ArgumentTypeError,
                           match=rf'as in 300iters or 20minutes; got {wrong}'):
            read_budget(wrong)
