"""Comparing mixers: what is matched is equal, what is reported is what was logged."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    PolyLR,
)
from mmengine.registry import HOOKS, MODELS, init_default_scope

from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.comparison import plan as plans
from acmix_mm.comparison import report as reports
from acmix_mm.comparison.matching import BackboneSize, Family
from acmix_mm.comparison.plan import check_settings, config_of_run, make_plan
from acmix_mm.comparison.record import loss_curve
from acmix_mm.comparison.runs import Run, quality, sole_user, words
from acmix_mm.comparison.schedule import Budget, read_budget, stretch
from acmix_mm.comparison.timing import latencies, picture_shape
from acmix_mm.engine.config import load_config, set_data_root
from acmix_mm.engine.runner import train
from acmix_mm.utils.errors import UsageError

SEGMENTATION = 'configs/shapes/upernet_acmix_r50.py'
DETECTION = 'configs/shapes/maskrcnn_acmix_swin.py'
SHAPE = (64, 64)
# A tiny UperNet on pictures of 64 pixels, whose heads' dropout draws random numbers.
TINY = {'model.backbone.base_channels': 8, 'model.backbone.stage_blocks': [1, 1, 1, 1],
        'model.decode_head.channels': 16, 'model.auxiliary_head.channels': 8,
        'model.decode_head.in_channels': [32, 64, 128, 256],
        'model.auxiliary_head.in_channels': 128,
        'model.data_preprocessor.size': (64, 64), 'train_dataloader.batch_size': 2}
SMALL_PICTURES = {
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


def config(path, shapes=None, **options):
    """A config whose scope is the current one, as a tool has it."""
    cfg = load_config(str(ROOT / path), options)
    if shapes is not None:
        set_data_root(cfg, str(shapes))
    init_default_scope(cfg.default_scope)
    return cfg


def test_latency_is_a_ratio_of_turns():
    cfg = config(SEGMENTATION, **TINY)
    wide = Family(cfg.model, 'acmix', SHAPE).config(BackboneSize(64, (1, 1, 1, 1)))
    measured = latencies(dict(narrow=cfg.model, wide=wide), SHAPE)
    assert measured['narrow'].ratio == (1., 1., 1.)
    assert 1.2 < measured['wide'].ratio.low <= measured['wide'].ratio.median
    assert 0 < measured['narrow'].seconds.low <= measured['narrow'].seconds.high


def rates(schedulers, iterations, of_epoch):
    """The learning rate in each iteration, as MMEngine's schedulers set it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.)
    kinds = dict(LinearLR=LinearLR, CosineAnnealingLR=CosineAnnealingLR, MultiStepLR=MultiStepLR,
                 PolyLR=PolyLR)
    built = []
    for given in schedulers:
        given = dict(given)
        kind = kinds[given.pop('type')]
        convert = given.pop('convert_to_iter_based', False)
        built.append(kind.build_iter_from_epoch(optimizer, **given, epoch_length=of_epoch)
                     if convert else kind(optimizer, **given))
    found = []
    for iteration in range(1, iterations + 1):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for each in built:
            if not each.by_epoch or iteration % of_epoch == 0:
                each.step()
    return np.array(found)


WARM_UP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10)


@pytest.mark.parametrize('schedule', [
    [WARM_UP, dict(type='MultiStepLR', by_epoch=True, begin=0, end=25, milestones=[12, 20])],
    [WARM_UP, dict(type='CosineAnnealingLR', by_epoch=True, T_max=25, convert_to_iter_based=True)],
    [WARM_UP, dict(type='PolyLR', by_epoch=False, begin=10, end=100, power=0.9)],
])
@pytest.mark.parametrize('factor', [0.5, 3])
def test_a_stretched_schedule_has_the_same_rates(schedule, factor, shapes):
    """Of 25 epochs of four batches, at every tenth of the way."""
    cfg = config('configs/shapes/maskrcnn_acmix_swin.py', shapes)
    cfg.train_cfg.update(max_epochs=25, val_interval=5)
    cfg.param_scheduler = schedule
    before = rates(cfg.param_scheduler, 100, 4)
    stretch(cfg, int(100 * factor))
    after = rates(cfg.param_scheduler, int(100 * factor), 4)
    assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=100 * factor,
                                 val_interval=20 * factor)
    assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
    assert not cfg.log_processor.by_epoch
    tenths = np.arange(4, 100, 10)
    # A step of the shorter one apart.
    np.testing.assert_allclose(after[(tenths * factor).astype(int)], before[tenths], atol=0.12)
    assert after[-1] == pytest.approx(before[-1], abs=0.03)


