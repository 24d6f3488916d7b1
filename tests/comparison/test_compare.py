"""The tool tools/compare.py."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT
from helpers.comparison import SEGMENTATION
from helpers.tools import call_tool, plain_message
from mmengine.config import Config
from mmengine.registry import MODELS

from acmix_mm.comparison import executors
from acmix_mm.comparison.executors import Process
from acmix_mm.comparison.runs import Run

OPTIONS = ['model.backbone.base_channels=8', 'model.backbone.stage_blocks=[1,1,1,1]',
           'model.decode_head.channels=16', 'model.auxiliary_head.channels=8',
           'model.decode_head.in_channels=[32,64,128,256]', 'model.auxiliary_head.in_channels=128',
           'model.data_preprocessor.size=(96,96)', 'train_dataloader.batch_size=2',
           'train_cfg.val_interval=500',
           *(f'{split}_dataloader.{name}' for split in ('train', 'val')
             for name in ('num_workers=0', 'persistent_workers=False'))]
# Enough that no run of a comparison ends before all have begun.
ITERATIONS = 20
# What an interruption must not change.
NUMBERS = ('seed', 'iterations', 'metrics', 'validations', 'loss')


def wait_for(condition, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def _interruptible():
    """SIGINT interrupts this process and submitit's, even if pytest runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when(condition):
    """Interrupt this process, like Ctrl-C, when a condition holds."""
    def wait():
        wait_for(condition)
        signal.raise_signal(signal.SIGINT)
    threading.Thread(target=wait).start()


def result_of(folder):
    return json.loads((folder / 'result.json').read_text())


