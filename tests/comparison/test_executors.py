"""Executors, with short commands in place of training."""

import os
import signal
import sys
import time

import psutil
import pytest
import submitit

from acmix_mm.comparison import executors
from acmix_mm.comparison.executors import (
    LocalExecutor,
    Process,
    SlurmExecutor,
    last_message,
    local_slots,
)
from acmix_mm.utils.errors import UsageError


def wait_for(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def script(code):
    return ['python', '-c', code]


def test_cpus_are_shared():
    assert local_slots(None, None, 1, available=0, threads=8) == [{}]
    assert local_slots(2, None, 1, 0, 8) == [dict(OMP_NUM_THREADS='4')] * 2
    assert local_slots(3, None, 2, 0, 4) == [dict(OMP_NUM_THREADS='1')] * 3


def test_a_run_has_gpus_of_its_own(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert local_slots(None, None, 1, available=1, threads=8) == [dict(CUDA_VISIBLE_DEVICES='0')]
    assert local_slots(None, [0, 3], 1, 4, 8) == [
        dict(CUDA_VISIBLE_DEVICES=each, OMP_NUM_THREADS='4') for each in '03']
    # Three GPUs are enough for one run with two.
    assert local_slots(None, [1, 2, 3], 2, 4, 8) == [
        dict(CUDA_VISIBLE_DEVICES='1,2', OMP_NUM_THREADS='4')]
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '5,7')
    assert [slot['CUDA_VISIBLE_DEVICES'] for slot in local_slots(None, None, 1, 2, 8)] == ['5', '7']


@pytest.mark.parametrize(('jobs', 'devices', 'processes', 'available', 'message'), [
    (2, None, 1, 1, '--jobs is for CPUs'),
    (None, [0], 1, 0, '--devices needs GPUs, but torch finds none'),
    (None, [0, 2], 1, 2, 'different numbers from 0 to 1, .* got 0 2'),
    (None, [-1], 1, 2, 'different numbers from 0 to 1, .* got -1'),
    (None, [1, 1], 1, 2, 'different numbers'),
    (None, [1], 2, 2, '--gpus-per-run 2 needs as many GPUs, but there are 1'),
])
def test_resources_are_checked(jobs, devices, processes, available, message):
    with pytest.raises(UsageError, match=message):
        local_slots(jobs, devices, processes, available, 8)


def test_a_slot_is_used_by_one_command_at_a_time(tmp_path):
    executor = LocalExecutor([dict(SLOT='a'), dict(SLOT='b')])
    assert executor.capacity == 2
    output = [tmp_path / name for name in 'xyz']
    code = 'import os, sys; print(os.environ["SLOT"], flush=True); sys.stdin.read(); '
    first = executor.start(script(code + 'raise SystemExit'), output[0])
    second = executor.start(script(code + 'import time; time.sleep(60)'), output[1])
    wait_for(lambda: first.is_done)
    assert first.failure is None
    third = executor.start(script(code + 'print("error: no"); sys.exit("end")'), output[2])
    wait_for(lambda: third.is_done)
    assert third.failure == 'no'
    assert not second.is_done
    second.interrupt()
    second.wait()
    assert second.is_done
    assert [each.read_text()[0] for each in output] == ['a', 'b', 'a']


def test_a_command_that_ignores_interrupts_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(executors, 'SHUTDOWN_TIMEOUT', 0.1)
    output = tmp_path / 'output'
    process = Process([sys.executable, '-c', 'import signal, time\nsignal.signal(signal.SIGINT, '
                       'signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(60)'], str(output), {})
    wait_for(lambda: output.read_text())
    process.interrupt()
    process.wait()
    assert process.process.returncode == -signal.SIGKILL


def test_last_message(tmp_path):
    path = tmp_path / 'output'
    path.write_text('error: old\nnew\n\n')
    assert last_message(str(path), 0) == 'old'
    assert last_message(str(path), 11) == 'new'
    assert last_message(str(path), 15) == 'no output'


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """The executor for Slurm, with submitit's local jobs."""
    monkeypatch.setattr(executors, 'CLUSTER', 'local')
    # It cancels them by SIGINT, which they would ignore if pytest runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield SlurmExecutor(str(tmp_path / 'jobs'), 0, dict(time='5'))
    signal.signal(signal.SIGINT, before)


def test_jobs_succeed_fail_and_are_cancelled(slurm, tmp_path):
    outputs = [tmp_path / name / 'output' for name in ('good', 'bad', 'long', 'lost')]
    for output in outputs:
        output.parent.mkdir()
    wait = 'import time; print("begins", flush=True); time.sleep(60)'
    good, bad, long, lost = jobs = [slurm.start(script(code), output) for code, output in zip(
        ('print(1)', 'import sys; sys.exit("error: no")', wait, wait), outputs)]
    assert good.began is None
    wait_for(lambda: good.is_done and bad.is_done)
    assert good.failure is None
    assert good.began < time.perf_counter()
    assert bad.failure == 'no'
    for output in outputs[2:]:
        wait_for(lambda output=output: output.read_text() == 'begins\n')
    trees = [psutil.Process(int(job.job.job_id)).children(recursive=True) for job in jobs[2:]]
    assert not long.is_done
    long.interrupt()
    long.wait()
    assert long.is_done
    wait_for(lambda: not any(child.is_running() for child in trees[0]))
    # As if its machine failed.
    psutil.Process(int(lost.job.job_id)).children()[0].kill()
    # How long submitit waits for a file system to show a result.
    lost.job._results_timeout_s = 0.1
    wait_for(lambda: lost.is_done)
    assert f'job {lost.job.job_id} ended without a result, in state ' in lost.failure
    wait_for(lambda: not any(child.is_running() for child in trees[1]))


def test_a_job_at_its_time_limit_starts_again(slurm, tmp_path):
    output = tmp_path / 'output'
    marker = tmp_path / 'marker'
    code = (f'import pathlib, time\nmarker = pathlib.Path({str(marker)!r})\n'
            'again = marker.exists()\nmarker.touch()\nprint("begins", flush=True)\n'
            'time.sleep(0 if again else 60)')
    job = slurm.start(script(code), str(output))
    wait_for(marker.exists)
    # The signal that Slurm sends before the limit.
    psutil.Process(int(job.job.job_id)).children()[0].send_signal(signal.SIGUSR2)
    wait_for(lambda: job.is_done)
    assert job.failure is None
    assert output.read_text().count('begins') == 2


def test_options_of_sbatch(tmp_path, monkeypatch):
    """The script that submitit passes to sbatch; a stand-in for srun makes this a cluster."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name, body in (('srun', ''), ('sbatch', 'cp "$1" sbatch.sh; echo Submitted batch job 12')):
        (folder / name).write_text(f'#!/bin/sh\n{body}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
    monkeypatch.chdir(tmp_path)
    options = {'time': '240', 'partition': 'gpu', 'cpus-per-task': '8'}
    executor = SlurmExecutor('jobs', 2, options, 3)
    assert executor.capacity == 3
    assert executor.start(['python', '-V'], 'output').job.job_id == '12'
    text = (tmp_path / 'sbatch.sh').read_text()
    for option in ('time=240', 'partition=gpu', 'cpus-per-task=8', 'gpus-per-node=2',
                   'ntasks-per-node=1', 'nodes=1'):
        assert f'#SBATCH --{option}\n' in text
    command = submitit.core.utils.DelayedSubmission.load(
        next((tmp_path / 'jobs').glob('*.pkl'))).function
    assert command.command == [sys.executable, '-V']


def test_what_slurm_needs(tmp_path, monkeypatch):
    for time_limit in ('', '0', '1:00:00'):
        with pytest.raises(UsageError, match=f'--slurm time=240; got {time_limit or "none"}'):
            SlurmExecutor(str(tmp_path), 1, dict(time=time_limit) if time_limit else {})
    monkeypatch.setenv('PATH', '')
    with pytest.raises(UsageError, match='there is no srun here'):
        SlurmExecutor(str(tmp_path), 1, dict(time='9'))
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(UsageError, match='needs submitit, which is not installed: run pip install'):
        SlurmExecutor(str(tmp_path), 1, dict(time='9'))