def test_no_schedule_without_length_is_stretched(shapes):
    cfg = config(SEGMENTATION, shapes)
    cfg.param_scheduler = [ConfigDict(type='ExponentialLR', gamma=0.9)]
    with pytest.raises(UsageError, match='cannot stretch the scheduler ExponentialLR'):
        stretch(cfg, 10)


def test_reads_a_budget():
    assert read_budget('300iters') == Budget(300, 'iters')
    assert read_budget('1.5minutes') == Budget(1.5, 'minutes')
    assert read_budget(None) is None
    for wrong in ('300', 'minutes', '1.5iters', '0iters', '3hours'):
        with pytest.raises(UsageError, match=rf'as in 300iters or 20minutes; got {wrong}'):
            read_budget(wrong)


@pytest.mark.parametrize(('mixers', 'message'), [
    (['acmix', 'mlp'], 'does not know mlp; it knows conv'),
    (['acmix'], 'two or more'),
    (['acmix', 'acmix'], 'each once'),
])
def test_refuses_mixers(mixers, message, shapes):
    with pytest.raises(UsageError, match=message):
        check_settings(config(SEGMENTATION, shapes), mixers)


def test_refuses_configs_it_cannot_compare(shapes, tmp_path):
    cfg = config(SEGMENTATION, shapes)
    with pytest.raises(UsageError, match='The backbone ResNet has no mixer to exchange'):
        Family(ConfigDict(backbone=dict(type='ResNet')), 'attn', SHAPE)
    with pytest.raises(UsageError, match='has no val_evaluator'):
        check_settings(config(SEGMENTATION, shapes, val_evaluator=None), ['acmix', 'attn'])
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='resnet.pth')
    families = {name: Family(cfg.model, name, SHAPE) for name in ('acmix', 'conv')}
    sizes = dict(acmix=families['acmix'].own_size, conv=BackboneSize(12, (1, 2, 4, 1)))
    with pytest.raises(UsageError, match=r'conv is matched by base_channels 16 → 12, and '
                       r'resnet\.pth does not fit .*init_cfg=None'):
        plans.check_pretraining(cfg, families, sizes)


def test_the_picture_is_the_one_that_the_network_sees(shapes):
    """Ninety-six pixels, resized to a hundred in detection and padded to a multiple of 32."""
    assert picture_shape(config(SEGMENTATION, shapes)) == (96, 96)
    cfg = config(DETECTION, shapes, **{'val_dataloader.dataset.pipeline.1.scale': (100, 100)})
    assert picture_shape(cfg) == (128, 128)


class InterruptionError(Exception):
    pass


@HOOKS.register_module()
class Interrupt(Hook):
    """Ends a run in the middle: in an iteration, or before a validation."""

    def __init__(self, iteration=None, validation=None):
        self.iteration = iteration
        self.validation = validation

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise InterruptionError

    def before_val(self, runner):
        if runner.iter == self.validation:
            raise InterruptionError


EPOCHS = {'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 1, 'param_scheduler.1.T_max': 2,
          **{f'{split}_dataloader.dataset.pipeline.{index}.scale': (64, 64)
             for split, index in (('train', 2), ('val', 1), ('test', 1))},
          **{f'{split}_dataloader.{name}': value for split, number in (('train', 1), ('val', 0))
             for name, value in (('num_workers', number), ('persistent_workers', number > 0))},
          'model.backbone.drop_path_rate': 0.2}


