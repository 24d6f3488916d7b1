"""The runs of a comparison, each a process that can be killed and resumed."""

import glob
import json
import os
import re
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Callable, NamedTuple, Optional

from acmix_mm.comparison.executors import Executor, last_message
from acmix_mm.comparison.record import RESULT
from acmix_mm.utils.errors import UsageError

# Seconds between two lines about running runs, and how many of these a line names.
PROGRESS_INTERVAL = 60.
SHOWN = 4
# Seconds between two looks at the running runs.
POLL_INTERVAL = 0.2


class Run(NamedTuple):
    """The training of one mixer with one seed.

    Attributes:
        out: folder of the comparison.
        mixer: name of the mixer.
        seed: seed of the training.
        processes: number of processes, one for each GPU.
        setting: a setting of the config to be tried, as its name and its value; None for a run
            that is compared.
    """

    out: str
    mixer: str
    seed: int
    processes: int = 1
    setting: Optional[tuple[str, str]] = None

    def __str__(self) -> str:
        if self.setting is None:
            return f'{self.mixer}, seed {self.seed}'
        name, value = self.setting
        return f'{self.mixer}, {name.rpartition(".")[2]} {value}'

    @property
    def folder(self) -> str:
        """The work directory of the run."""
        name = f'seed_{self.seed}' if self.setting is None else f'tune_{self.setting[1]}'
        return os.path.join(self.out, self.mixer, name)

    @property
    def output(self) -> str:
        """The file with all that the run prints."""
        return os.path.join(self.folder, 'output.txt')

    @property
    def command(self) -> list[str]:
        """The command that trains this run by itself, in the same working directory."""
        config = os.path.join(self.out, self.mixer, 'config.py')
        launcher, options = [], []
        if self.processes > 1:
            # --standalone chooses a free port, so that several runs fit on a machine.
            launcher = ['-m', 'torch.distributed.run', '--standalone',
                        f'--nproc_per_node={self.processes}']
            options = ['--launcher', 'pytorch']
        settings = [f'randomness.seed={self.seed}']
        if self.setting is not None:
            settings.append('='.join(self.setting))
        return ['python', *launcher, '-m', 'acmix_mm', 'train', config, '--work-dir', self.folder,
                *options, '--cfg-options', *settings]

    @property
    def result(self) -> Optional[dict[str, Any]]:
        """The contents of the run's ``result.json``; None if the run is not finished."""
        path = os.path.join(self.folder, RESULT)
        if not os.path.exists(path):
            return None
        with open(path) as file:
            return json.load(file)


def all_runs(out: str, mixers: Sequence[str], seeds: int, processes: int = 1) -> list[Run]:
    """List the runs seed by seed, so that after each seed all mixers have as many runs."""
    return [Run(out, mixer, seed, processes) for seed in range(seeds) for mixer in mixers]


class Training:
    """A run that is being trained.

    Args:
        run: the run.
        executor: where to train it.
        iterations: iterations of the run.
    """

    def __init__(self, run: Run, executor: Executor, iterations: int) -> None:
        os.makedirs(run.folder, exist_ok=True)
        self.run = run
        self.iterations = iterations
        self.done_before = self.done = logged_iteration(run.folder)
        self.job = executor.start([*run.command, '--resume'], run.output)

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - (self.job.began or time.perf_counter())

    def check(self) -> None:
        """Check that it has succeeded.

        Raises:
            UsageError: it failed; the message names its log file.
        """
        failure = self.job.failure
        if failure or self.run.result is None:
            raise UsageError(f'{self.run}, failed: {failure or last_message(self.run.output, 0)}\n'
                             f'  Full output: {self.run.output}\n'
                             '  Finished runs are kept; run the same command to continue.')


