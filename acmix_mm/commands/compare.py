"""Compare token mixers (convolution, attention or both) in one network, at equal cost.

The first of the mixers is the reference. For each of the others the width of the backbone in CONFIG
and, if that is too coarse, its depth are changed until the model costs as much as the reference.
All models are trained with the same recipe and seeds, on all GPUs of this machine or on a Slurm
cluster. The work directory then contains report.md with its figures, and every config and command.
If the comparison is interrupted, the report has what is finished, and the same command resumes it.

Example: %(prog)s shapes/upernet_acmix_r50 --mixers acmix conv7 attn
         --match params --seeds 3 --budget 300iters
"""

import argparse
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.commands import positive_int
from acmix_mm.comparison.executors import Executor, LocalExecutor, SlurmExecutor, local_slots
from acmix_mm.comparison.plan import PLAN, QUANTITIES, check_settings, make_plan, record_tuning
from acmix_mm.comparison.report import write_report
from acmix_mm.comparison.runs import POLL_INTERVAL, all_runs, train_all
from acmix_mm.comparison.schedule import read_budget
from acmix_mm.comparison.tuning import best_values, check_tuning, tuning_runs
from acmix_mm.engine.cli import add_config_arguments, config_from
from acmix_mm.engine.outputs import exclusive_folder
from acmix_mm.utils.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument('config', help='config of a detector or segmentor with an ACmix backbone')
    add_config_arguments(parser, 'work_dirs/compare/CONFIG_NAME')
    parser.add_argument('--mixers', nargs='+', required=True, metavar='MIXER',
                        help=f'two or more of {", ".join(MIXERS)}; the first keeps its size')
    parser.add_argument('--match', choices=QUANTITIES, default='params',
                        help='the quantity in which the models match (default: params)')
    parser.add_argument('--seeds', type=positive_int, default=3, metavar='N',
                        help='number of runs of each mixer (default: 3); it can be raised later')
    parser.add_argument('--budget', type=read_budget, metavar='LENGTH',
                        help='stretch the schedule to equal iterations, as in 300iters, or equal '
                        "training time, as in 20minutes (default: the config's own schedule)")
    parser.add_argument('--tune', nargs='+', metavar=('KEY', 'VALUE'),
                        help='tune a setting of the config for each mixer beforehand, with a run '
                        'for each value, e.g. optim_wrapper.optimizer.lr 3e-4 1e-3 3e-3')
    parser.add_argument('--price', type=positive_float, metavar='PRICE',
                        help='price of an hour of a device, to report the cost of training and of '
                        'a million images')
    parser.add_argument('--executor', choices=['local', 'slurm'], default='local',
                        help='train on this machine or, with submitit, as jobs of a Slurm cluster '
                        '(default: local)')
    parser.add_argument('--devices', nargs='+', type=int, metavar='GPU',
                        help='GPUs of this machine to use, each for a run (default: all)')
    parser.add_argument('--jobs', type=positive_int, metavar='N',
                        help='number of runs at a time: on CPUs, which they share (default: 1), or '
                        'in the queue of the cluster (default: all)')
    parser.add_argument('--gpus-per-run', type=int, default=1, metavar='N',
                        help='train each run on N GPUs, with a process for each (default: 1); 0 '
                        'for a cluster without GPUs')
    parser.add_argument('--slurm', nargs='+', type=sbatch_option, default=[],
                        metavar='OPTION=VALUE',
                        help='options of sbatch for each job, e.g. partition=gpu time=240; the '
                        'time, in minutes, is required')
    parser.add_argument('--plan', action='store_true',
                        help='match and measure the networks and write their configs, but train '
                        'nothing')


