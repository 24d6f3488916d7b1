"""Executors: where the runs of a comparison train, on this machine or on a Slurm cluster.

A run is a command. An executor starts it with its output appended to a file, and returns a
:class:`Process` or a :class:`Job`, which both tell when it began, whether it is done and why it
failed, and stop it.
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, Optional, Union

from filelock import FileLock, Timeout

from acmix_mm.utils.errors import UsageError

# Seconds that an interrupted run has to stop its data loader workers before it is killed.
SHUTDOWN_TIMEOUT = 30.
# From Linux's prctl.h.
PR_SET_PDEATHSIG = 1
# The cluster in submitit's terms.
CLUSTER = 'slurm'


class Process:
    """A command that runs on this machine.

    Args:
        command: the command.
        output: file to which its output is appended.
        environment: environment variables to change.

    Attributes:
        began: when it began, in terms of ``time.perf_counter``.
    """

    def __init__(self, command: Sequence[str], output: str, environment: dict[str, str]) -> None:
        self.output = output
        self.began: Optional[float] = time.perf_counter()
        with open(output, 'a') as file:
            self.offset = file.tell()
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **environment}, preexec_fn=interrupt_with_parent)

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    @property
    def failure(self) -> Optional[str]:
        """Why it failed; None if it has succeeded. Valid when it is done."""
        return last_message(self.output, self.offset) if self.process.returncode else None

    def interrupt(self) -> None:
        """Interrupt it if it is running, without waiting for its end."""
        if not self.is_done:
            self.process.send_signal(signal.SIGINT)

    def wait(self) -> None:
        """Wait for the end of an interrupted process, and kill it if it does not stop."""
        try:
            self.process.wait(SHUTDOWN_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class LocalExecutor:
    """Runs commands on this machine.

    Args:
        slots: environment variables of each of the commands that may run at a time, such as the
            GPUs that it may use.
    """

    def __init__(self, slots: Sequence[dict[str, str]]) -> None:
        self.slots = slots
        self.processes: list[Optional[Process]] = [None] * len(slots)

    @property
    def capacity(self) -> int:
        """How many commands may run at a time."""
        return len(self.slots)

    def start(self, command: Sequence[str], output: str) -> Process:
        """Start a command in a free slot. Its first word, ``python``, becomes this Python."""
        slot = next(index for index, process in enumerate(self.processes)
                    if process is None or process.is_done)
        process = Process([sys.executable, *command[1:]], output, self.slots[slot])
        self.processes[slot] = process
        return process


class Job:
    """A job of submitit that runs a command, with the interface of :class:`Process`.

    Attributes:
        began: when the command was first seen to write output, in terms of ``time.perf_counter``;
            None while the job waits in a queue.
    """

    def __init__(self, job: Any, output: str, offset: int) -> None:
        self.job = job
        self.output = output
        self.offset = offset
        self.began: Optional[float] = None

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        if self.began is None and os.path.getsize(self.output) > self.offset:
            self.began = time.perf_counter()
        return self.job.done()

    @property
    def failure(self) -> Optional[str]:
        """Why it failed; None if it has succeeded. Valid when it is done."""
        from submitit.core.utils import FailedJobError, UncompletedJobError
        try:
            status = self.job.result()
        except (FailedJobError, UncompletedJobError):
            return (f'job {self.job.job_id} ended without a result, in state {self.job.state}; '
                    f'its messages are in {self.job.paths.stderr}')
        return last_message(self.output, self.offset) if status else None

    def interrupt(self) -> None:
        """Cancel it if it is not done, without waiting for its end."""
        if not self.is_done:
            self.job.cancel(check=False)

    def wait(self) -> None:
        """Wait until an interrupted run has stopped writing to its folder."""
        deadline = time.perf_counter() + SHUTDOWN_TIMEOUT
        while not self.is_done and time.perf_counter() < deadline:
            time.sleep(0.1)
        # A cancelled job may end before the training that it has interrupted.
        try:
            with FileLock(os.path.join(os.path.dirname(self.output), 'lock')).acquire(
                    timeout=max(deadline - time.perf_counter(), 0.)):
                pass
        except Timeout:
            pass


class JobCommand:
    """What a job of submitit calls: runs a command, and returns its exit status.

    Args:
        command: the command.
        output: file to which its output is appended.
    """

    def __init__(self, command: Sequence[str], output: str) -> None:
        self.command = command
        self.output = output

    def __call__(self) -> int:
        # The job has its environment from sbatch.
        process = Process(self.command, self.output, {})
        try:
            return process.process.wait()
        finally:
            process.interrupt()
            process.wait()

    def checkpoint(self) -> Any:
        """Return what submitit calls when the job starts again, after preemption or a time limit.

        Submitit then raises SystemExit, which stops the command.
        """
        from submitit.helpers import DelayedSubmission
        return DelayedSubmission(self)


class SlurmExecutor:
    """Runs commands as jobs of a Slurm cluster, through submitit.

    Args:
        folder: folder for the scripts and messages of the jobs, shared by all machines.
        gpus: GPUs of a job.
        options: options of ``sbatch`` by name, without the dashes. ``time``, the limit of a run in
            minutes, is required.
        capacity: how many jobs may wait or run at a time; None for all.

    Raises:
        UsageError: submitit is not installed, this is not a Slurm cluster, or an option is invalid.
    """

    def __init__(self, folder: str, gpus: int, options: dict[str, str],
                 capacity: Optional[int] = None) -> None:
        try:
            import cloudpickle
            import submitit
        except ImportError as error:
            raise UsageError('--executor slurm needs submitit, which is not installed: run pip '
                             'install submitit, or install the extra slurm of acmix-mm.') from error
        options = dict(options)
        minutes = options.pop('time', '')
        if not minutes.isdecimal() or int(minutes) == 0:
            raise UsageError('--executor slurm needs the time limit of a run in minutes, as in '
                             f'--slurm time=240; got {minutes or "none"}.')
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=CLUSTER)
        except RuntimeError as error:
            raise UsageError('--executor slurm works on a Slurm cluster only; there is no srun '
                             'here.') from error
        # Otherwise a job would import all of OpenMMLab only to start the command.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        self.executor.update_parameters(
            name='acmix-mm', timeout_min=int(minutes), tasks_per_node=1,
            gpus_per_node=gpus or None, slurm_additional_parameters=options)
        self.capacity = sys.maxsize if capacity is None else capacity

    def start(self, command: Sequence[str], output: str) -> Job:
        """Submit a command. Its first word, ``python``, becomes this Python."""
        with open(output, 'a') as file:
            offset = file.tell()
        command = JobCommand([sys.executable, *command[1:]], output)
        return Job(self.executor.submit(command), output, offset)


Executor = Union[LocalExecutor, SlurmExecutor]


def local_slots(jobs: Optional[int], devices: Optional[Sequence[int]], processes: int,
                available: int, threads: int) -> list[dict[str, str]]:
    """Divide a machine among runs; return the environment variables of each.

    Args:
        jobs: how many runs may train at a time on CPUs; None for one.
        devices: GPUs to use, as torch numbers them; None for all.
        processes: processes of a run, each with a GPU of its own if there are any.
        available: number of GPUs of this machine.
        threads: number of CPU threads to divide.

    Raises:
        UsageError: there are not that many GPUs.
    """
    if available and jobs is not None:
        raise UsageError('--jobs is for CPUs: on GPUs, as many runs train at a time as the '
                         '--devices allow.')
    if not available:
        if devices is not None:
            raise UsageError('--devices needs GPUs, but torch finds none; --jobs divides CPUs.')
        slots: list[dict[str, str]] = [{} for _ in range(jobs or 1)]
    else:
        devices = list(range(available)) if devices is None else devices
        if len(set(devices)) < len(devices) or not set(devices) <= set(range(available)):
            raise UsageError(f'--devices takes different numbers from 0 to {available - 1}, the '
                             f'GPUs that torch finds; got {" ".join(map(str, devices))}.')
        if len(devices) < processes:
            raise UsageError(f'--gpus-per-run {processes} needs as many GPUs, but there are '
                             f'{len(devices)}.')
        # torch numbers the GPUs that this variable names.
        names = os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',')
        names = names if names[0] else list(map(str, range(available)))
        slots = [{'CUDA_VISIBLE_DEVICES': ','.join(
            names[device] for device in devices[first:first + processes])}
            for first in range(0, len(devices) - processes + 1, processes)]
    share = threads // (len(slots) * processes)
    if len(slots) * processes > 1:
        for slot in slots:
            slot['OMP_NUM_THREADS'] = str(max(share, 1))
    return slots


def interrupt_with_parent() -> None:
    """Make the kernel interrupt this process when its parent ends, even if that is killed.

    An interrupted process stops its data loader workers, which would survive if it were killed.
    """
    # A shell may start background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def last_message(path: str, offset: int) -> str:
    """Return the last error message in a file after an offset, or else its last line."""
    with open(path, errors='replace') as file:
        file.seek(offset)
        lines = [line.strip() for line in file if line.strip()]
    # torchrun adds a summary to the message of a process.
    errors = [line for line in lines if re.match('(internal )?error', line)]
    return (errors or lines or ['no output'])[-1].removeprefix('error: ')