class Progress:
    """Prints which runs are finished and running, and an estimate of the remaining time.

    Args:
        runs: all runs.
        iterations: iterations of a run, by mixer.
        capacity: how many runs train at a time.
    """

    def __init__(self, runs: Sequence[Run], iterations: dict[str, int], capacity: int) -> None:
        self.total = len(runs)
        self.waiting = [run for run in runs if run.result is None]
        self.iterations = iterations
        self.capacity = capacity
        self.finished = 0
        # Measured seconds per iteration by mixer, validation and the start of the process included.
        self.pace: dict[str, float] = {}

    def report(self, run: Run, text: str) -> None:
        """Print that a run is finished."""
        self.finished += 1
        print(f'[{self.finished}/{self.total}] {run}: {text}', flush=True)

    def report_finished(self, training: Training, running: Sequence[Training]) -> None:
        """Print that a run has been trained."""
        run, seconds = training.run, training.elapsed
        # A run that was resumed near its end spends most of its time on starting.
        if training.done_before < training.iterations / 2:
            self.pace[run.mixer] = seconds / (training.iterations - training.done_before)
        self.report(run, f'{headline(run.result)}, {duration(seconds)}; {self.remaining(running)}')

    def report_running(self, running: Sequence[Training]) -> None:
        """Print how far the running runs are, in a line."""
        parts = []
        for training in running:
            training.done = logged_iteration(training.run.folder)
            if training.done > training.done_before:
                self.pace[training.run.mixer] = (
                    training.elapsed / (training.done - training.done_before))
                parts.append(f'{training.run}: iteration {training.done} of {training.iterations}')
        if parts:
            shown = parts if len(parts) <= SHOWN else [*parts[:SHOWN],
                                                       f'{len(parts) - SHOWN} more']
            print(f'[{self.finished}/{self.total}] {"; ".join([*shown, self.remaining(running)])}',
                  flush=True)

    def remaining(self, running: Sequence[Training]) -> str:
        """Estimate the remaining time."""
        left = [(run.mixer, self.iterations[run.mixer]) for run in self.waiting]
        left += [(each.run.mixer, each.iterations - each.done) for each in running]
        if left and not self.pace:
            return 'time left unknown'
        # A mixer that was not measured yet is assumed to take as long as the others on average.
        known = {mixer: self.iterations[mixer] * seconds for mixer, seconds in self.pace.items()}
        seconds = [known.get(mixer, statistics.mean(known.values() or [0.]))
                   * iterations / self.iterations[mixer] for mixer, iterations in left]
        total = max([sum(seconds) / self.capacity, *seconds], default=0.)
        return f'about {duration(total)} left'


def train_all(runs: Sequence[Run], iterations: dict[str, int], executor: Executor,
              after_each: Callable[[], None]) -> None:
    """Train the unfinished runs, and print the progress and an estimate of the remaining time.

    Args:
        runs: the runs, in the order of training.
        iterations: iterations of a run, by mixer.
        executor: where to train them; it determines how many train at a time.
        after_each: is called when a run has been trained.

    Raises:
        UsageError: a run failed; the others are interrupted. The message names its log file.
    """
    progress = Progress(runs, iterations, executor.capacity)
    for run in runs:
        if run.result is not None:
            progress.report(run, f'already finished, {headline(run.result)}')
    running: list[Training] = []
    printed = time.perf_counter()
    try:
        while progress.waiting or running:
            done = [training for training in running if training.job.is_done]
            for training in done:
                training.check()
                running.remove(training)
            while progress.waiting and len(running) < executor.capacity:
                run = progress.waiting.pop(0)
                running.append(Training(run, executor, iterations[run.mixer]))
            for training in done:
                progress.report_finished(training, running)
                after_each()
            if time.perf_counter() - printed > PROGRESS_INTERVAL:
                printed = time.perf_counter()
                progress.report_running(running)
            if not done:
                time.sleep(POLL_INTERVAL)
    finally:
        for training in running:
            training.job.interrupt()
        for training in running:
            training.job.wait()


def logged_iteration(folder: str) -> int:
    """Return the last iteration that MMEngine logged for a run, 0 if none."""
    logs = sorted(glob.glob(os.path.join(folder, '*', 'vis_data', 'scalars.json')))
    steps = []
    if logs:
        with open(logs[-1]) as file:
            steps = re.findall(r'"loss": .*"step": (\d+)}$', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0


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
