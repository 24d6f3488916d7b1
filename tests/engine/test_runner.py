"""The runner of the tools."""

import pytest
import torch
from helpers.checkpoints import SWIN
from helpers.tools import Bomb
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import FlexibleRunner
from torch import nn

from acmix_mm.engine.runner import (
    DataOnlyFlexibleRunner,
    DataOnlyRunner,
    build_runner,
    runner_class,
)
from acmix_mm.utils.errors import CheckpointError, UsageError

ACMIX = dict(type='ACmix', num_heads=2)
INVOLUTION = dict(type='Involution', group_channels=4)
NECK = dict(type='CSPNeXtPAFPN', in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1)
BACKBONE = dict(SWIN, type='ACmixSwinTransformer')


@pytest.mark.parametrize(('model', 'expected'), [
    (dict(NECK, conv_cfg=ACMIX), '5 ACmixConv2d; convolutions left unchanged: 18 1×1, 4 grouped'),
    (dict(type='ResNeXt', depth=50, base_channels=8, groups=2, conv_cfg=ACMIX),
     '1 ACmixConv2d; convolutions left unchanged: 36 1×1, 16 grouped'),
    (dict(type='CSPNeXt', deepen_factor=0.33, widen_factor=0.125, conv_cfg=ACMIX),
     '4 ACmixConv2d; convolutions left unchanged: 20 1×1, 6 grouped'),
    (dict(type='RetinaHead', num_classes=3, in_channels=8, feat_channels=8, conv_cfg=INVOLUTION),
     '8 Involution2d; convolutions left unchanged: none'),
    (dict(BACKBONE, mixer=INVOLUTION), '4 Involution2d; convolutions left unchanged: none'),
    (NECK, None),
    (BACKBONE, None),
], ids=lambda value: value['type'] if isinstance(value, dict) else None)
def test_build_model_logs_its_convolution_layers(model, expected, log_text):
    init_default_scope('mmdet')
    runner = DataOnlyRunner.__new__(DataOnlyRunner)
    runner._distributed = False
    assert isinstance(runner.build_model(model), nn.Module)
    lines = [line for line in log_text().splitlines() if 'onvolution' in line]
    assert lines == ([f'Convolution layers built: {expected}.'] if expected else [])


def flexible_config(work_dir, **changes):
    """Config of a small backbone for MMEngine's FlexibleRunner, on one device."""
    return Config(dict(
        runner_type='FlexibleRunner', model=dict(BACKBONE, **changes), work_dir=str(work_dir),
        experiment_name=work_dir.name, launcher='none', env_cfg=dict(), default_scope='mmdet'))


@pytest.fixture
def flexible_runner(tmp_path):
    runner = build_runner(flexible_config(tmp_path), ())
    runner.strategy.prepare(runner.model)
    return runner


def test_flexible_runner_loads_checkpoints_as_data(flexible_runner, tmp_path, monkeypatch):
    # Users of MMEngine set this as a workaround for torch 2.6; it must have no effect here.
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    weights = flexible_runner.model.state_dict()
    torch.save(dict(state_dict=weights, meta=dict(trap=Bomb(tmp_path / 'ran'))),
               tmp_path / 'bomb.pth')
    for load in (flexible_runner.load_checkpoint, flexible_runner.resume):
        with pytest.raises(CheckpointError, match='nothing in it was run'):
            load(str(tmp_path / 'bomb.pth'))
    assert not (tmp_path / 'ran').exists()


def test_flexible_runner_checks_the_weights(flexible_runner, tmp_path):
    weights = {key: torch.rand_like(value) if value.is_floating_point() else value
               for key, value in flexible_runner.model.state_dict().items()}
    name = next(iter(weights))
    path = str(tmp_path / 'weights.pth')
    for found, all_required, message in [
            (weights, True, None), ({name: weights[name]}, False, None),
            ({name: weights[name]}, True, f'{path} does not match'),
            ({name: torch.zeros(1)}, False, f'{path} does not match')]:
        torch.save(dict(state_dict=found), path)
        flexible_runner.requires_all_weights = all_required
        if message is None:
            flexible_runner.load_checkpoint(path)
            assert torch.equal(flexible_runner.model.state_dict()[name], weights[name])
        else:
            with pytest.raises(CheckpointError, match=message):
                flexible_runner.load_checkpoint(path)


def test_flexible_runner_explains_only_errors_of_reading(flexible_runner, tmp_path):
    """A checkpoint that was read is not called damaged when something else fails."""
    path = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=flexible_runner.model.state_dict()), path)
    with pytest.raises(CheckpointError, match=r'cannot be resumed .* it lacks .*optimizer'):
        flexible_runner.resume(path)


def test_runner_type_names_the_runner(tmp_path):
    class OwnRunner(FlexibleRunner):
        pass

    assert runner_class(Config(dict(runner_type=OwnRunner))) is OwnRunner
    assert runner_class(Config(dict(runner_type='FlexibleRunner'))) is DataOnlyFlexibleRunner
    with pytest.raises(UsageError, match="'FlexibleRuner' that the config names"):
        runner_class(Config(dict(runner_type='FlexibleRuner')))
    with pytest.raises(UsageError, match='windowsize'):
        build_runner(flexible_config(tmp_path, windowsize=7), ())