@pytest.mark.parametrize(('path', 'options', 'budget', 'interruptions'), [
    (SEGMENTATION, {**TINY, **SMALL_PICTURES}, 4, [dict(iteration=2), dict(validation=4)]),
    (SEGMENTATION, {**TINY, **SMALL_PICTURES, 'train_dataloader.num_workers': 1}, 4,
     [dict(iteration=3)]),
    (DETECTION, EPOCHS, None, [dict(iteration=5), dict(validation=8)]),
], ids=['iterations', 'iterations, workers', 'epochs, workers'])
def test_an_interrupted_run_comes_out_the_same(path, options, budget, interruptions, shapes,
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


def test_a_loss_curve_keeps_the_mean():
    losses = np.arange(250, dtype=float)
    curve = loss_curve(losses)
    assert len(curve) == 100
    assert curve[-1][0] == 250
    ends = [0] + [end for end, _ in curve]
    assert np.dot(np.diff(ends), [mean for _, mean in curve]) == pytest.approx(losses.sum())
    assert loss_curve(np.array([1., np.nan])) == [[1, 1.], [2, None]]


OPTIONS = ['model.backbone.base_channels=8', 'model.decode_head.channels=16',
           'model.auxiliary_head.channels=8', 'model.decode_head.in_channels=[32,64,128,256]',
           'model.auxiliary_head.in_channels=128', 'model.data_preprocessor.size=(96,96)',
           'train_dataloader.batch_size=2', 'train_cfg.val_interval=500',
           *(f'{split}_dataloader.{name}' for split in ('train', 'val')
             for name in ('num_workers=0', 'persistent_workers=False'))]


@pytest.fixture(scope='module')
def comparison(shapes, run_tool, tmp_path_factory):
    """Folder of a comparison that was killed in its first run, and resumed."""
    out = tmp_path_factory.mktemp('comparison') / 'out'
    arguments = ['tools/compare.py', SEGMENTATION, '--data-root', shapes, '--work-dir', out,
                 '--mixers', 'acmix', 'conv', '--match', 'none', '--seeds', 2,
                 '--budget', '6iters', '--cfg-options', *OPTIONS]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, stderr=subprocess.DEVNULL)
    killed = out / 'acmix' / 'seed_0'
    while not (killed / 'iter_2.pth').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before = sorted(killed.glob('*.pth'))
    time.sleep(1)
    assert sorted(killed.glob('*.pth')) == before, 'training outlived the tool'
    assert not (killed / 'result.json').exists()
    # A checkpoint that was being written; nothing is resumed from it.
    (killed / 'iter_6.pth').write_bytes(before[-1].read_bytes()[:1000])
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, arguments, done.stdout


def test_goes_on_where_it_was_killed(comparison, run_tool, tmp_path):
    out, _, said = comparison
    output = (out / 'acmix' / 'seed_0' / 'output.txt').read_text()
    assert re.search(r'resumed epoch: 0, iter: [2-5]', output)
    assert [line.split(':')[0] for line in said.splitlines() if line.startswith('[')] == [
        '[1/4] acmix, seed 0', '[2/4] conv, seed 0', '[3/4] acmix, seed 1', '[4/4] conv, seed 1']
    assert 'about' in said
    # The command of the report trains the same, by itself and uninterrupted.
    command = json.loads((out / 'report.json').read_text())['variants']['acmix']['commands'][0]
    words_of = command.split()[1:]
    words_of[words_of.index('--work-dir') + 1] = str(tmp_path)
    assert run_tool(*words_of).returncode == 0
    alone, resumed = (json.loads((folder / 'result.json').read_text())
                      for folder in (tmp_path, out / 'acmix' / 'seed_0'))
    for key in ('seed', 'iterations', 'metrics', 'validations', 'loss'):
        assert alone[key] == resumed[key]


