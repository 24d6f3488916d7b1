"""RateHook logs the rates of every layer during training."""

import json

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from acmix_mm.layers import ACmixConv2d
from acmix_mm.utils.errors import UsageError


class TwoLayers(BaseModel):

    def __init__(self, mix='acmix'):
        super().__init__()
        self.backbone = nn.ModuleDict(dict(layer1=ACmixConv2d(3, 4, num_heads=1, mix=mix),
                                           layer2=ACmixConv2d(4, 4, num_heads=1, mix=mix)))

    def forward(self, inputs, mode='tensor'):
        out = self.backbone['layer2'](self.backbone['layer1'](inputs))
        return dict(loss=out.square().mean())


class RecordRates(Hook):
    """Records the rates after each iteration, independently of RateHook."""

    def __init__(self):
        self.steps = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layers = runner.model.backbone
        self.steps.append({f'rates/backbone.{name}.{rate}': getattr(layers[name], rate).item()
                           for name in layers for rate in ('rate1', 'rate2')})


def run_with_hook(work_dir, backend, mix='acmix'):
    record = RecordRates()
    runner = Runner(
        model=TwoLayers(mix), work_dir=str(work_dir), experiment_name=f'{work_dir.name}_{mix}',
        train_dataloader=dict(
            batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=[torch.randn(3, 8, 8) for _ in range(6)],
            collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.)),
        custom_hooks=[dict(type='RateHook', interval=2), record],
        visualizer=dict(type='Visualizer', name=f'{work_dir.name}_{backend}_{mix}',
                        vis_backends=[dict(type=backend)]),
        default_scope='mmengine')
    runner.model.train_step = lambda inputs, optim_wrapper: TwoLayers.train_step(
        runner.model, dict(inputs=inputs), optim_wrapper)
    runner.train()
    return record.steps


def test_hook_records_rates(tmp_path):
    steps = run_with_hook(tmp_path, 'LocalVisBackend')
    scalars, = tmp_path.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    records = [entry for entry in entries if any(key.startswith('rates/') for key in entry)]
    assert [record.pop('step') for record in records] == [2, 4, 6]
    assert len(records[0]) == 4
    for record, expected in zip(records, steps[1::2]):
        assert record == pytest.approx(expected)
    assert records[0] != records[1]


def test_hook_records_rates_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    steps = run_with_hook(tmp_path, 'TensorboardVisBackend')
    events, = tmp_path.glob('*/vis_data/events*')
    found = EventAccumulator(str(events)).Reload()
    for name in steps[0]:
        assert [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)] == [
            (step, steps[step - 1][name]) for step in (2, 4, 6)]


def test_hook_rejects_a_model_without_rates(tmp_path):
    with pytest.raises(UsageError, match='model for RateHook has no rates'):
        run_with_hook(tmp_path, 'LocalVisBackend', mix='attn')