@pytest.fixture(scope='module')
def comparison(shapes, tmp_path_factory):
    """A comparison that was killed in its first runs and resumed: its folder and output."""
    out = tmp_path_factory.mktemp('comparison') / 'out'
    arguments = [SEGMENTATION, '--data-root', shapes, '--work-dir', out, '--mixers', 'acmix',
                 'conv', '--match', 'none', '--seeds', 1, '--budget', f'{ITERATIONS}iters',
                 '--jobs', 2, '--price', 2, '--cfg-options', *OPTIONS]
    process = subprocess.Popen(
        [sys.executable, 'tools/compare.py', *map(str, arguments)], cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    killed = [out / mixer / 'seed_0' for mixer in ('acmix', 'conv')]
    wait_for(lambda: process.poll() is not None or all(
        any(folder.glob('iter_*.pth')) for folder in killed))
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before = [sorted(folder.glob('*.pth')) for folder in killed]
    time.sleep(1)
    assert [sorted(folder.glob('*.pth')) for folder in killed] == before, 'training outlived'
    assert not any((folder / 'result.json').exists() for folder in killed)
    # An incomplete checkpoint, from which the run must not be resumed.
    (killed[0] / f'iter_{ITERATIONS}.pth').write_bytes(before[0][-1].read_bytes()[:1000])
    unfinished = (out / 'report.md').read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        done = call_tool('compare', *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, unfinished, done.stdout


def test_resumes_where_it_was_killed(comparison, run_tool, tmp_path):
    out, unfinished, printed = comparison
    assert '**Unfinished: 2 of 2 runs are missing.**' in unfinished
    for mixer in ('acmix', 'conv'):
        output = (out / mixer / 'seed_0' / 'output.txt').read_text()
        assert re.search(r'resumed epoch: 0, iter: \d+', output)
    # A run of more than a minute also prints its iterations.
    lines = [line for line in printed.splitlines() if line.startswith('[')]
    ends = [line.split(':')[0] for line in lines if ': iteration ' not in line]
    assert [end[:5] for end in ends] == ['[1/2]', '[2/2]']
    assert {end[6:] for end in ends} == {'acmix, seed 0', 'conv, seed 0'}
    assert 'about' in printed
    # A command of the report gives the same results, by itself and uninterrupted.
    command = json.loads((out / 'report.json').read_text())['variants']['acmix']['commands'][0]
    words = command.replace('python', sys.executable, 1).split()
    words[words.index('--work-dir') + 1] = str(tmp_path)
    assert run_tool(*words).returncode == 0
    alone, resumed = result_of(tmp_path), result_of(out / 'acmix' / 'seed_0')
    for key in NUMBERS:
        assert alone[key] == resumed[key]


def test_the_report_matches_the_logs(comparison):
    out, _, _ = comparison
    text = (out / 'report.md').read_text()
    numbers = json.loads((out / 'report.json').read_text())
    for mixer in ('acmix', 'conv'):
        folder = out / mixer / 'seed_0'
        assert f'--work-dir {folder} --cfg-options randomness.seed=0' in text
        logs = sorted(folder.glob('*/vis_data/scalars.json'))
        logged = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
        miou = [entry['mIoU'] for entry in logged if 'mIoU' in entry][-1]
        assert f'| {mixer} | mIoU | {miou:.4g} |' in text
        found = numbers['variants'][mixer]
        assert found['quality']['mIoU'] == dict(mean=miou, deviation=None, values=[miou])
        assert found['peak_memory_mib']['mean'] > 0
        assert found['cost']['training']['mean'] == pytest.approx(
            2 * result_of(folder)['training_seconds'] / 3600)
        own = Config.fromfile(str(out / mixer / 'config.py'))
        model = MODELS.build(own.model)
        parameters = sum(each.numel() for name, each in model.named_parameters()
                         if not name.startswith('auxiliary_head'))
        assert f'| {mixer} | {parameters / 1e6:.3f}M |' in text
        # The stretched schedule has two validations, and every iteration is logged.
        assert [iteration for iteration, _ in found['runs'][0]['validations']] == [
            ITERATIONS // 2, ITERATIONS]
        assert len(found['runs'][0]['loss']) == ITERATIONS
    for part in ('Held constant:\n', f'the number of iterations, {ITERATIONS}',
                 'Not held constant: parameters', 'the seeds (0)', 'start from scratch', '96×96',
                 ' thread', 'torch 2', 'compare.py', '![Learning curves](curves.png)'):
        assert part in text
    assert 'Unfinished' not in text
    for name in ('curves.png', 'quality_cost.png'):
        assert (out / name).read_bytes().startswith(b'\x89PNG')


@pytest.mark.usefixtures('_interruptible')
def test_jobs_can_be_interrupted(shapes, tmp_path, monkeypatch):
    """With submitit's local jobs, one after the other; they tune, and the plan is a job, too."""
    monkeypatch.setattr(executors, 'CLUSTER', 'local')
    monkeypatch.chdir(ROOT)
    out = tmp_path / 'out'
    run = out / 'acmix' / 'tune_2e-3'
    arguments = [SEGMENTATION, '--data-root', shapes, '--work-dir', out, '--mixers', 'acmix',
                 'conv', '--match', 'none', '--budget', '6iters', '--executor', 'slurm', '--slurm',
                 'time=9', '--gpus-per-run', 0, '--jobs', 1, '--tune', 'optim_wrapper.optimizer.lr',
                 '2e-3', '1e-3', '--cfg-options', *OPTIONS]
    for moment in (run / 'iter_2.pth', run / 'result.json'):
        interrupt_when(moment.exists)
        message = plain_interruption(call_tool('compare', *arguments))
        assert f'The same command continues. Report so far: {out}/report.md' in message
    assert re.search(r'resumed epoch: 0, iter: [2-5]', (run / 'output.txt').read_text())
    text = (out / 'report.md').read_text()
    assert '**Unfinished: 6 of 6 runs are missing.**' in text
    # A finished run that was interrupted has all of its iterations.
    assert [each for each, _ in result_of(run)['loss']] == [1, 2, 3, 4, 5, 6]


def plain_interruption(done):
    """The message of an interrupted tool, after checking that there is no traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return done.stderr[done.stderr.index('Interrupted.'):]


def test_two_processes_can_be_interrupted(comparison, tmp_path):
    """A run with two processes that torchrun starts, interrupted and resumed."""
    command = Run(str(comparison[0]), 'conv', 7, processes=2).command
    position = command.index('--work-dir') + 1

    def start(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        command[position] = str(folder)
        words = [sys.executable, *command[1:], '--resume']
        return folder, Process(words, str(folder / 'output.txt'), {})

    whole, process = start('whole')
    parts, interrupted = start('parts')
    wait_for((parts / 'iter_2.pth').exists)
    interrupted.interrupt()
    interrupted.wait()
    assert interrupted.failure and not (parts / 'result.json').exists()
    _, resumed = start('parts')
    for each in (process, resumed):
        wait_for(lambda each=each: each.is_done)
        assert each.failure is None
    assert re.search(r'resumed epoch: 0, iter: \d+', (parts / 'output.txt').read_text())
    for key in NUMBERS:
        assert result_of(parts)[key] == result_of(whole)[key]
    # Each of the two processes trained on images of its own.
    assert result_of(whole)['iterations'] == ITERATIONS


@pytest.mark.parametrize(('option', 'value', 'message'), [
    ('--seeds', 0, "must be a positive integer, got '0'"),
    ('--budget', '3hours', 'must be iterations or minutes'),
    ('--price', '-1', "must be a positive number, got '-1'"),
    ('--price', 'free', "must be a positive number, got 'free'"),
    ('--slurm', 'gpu', "takes OPTION=VALUE pairs, got 'gpu'"),
])
def test_values_are_checked(option, value, message):
    done = call_tool('compare', SEGMENTATION, '--mixers', 'acmix', 'conv', f'{option}={value}')
    assert done.returncode == 2
    assert f'error: argument {option}: {message}' in done.stderr


@pytest.mark.parametrize(('options', 'message'), [
    (['--gpus-per-run', '0'], '--gpus-per-run must be a positive integer, got 0'),
    (['--slurm', 'time=3'], '--slurm is for --executor slurm'),
    (['--executor', 'slurm', '--devices', '0'], '--devices names GPUs of this machine'),
    (['--tune', 'lr', '1', '2'], '--tune names the setting lr, which the config'),
])
def test_options_that_do_not_fit_are_errors(options, message, shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    done = call_tool('compare', SEGMENTATION, '--data-root', shapes, '--work-dir', tmp_path / 'out',
                     '--mixers', 'acmix', 'conv', *options)
    assert message in plain_message(done)
    assert not (tmp_path / 'out' / 'plan.json').exists()