def test_the_report_is_complete_and_says_what_was_logged(comparison):
    out, _, _ = comparison
    text = (out / 'report.md').read_text()
    numbers = json.loads((out / 'report.json').read_text())
    values = {}
    for mixer in ('acmix', 'conv'):
        assert (out / mixer / 'config.py').is_file()
        for seed in (0, 1):
            folder = out / mixer / f'seed_{seed}'
            assert f'--work-dir {folder} --cfg-options randomness.seed={seed}' in text
            logs = sorted(folder.glob('*/vis_data/scalars.json'))
            logged = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
            values[mixer, seed] = [entry['mIoU'] for entry in logged if 'mIoU' in entry][-1]
        means = np.mean([values[mixer, 0], values[mixer, 1]])
        deviation = np.std([values[mixer, 0], values[mixer, 1]], ddof=1)
        assert f'| {mixer} | mIoU | {values[mixer, 0]:.4g} | {values[mixer, 1]:.4g} |' in text
        assert f'{means:.4g} ± {deviation:.2g} |' in text
        found = numbers['variants'][mixer]
        assert found['quality']['mIoU']['mean'] == pytest.approx(means)
        assert found['peak_memory_mib']['mean'] > 0
        own = Config.fromfile(str(out / mixer / 'config.py'))
        model = MODELS.build(own.model)
        parameters = sum(each.numel() for name, each in model.named_parameters()
                         if not name.startswith('auxiliary_head'))
        assert f'| {mixer} | {parameters / 1e6:.3f}M |' in text
        # Two validations of the config's stretched schedule, and the log of every iteration.
        assert [iteration for iteration, _ in found['runs'][0]['validations']] == [3, 6]
        assert len(found['runs'][0]['loss']) == 6
    for part in ('Held constant:\n', 'the number of iterations, 6', 'Not held constant: parameters',
                 'the seeds (0, 1)', 'start from scratch', '96×96', ' thread', 'torch 2',
                 'tools/compare.py', '![Learning curves](curves.png)'):
        assert part in text
    for name in ('curves.png', 'quality_cost.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG')


def test_refuses_seeds_below_one(run_tool):
    done = run_tool('tools/compare.py', SEGMENTATION, '--mixers', 'acmix', 'conv', '--seeds', 0)
    assert done.returncode == 1
    assert done.stderr.endswith('error: --seeds takes a number from 1 up, got 0.\n')
    assert 'Traceback' not in done.stderr


def test_keeps_a_folder_to_one_process(tmp_path):
    with sole_user(str(tmp_path)), pytest.raises(UsageError, match='is at work in'), \
            sole_user(str(tmp_path)):
        pass


def test_plots_show_what_they_were_given(comparison, monkeypatch):
    out, _, _ = comparison
    numbers = json.loads((out / 'report.json').read_text())
    figures = {}
    monkeypatch.setattr(reports, 'save', lambda figure, path: figures.update({path: figure}))
    reports.draw_curves(numbers, 'curves')
    reports.draw_quality_cost(numbers, 'costs')
    loss, miou = figures['curves'].axes
    assert (loss.get_xlabel(), loss.get_ylabel()) == ('iterations', 'training loss')
    assert miou.get_ylabel() == 'mIoU (%)'
    for line, (mixer, variant) in zip(loss.lines, numbers['variants'].items()):
        assert line.get_label() == mixer
        curves = np.array([result['loss'] for result in variant['runs']])
        np.testing.assert_allclose(line.get_xydata(), curves.mean(0))
    for line, variant in zip(miou.lines, numbers['variants'].values()):
        given = [[[iteration, metrics['mIoU']] for iteration, metrics in result['validations']]
                 for result in variant['runs']]
        np.testing.assert_allclose(line.get_xydata(), np.mean(given, 0))
    numbers['settings']['budget'] = '2 minutes'
    reports.draw_curves(numbers, 'by time')
    for panel in figures['by time'].axes:
        assert panel.get_xlabel() == 'training time (minutes)'
        for line, variant in zip(panel.lines, numbers['variants'].values()):
            assert line.get_xdata()[-1] == pytest.approx(
                variant['training_seconds']['mean'] / 60)
    panels = figures['costs'].axes
    assert [panel.get_xlabel() for panel in panels] == [
        'parameters of the model (M)', 'multiply-adds of the model (G)',
        'latency of a prediction (ms)', 'training time (minutes)']
    for index, variant in enumerate(numbers['variants'].values()):
        expected = [variant['counts']['params'] / 1e6, variant['counts']['flops'] / 1e9,
                    1000 * variant['latency']['seconds']['median'],
                    variant['training_seconds']['mean'] / 60]
        shown = [panel.containers[index].lines[0].get_xydata()[0] for panel in panels]
        np.testing.assert_allclose(shown, [(each, variant['quality']['mIoU']['mean'])
                                           for each in expected])
        (bar,) = panels[0].containers[index].lines[2][1].get_segments()
        assert np.ptp(bar[:, 1]) == pytest.approx(2 * variant['quality']['mIoU']['deviation'])


