"""The runs of a comparison, each a process of its own that can be killed and goes on later."""

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

from acmix_mm.comparison.record import RESULT
from acmix_mm.utils.errors import UsageError

# Seconds between two lines about a run that goes on.
PROGRESS_INTERVAL = 60.
# Seconds that an interrupted run has to end its workers.
PATIENCE = 30.
PR_SET_PDEATHSIG = 1


class Run(NamedTuple):
    """One mixer and seed; everything of it is below ``folder``."""

    out: str
    mixer: str
    seed: int

    @property
    def folder(self) -> str:
        return os.path.join(self.out, self.mixer, f'seed_{self.seed}')

    @property
    def command(self) -> list[str]:
        """What trains it alone, from the repository's root."""
        return ['python', 'tools/train.py', os.path.join(self.out, self.mixer, 'config.py'),
                '--work-dir', self.folder, '--cfg-options', f'randomness.seed={self.seed}']

    @property
    def result(self) -> Optional[dict[str, Any]]:
        """What it wrote when it ended; None before."""
        path = os.path.join(self.folder, RESULT)
        if not os.path.exists(path):
            return None
        with open(path) as file:
            return json.load(file)


@contextlib.contextmanager
def sole_user(out: str) -> Iterator[None]:
    """Keep a folder to this process.

    Raises:
        UsageError: another process has it.
    """
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, 'lock'), 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f'Another comparison is at work in {out}; wait for it, or name '
                             'another folder with --work-dir.') from error
        yield


def all_runs(out: str, mixers: list[str], seeds: int) -> list[Run]:
    """Seed by seed, so that an unfinished comparison is a fair one of fewer seeds."""
    return [Run(out, mixer, seed) for seed in range(seeds) for mixer in mixers]


def train_all(runs: list[Run], iterations: dict[str, int], train_tool: str) -> None:
    """Train what is not finished, with a line for each that is, and what time is left.

    Args:
        runs: in the order to train them in.
        iterations: of each mixer.
        train_tool: path of ``tools/train.py``.

    Raises:
        UsageError: a run failed; what it said is named.
    """
    # Seconds of one iteration, validation and start included, of what was trained here.
    pace: dict[str, float] = {}

    def left(after: int, of_current: float = 0.) -> str:
        waiting = [run.mixer for run in runs[after:] if run.result is None]
        if waiting and not pace:
            return 'time left unknown'
        # With equal iterations or equal time, what was not trained yet takes as long as the others.
        known = {mixer: iterations[mixer] * seconds for mixer, seconds in pace.items()}
        seconds = of_current + sum(known.get(mixer) or statistics.mean(known.values())
                                   for mixer in waiting)
        return f'about {words(seconds)} left'

    for number, run in enumerate(runs, start=1):
        name = f'[{number}/{len(runs)}] {run.mixer}, seed {run.seed}'
        if run.result is not None:
            print(f'{name}: already there, {headline(run.result)}', flush=True)
            continue
        start = time.perf_counter()
        done_before = logged_iteration(run.folder)
        for done in train(run, train_tool):
            passed = time.perf_counter() - start
            if done > done_before:
                pace[run.mixer] = passed / (done - done_before)
                rest = (iterations[run.mixer] - done) * pace[run.mixer]
                print(f'{name}: iteration {done} of {iterations[run.mixer]}, '
                      f'{left(number, rest)}', flush=True)
        passed = time.perf_counter() - start
        # What was nearly done before says little: most of its time is its start.
        if done_before < iterations[run.mixer] / 2:
            pace[run.mixer] = passed / (iterations[run.mixer] - done_before)
        print(f'{name}: {headline(run.result)}, {words(passed)}; {left(number)}', flush=True)


def train(run: Run, train_tool: str) -> Iterator[int]:
    """Train to the end, from the last checkpoint that is whole; yield iterations now and then.

    Raises:
        UsageError: it failed.
    """
    os.makedirs(run.folder, exist_ok=True)
    checkpoint = last_checkpoint(run.folder)
    command = [sys.executable, train_tool, *run.command[2:]]
    if checkpoint is not None:
        command += ['--resume', checkpoint]
    output = os.path.join(run.folder, 'output.txt')
    with open(output, 'a') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
        try:
            while True:
                try:
                    process.wait(PROGRESS_INTERVAL)
                    break
                except subprocess.TimeoutExpired:
                    yield logged_iteration(run.folder)
        finally:
            end(process)
    if process.returncode or run.result is None:
        raise UsageError(f'{run.mixer}, seed {run.seed}, failed: {last_line(output)}\n'
                         f'  All that it said: {output}\n'
                         '  What is finished stays; the same command goes on from here.')


def die_with_parent() -> None:
    """Have the kernel interrupt this process when the one that started it ends, killed or not.

    Interrupted, and not killed, it ends the workers of its data loaders, which would stay.
    """
    # A shell may have told what it runs in the background to ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def end(process: subprocess.Popen) -> None:
    """Interrupt a process that has not ended, and kill it if that does not help."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_checkpoint(folder: str) -> Optional[str]:
    """The newest checkpoint that was written to its end."""
    numbered = {int(found[1]): os.path.join(folder, name) for name in os.listdir(folder)
                if (found := re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', name))}
    whole = [number for number, path in numbered.items() if zipfile.is_zipfile(path)]
    return numbered[max(whole)] if whole else None


def logged_iteration(folder: str) -> int:
    """The last iteration that MMEngine logged below a folder, 0 if none."""
    logs = sorted(glob.glob(os.path.join(folder, '*', 'vis_data', 'scalars.json')))
    steps = []
    if logs:
        with open(logs[-1]) as file:
            steps = re.findall(r'"loss": .*"step": (\d+)}$', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


def last_line(path: str) -> str:
    with open(path, errors='replace') as file:
        lines = file.read().split('\n')
    return next((line.strip() for line in reversed(lines) if line.strip()), 'it said nothing')


def quality(metrics: dict[str, float]) -> dict[str, float]:
    """Of all metrics those that a network is judged by: mIoU, or every mAP; else all."""
    return {name: value for name, value in metrics.items()
            if re.fullmatch(r'mIoU|(.*[/_])?mAP', name)} or metrics


def headline(result: dict[str, Any]) -> str:
    return ', '.join(f'{name} {value:.4g}' for name, value in quality(result['metrics']).items())


def words(seconds: float) -> str:
    """A length of time for people."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, 'h'), (minutes, 'min'), (seconds if not hours else 0, 's'))
    return ' '.join(f'{number} {unit}' for number, unit in parts if number) or '0 s'
