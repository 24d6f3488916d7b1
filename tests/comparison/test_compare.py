"""The tool tools/compare.py and its report."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT
from helpers.comparison import SEGMENTATION
from mmengine.config import Config
from mmengine.registry import MODELS

from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.comparison import report

OPTIONS = ['model.backbone.base_channels=8', 'model.decode_head.channels=16',
           'model.auxiliary_head.channels=8', 'model.decode_head.in_channels=[32,64,128,256]',
           'model.auxiliary_head.in_channels=128', 'model.data_preprocessor.size=(96,96)',
           'train_dataloader.batch_size=2', 'train_cfg.val_interval=500',
           *(f'{split}_dataloader.{name}' for split in ('train', 'val')
             for name in ('num_workers=0', 'persistent_workers=False'))]


@pytest.fixture(scope='module')
def comparison(shapes, run_tool, tmp_path_factory):
    """A comparison that was killed in its first run and resumed: its folder, command, output."""
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
    # An incomplete checkpoint, from which the run must not be resumed.
    (killed / 'iter_6.pth').write_bytes(before[-1].read_bytes()[:1000])
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, arguments, done.stdout


def test_resumes_where_it_was_killed(comparison, run_tool, tmp_path):
    out, _, printed = comparison
    output = (out / 'acmix' / 'seed_0' / 'output.txt').read_text()
    assert re.search(r'resumed epoch: 0, iter: [2-5]', output)
    # A run of more than a minute also prints its iterations.
    lines = [line for line in printed.splitlines() if line.startswith('[')]
    assert [line.split(':')[0] for line in lines if ': iteration ' not in line] == [
        '[1/4] acmix, seed 0', '[2/4] conv, seed 0', '[3/4] acmix, seed 1', '[4/4] conv, seed 1']
    assert 'about' in printed
    # A command of the report gives the same results, by itself and uninterrupted.
    command = json.loads((out / 'report.json').read_text())['variants']['acmix']['commands'][0]
    words = command.replace('python', sys.executable, 1).split()
    words[words.index('--work-dir') + 1] = str(tmp_path)
    assert run_tool(*words).returncode == 0
    alone, resumed = (json.loads((folder / 'result.json').read_text())
                      for folder in (tmp_path, out / 'acmix' / 'seed_0'))
    for key in ('seed', 'iterations', 'metrics', 'validations', 'loss'):
        assert alone[key] == resumed[key]


def test_the_report_matches_the_logs(comparison):
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
        # The stretched schedule has two validations, and every iteration is logged.
        assert [iteration for iteration, _ in found['runs'][0]['validations']] == [3, 6]
        assert len(found['runs'][0]['loss']) == 6
    for part in ('Held constant:\n', 'the number of iterations, 6', 'Not held constant: parameters',
                 'the seeds (0, 1)', 'start from scratch', '96×96', ' thread', 'torch 2',
                 'tools/compare.py', '![Learning curves](curves.png)'):
        assert part in text
    for name in ('curves.png', 'quality_cost.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG')


def test_seeds_and_budget_are_checked(run_tool):
    for option, value, message in (('--seeds', 0, "must be a positive integer, got '0'"),
                                   ('--budget', '3hours', 'must be iterations or minutes')):
        done = run_tool('tools/compare.py', SEGMENTATION, '--mixers', 'acmix', 'conv',
                        option, value)
        assert done.returncode == 2
        assert f'error: argument {option}: {message}' in done.stderr
        assert 'Traceback' not in done.stderr


def test_figures_show_the_results(comparison, monkeypatch):
    out, _, _ = comparison
    numbers = json.loads((out / 'report.json').read_text())
    figures = {}
    monkeypatch.setattr(report, 'save', lambda figure, path: figures.update({path: figure}))
    report.draw_curves(numbers, 'curves')
    report.draw_quality_cost(numbers, 'costs')
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
    report.draw_curves(numbers, 'by time')
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


def test_every_mixer_has_a_style_of_its_own():
    assert list(report.STYLES) == list(MIXERS)
    for key in ('color', 'marker'):
        assert len({style[key] for style in report.STYLES.values()}) == len(MIXERS)
