"""The runs of a comparison, each a process that can be killed and resumed."""

import ctypes
import glob
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple, Optional

from acmix_mm.comparison.record import RESULT
from acmix_mm.utils.errors import UsageError

# Seconds between two progress lines of a run.
PROGRESS_INTERVAL = 60.
# Seconds that an interrupted run has to stop its data loader workers before it is killed.
SHUTDOWN_TIMEOUT = 30.
# From Linux's prctl.h.
PR_SET_PDEATHSIG = 1


class Run(NamedTuple):
    """The training of one mixer with one seed.

    Attributes:
        out: folder of the comparison.
        mixer: name of the mixer.
        seed: seed of the training.
    """

    out: str
    mixer: str
    seed: int

    @property
    def folder(self) -> str:
        """The work directory of the run."""
        return os.path.join(self.out, self.mixer, f'seed_{self.seed}')

    @property
    def command(self) -> list[str]:
        """The command that trains this run by itself, in the same working directory."""
        config = os.path.join(self.out, self.mixer, 'config.py')
        return ['python', '-m', 'acmix_mm', 'train', config, '--work-dir', self.folder,
                '--cfg-options', f'randomness.seed={self.seed}']

    @property
    def result(self) -> Optional[dict[str, Any]]:
        """The contents of the run's ``result.json``; None if the run is not finished."""
        path = os.path.join(self.folder, RESULT)
        if not os.path.exists(path):
            return None
        with open(path) as file:
            return json.load(file)


def all_runs(out: str, mixers: list[str], seeds: int) -> list[Run]:
    """List the runs seed by seed, so that after each seed all mixers have as many runs."""
    return [Run(out, mixer, seed) for seed in range(seeds) for mixer in mixers]


def train_all(runs: list[Run], iterations: dict[str, int]) -> None:
    """Train the unfinished runs, and print the progress and an estimate of the remaining time.

    Args:
        runs: the runs, in the order of training.
        iterations: iterations of a run, by mixer.

    Raises:
        UsageError: a run failed; the message names its log file.
    """
    # Measured seconds per iteration by mixer, validation and the start of the process included.
    pace: dict[str, float] = {}

    def remaining(after: int, current: float = 0.) -> str:
        waiting = [run.mixer for run in runs[after:] if run.result is None]
        if waiting and not pace:
            return 'time left unknown'
        # A mixer that was not measured yet is assumed to take as long as the others on average.
        known = {mixer: iterations[mixer] * seconds for mixer, seconds in pace.items()}
        seconds = current + sum(known.get(mixer) or statistics.mean(known.values())
                                for mixer in waiting)
        return f'about {duration(seconds)} left'

    for number, run in enumerate(runs, start=1):
        name = f'[{number}/{len(runs)}] {run.mixer}, seed {run.seed}'
        if run.result is not None:
            print(f'{name}: already finished, {headline(run.result)}', flush=True)
            continue
        start = time.perf_counter()
        done_before = logged_iteration(run.folder)
        for done in train(run):
            elapsed = time.perf_counter() - start
            if done > done_before:
                pace[run.mixer] = elapsed / (done - done_before)
                current = (iterations[run.mixer] - done) * pace[run.mixer]
                print(f'{name}: iteration {done} of {iterations[run.mixer]}, '
                      f'{remaining(number, current)}', flush=True)
        elapsed = time.perf_counter() - start
        # A run that was resumed near its end spends most of its time on starting.
        if done_before < iterations[run.mixer] / 2:
            pace[run.mixer] = elapsed / (iterations[run.mixer] - done_before)
        print(f'{name}: {headline(run.result)}, {duration(elapsed)}; {remaining(number)}',
              flush=True)


def train(run: Run) -> Iterator[int]:
    """Train a run to its end, resuming from its latest checkpoint; yield the iteration at times.

    Raises:
        UsageError: the run failed.
    """
    os.makedirs(run.folder, exist_ok=True)
    command = [sys.executable, *run.command[1:], '--resume']
    output = os.path.join(run.folder, 'output.txt')
    with open(output, 'a') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, preexec_fn=interrupt_with_parent)
        try:
            while True:
                try:
                    process.wait(PROGRESS_INTERVAL)
                    break
                except subprocess.TimeoutExpired:
                    yield logged_iteration(run.folder)
        finally:
            stop(process)
    if process.returncode or run.result is None:
        raise UsageError(f'{run.mixer}, seed {run.seed}, failed: '
                         f'{last_line(output).removeprefix("error: ")}\n'
                         f'  Full output: {output}\n'
                         '  Finished runs are kept; run the same command to continue.')


def interrupt_with_parent() -> None:
    """Make the kernel interrupt this process when its parent ends, even if that is killed.

    An interrupted process stops its data loader workers, which would survive if it were killed.
    """
    # A shell may start background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def stop(process: subprocess.Popen) -> None:
    """Interrupt a process if it is running, and kill it if it does not stop."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def logged_iteration(folder: str) -> int:
    """Return the last iteration that MMEngine logged for a run, 0 if none."""
    logs = sorted(glob.glob(os.path.join(folder, '*', 'vis_data', 'scalars.json')))
    steps = []
    if logs:
        with open(logs[-1]) as file:
            steps = re.findall(r'"loss": .*"step": (\d+)}$', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def last_line(path: str) -> str:
    """Return the last line of a file that is not empty."""
    with open(path, errors='replace') as file:
        lines = file.read().split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'no output')


def quality(metrics: dict[str, float]) -> dict[str, float]:
    """Select the main metrics: mIoU, or every mAP; all metrics if there are none of these."""
    return {name: value for name, value in metrics.items()
            if re.fullmatch(r'mIoU|(.*[/_])?mAP', name)} or metrics


def headline(result: dict[str, Any]) -> str:
    """Format the main metrics of a result."""
    return ', '.join(f'{name} {value:.4g}' for name, value in quality(result['metrics']).items())


def duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