def positive_float(text: str) -> float:
    """Convert an argument to a positive number, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.
    if not 0 < value < float('inf'):
        raise argparse.ArgumentTypeError(f'must be a positive number, got {text!r}')
    return value


def sbatch_option(text: str) -> tuple[str, str]:
    """Split an argument into the name and the value of an option, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it has no ``=``.
    """
    name, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'takes OPTION=VALUE pairs, got {text!r}')
    return name.lstrip('-'), value


def run(args: argparse.Namespace) -> None:
    """Run this command."""
    cfg = config_from(args)
    out = args.work_dir or os.path.join('work_dirs', 'compare', Path(cfg.filename).stem)

    check_settings(cfg, args.mixers)
    check_tuning(cfg, args.tune)
    executor = executor_from(args, out)
    if isinstance(executor, SlurmExecutor) and not os.path.exists(os.path.join(out, PLAN)):
        plan_in_job(executor, args.command_line, out)
    with exclusive_folder(out):
        plan = make_plan(cfg, args.mixers, args.match, args.budget, out,
                         max(args.gpus_per_run, 1), args.tune)
        for mixer, variant in plan['variants'].items():
            print(f'{mixer}: changes {variant["change"]}; '
                  f'{variant["counts"]["params"] / 1e6:.3f}M parameters, '
                  f'{variant["counts"]["flops"] / 1e9:.3f}G multiply-adds, '
                  f'{variant["iterations"]} iterations')
        if not args.plan:
            print(f'Report: {train_and_report(args, cfg, plan, executor, out)}')


def train_and_report(args: argparse.Namespace, cfg: Config, plan: dict[str, Any],
                     executor: Executor, out: str) -> str:
    """Train all runs of a plan, write the report after each, and return its path."""
    processes = plan['settings']['gpus_per_run']
    runs = all_runs(out, args.mixers, args.seeds, processes)
    tuning = tuning_runs(out, args.mixers, args.tune, processes) if args.tune else []
    iterations = {mixer: each['iterations'] for mixer, each in plan['variants'].items()}

    def report() -> str:
        return write_report(plan, runs, tuning, args.command_line, args.price)

    path = report()
    try:
        if tuning:
            print(f'Tuning {args.tune[0]} …', flush=True)
            train_all(tuning, iterations, executor, report)
            record_tuning(cfg, plan, best_values(tuning), out)
        train_all(runs, iterations, executor, report)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f'The same command continues. Report so far: {path}') from None
    return path


def executor_from(args: argparse.Namespace, out: str) -> Executor:
    """Return the executor that the arguments describe.

    Raises:
        UsageError: the arguments contradict each other, or do not fit this machine.
    """
    if args.gpus_per_run < 0 or (args.gpus_per_run == 0 and args.executor == 'local'):
        raise UsageError(f'--gpus-per-run must be a positive integer, got {args.gpus_per_run}.')
    if args.executor == 'slurm' and args.devices is not None:
        raise UsageError('--devices names GPUs of this machine; --executor slurm takes those that '
                         'Slurm assigns.')
    if args.executor == 'local' and args.slurm:
        raise UsageError('--slurm is for --executor slurm.')
    on_cluster = args.executor == 'slurm'
    # The plan itself is made where this command runs, which may be a job.
    if on_cluster and not args.plan:
        return SlurmExecutor(os.path.join(out, 'jobs'), args.gpus_per_run,
                             dict(args.slurm), args.jobs)
    slots = local_slots(None if on_cluster else args.jobs, args.devices, max(args.gpus_per_run, 1),
                        torch.cuda.device_count(), torch.get_num_threads())
    # Networks are measured here, with the resources of a run.
    if args.devices:
        torch.cuda.set_device(args.devices[0])
    if 'OMP_NUM_THREADS' in slots[0]:
        torch.set_num_threads(int(slots[0]['OMP_NUM_THREADS']))
    return LocalExecutor(slots)


def plan_in_job(executor: SlurmExecutor, command_line: str, out: str) -> None:
    """Plan the comparison in a job, since networks are measured where they are trained.

    Raises:
        UsageError: the job failed.
    """
    output = os.path.join(out, 'jobs', 'plan.txt')
    os.makedirs(os.path.dirname(output), exist_ok=True)
    print(f'Planning in a job; its output: {output}', flush=True)
    job = executor.start([*shlex.split(command_line), '--plan'], output)
    try:
        while not job.is_done:
            time.sleep(POLL_INTERVAL)
        if job.failure:
            raise UsageError(f'The plan failed: {job.failure}\n  Full output: {output}')
    finally:
        job.interrupt()
