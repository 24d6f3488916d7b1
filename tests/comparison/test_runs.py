"""Runs of a comparison, with a short script in place of training."""

import os
import signal
import threading
import time

import pytest

from acmix_mm.comparison import runs as module
from acmix_mm.comparison.executors import LocalExecutor
from acmix_mm.comparison.runs import Run, all_runs, duration, quality, train_all
from acmix_mm.utils.errors import UsageError

# Logs iterations and writes a result as training does. A run waits for the file go if there is one
# named wait, fails if its mixer has one named fail, and counts how often it has begun.
TRAINING = r"""
import json, os, sys, time
folder = sys.argv[1]
out = os.path.dirname(os.path.dirname(folder))
has = lambda name: os.path.exists(os.path.join(out, name))
with open(os.path.join(folder, 'begun'), 'a') as file:
    file.write('x')
assert sys.argv[2:] == ['--resume']
if os.path.exists(os.path.join(folder, '..', 'fail')):
    sys.exit('error: it was told to')
os.makedirs(os.path.join(folder, 'log', 'vis_data'), exist_ok=True)
with open(os.path.join(folder, 'log', 'vis_data', 'scalars.json'), 'w') as file:
    file.write('{"loss": 1.0, "step": 3}\n')
while has('wait') and not has('go'):
    time.sleep(0.01)
with open(os.path.join(folder, 'result.json'), 'w') as file:
    json.dump(dict(metrics=dict(mIoU=len(folder), aAcc=1.)), file)
"""
ITERATIONS = dict(acmix=4, conv=4)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, 'command', property(lambda run: ['python', '-c', TRAINING,
                                                              run.folder]))
    return all_runs(str(tmp_path), ['acmix', 'conv'], 2)


def begun(run):
    path = os.path.join(run.folder, 'begun')
    return len(open(path).read()) if os.path.exists(path) else 0


@pytest.fixture
def _interruptible():
    """SIGINT interrupts this process, even if pytest runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt_when(condition):
    while not condition():
        time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)


def test_quality_selects_the_main_metrics():
    assert quality({'aAcc': 1., 'mIoU': 2., 'mAcc': 3.}) == {'mIoU': 2.}
    assert quality({'coco/bbox_mAP': 1., 'coco/bbox_mAP_50': 2., 'coco/segm_mAP': 3.}) == {
        'coco/bbox_mAP': 1., 'coco/segm_mAP': 3.}
    assert quality({'panoptic/PQ': 1., 'panoptic/SQ': 2.}) == {
        'panoptic/PQ': 1., 'panoptic/SQ': 2.}
    assert quality({'pascal_voc/mAP': 1., 'pascal_voc/AP50': 2.}) == {'pascal_voc/mAP': 1.}


def test_duration():
    assert [duration(seconds) for seconds in (0, 59.6, 61, 3700)] == [
        '0:00:00', '0:01:00', '0:01:01', '1:01:40']


def test_commands():
    words = Run('out', 'conv', 3, 2, ('optim_wrapper.optimizer.lr', '1e-3')).command
    assert words == [
        'python', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
        '-m', 'acmix_mm', 'train', 'out/conv/config.py', '--work-dir', 'out/conv/tune_1e-3',
        '--launcher', 'pytorch', '--cfg-options', 'randomness.seed=3',
        'optim_wrapper.optimizer.lr=1e-3']
    assert Run('out', 'conv', 3).command == [
        'python', '-m', 'acmix_mm', 'train', 'out/conv/config.py', '--work-dir', 'out/conv/seed_3',
        '--cfg-options', 'randomness.seed=3']


def test_a_failed_run_reports_its_last_output(tmp_path):
    run = Run(str(tmp_path), 'acmix', 0)
    with pytest.raises(UsageError, match=r'acmix, seed 0, failed: \S+/config.py is neither'):
        train_all([run], dict(acmix=1), LocalExecutor([{}]), lambda: None)


def test_as_many_runs_train_at_a_time_as_there_are_slots(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, 'PROGRESS_INTERVAL', 0.1)
    (tmp_path / 'wait').touch()
    finished, most = [], 0
    report = module.Progress.report_running

    def report_and_go(progress, running):
        report(progress, running)
        if [training.done for training in running] == [3, 3, 3]:
            (tmp_path / 'go').touch()

    monkeypatch.setattr(module.Progress, 'report_running', report_and_go)

    def look():
        nonlocal most
        finished.append([run for run in runs if run.result])
        most = max(most, sum(begun(run) for run in runs) - len(finished[-1]))

    train_all(runs, ITERATIONS, LocalExecutor([{}, {}, {}]), look)
    lines = capsys.readouterr().out.splitlines()
    assert len(finished[0]) >= 1 and len(finished[-1]) == 4
    assert all(begun(run) == 1 for run in runs)
    assert most <= 3
    ends = [line for line in lines if ': iteration ' not in line]
    assert [line.partition(' ')[0] for line in ends] == ['[1/4]', '[2/4]', '[3/4]', '[4/4]']
    assert {line.partition('] ')[2].partition(':')[0] for line in ends} == {
        'acmix, seed 0', 'conv, seed 0', 'acmix, seed 1', 'conv, seed 1'}
    assert 'mIoU' in ends[0]
    assert ends[-1].endswith('about 0:00:00 left')
    running = '; '.join(f'{run}: iteration 3 of 4' for run in runs[:3])
    assert any(line.startswith(f'[0/4] {running}; about ') for line in lines)


@pytest.mark.usefixtures('_interruptible')
def test_an_interrupt_stops_all_runs_and_a_second_call_trains_the_rest(runs, tmp_path, capsys):
    executor = LocalExecutor([{}, {}])
    train_all(runs[:1], ITERATIONS, executor, lambda: None)
    (tmp_path / 'wait').touch()
    threading.Thread(target=interrupt_when, args=[lambda: begun(runs[2])]).start()
    with pytest.raises(KeyboardInterrupt):
        train_all(runs, ITERATIONS, executor, lambda: None)
    assert all(process.is_done for process in executor.processes)
    assert [begun(run) for run in runs] == [1, 1, 1, 0]
    assert [run.result is None for run in runs] == [False, True, True, True]
    (tmp_path / 'go').touch()
    capsys.readouterr()
    train_all(runs, ITERATIONS, executor, lambda: None)
    assert [begun(run) for run in runs] == [1, 2, 2, 1]
    assert '[1/4] acmix, seed 0: already finished, mIoU' in capsys.readouterr().out


def test_a_failure_stops_the_other_runs(runs, tmp_path):
    """The second run fails while the first one waits."""
    (tmp_path / 'wait').touch()
    (tmp_path / 'conv').mkdir()
    (tmp_path / 'conv' / 'fail').touch()
    executor = LocalExecutor([{}, {}])
    with pytest.raises(UsageError, match='conv, seed 0, failed: it was told to\n  Full output: '):
        train_all(runs, ITERATIONS, executor, lambda: None)
    assert all(process.is_done for process in executor.processes)
    assert [begun(run) for run in runs] == [1, 1, 0, 0]
    assert not any(run.result for run in runs)