def test_equal_time_gives_the_faster_network_more_iterations(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(plans, 'iteration_seconds', lambda cfg, models: dict(acmix=0.5, conv=0.2))
    cfg = config(SEGMENTATION, shapes, **TINY)
    plan = make_plan(cfg, ['acmix', 'conv'], 'none', Budget(2, 'minutes'), str(tmp_path))
    assert [each['iterations'] for each in plan['variants'].values()] == [240, 600]
    for mixer, iterations in (('acmix', 240), ('conv', 600)):
        own = Config.fromfile(str(tmp_path / mixer / 'config.py'))
        assert own.train_cfg.max_iters == iterations
        assert own.param_scheduler[-1].end == iterations
    # What was measured is not measured again.
    monkeypatch.setattr(plans, 'iteration_seconds', lambda cfg, models: pytest.fail('measured'))
    again = make_plan(cfg, ['acmix', 'conv'], 'none', Budget(2, 'minutes'), str(tmp_path))
    assert again == json.loads(json.dumps(plan))
    with pytest.raises(UsageError, match='holds another comparison, with other match, budget; '
                       'name another folder with --work-dir'):
        make_plan(cfg, ['acmix', 'conv'], 'params', Budget(300, 'iters'), str(tmp_path))


def test_says_what_it_judges_by():
    assert quality({'aAcc': 1., 'mIoU': 2., 'mAcc': 3.}) == {'mIoU': 2.}
    assert quality({'coco/bbox_mAP': 1., 'coco/bbox_mAP_50': 2., 'coco/segm_mAP': 3.}) == {
        'coco/bbox_mAP': 1., 'coco/segm_mAP': 3.}
    assert quality({'panoptic/PQ': 1., 'panoptic/SQ': 2.}) == {
        'panoptic/PQ': 1., 'panoptic/SQ': 2.}
    assert quality({'pascal_voc/mAP': 1., 'pascal_voc/AP50': 2.}) == {'pascal_voc/mAP': 1.}
    assert [words(seconds) for seconds in (0, 59.6, 61, 3700)] == [
        '0 s', '1 min', '1 min 1 s', '1 h 1 min']


def test_a_run_that_fails_says_why(tmp_path):
    from acmix_mm.comparison.runs import train_all
    run = Run(str(tmp_path), 'acmix', 0)
    tool = tmp_path / 'train.py'
    Path(tool).write_text('import sys; print("began"); sys.exit("error: no memory")')
    with pytest.raises(UsageError, match=r'acmix, seed 0, failed: error: no memory'):
        train_all([run], dict(acmix=1), str(tool))


def test_every_mixer_has_a_style_of_its_own():
    assert list(reports.STYLES) == list(MIXERS)
    for key in ('color', 'marker'):
        assert len({style[key] for style in reports.STYLES.values()}) == len(MIXERS)
