"""Kill training at random times, resume it, and compare it with an uninterrupted run; run by hand.

All processes of a run are killed with SIGKILL, while they start, train, save or validate. Usage:

    PYTHONPATH=.:tests python tests/engine/kill_training.py detection
    PYTHONPATH=.:tests python tests/engine/kill_training.py segmentation --processes 2
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from helpers import ROOT
from helpers.checkpoints import differing, training_state
from helpers.tools import (
    DETECTION,
    SEGMENTATION,
    epochs,
    free_port,
    logged,
    tool_environment,
)

from acmix_mm.datasets.shapes import write_shapes

# Config, options that shorten training, and the metric to print.
RUNS = {
    'detection': (DETECTION, [*epochs(8), 'train_cfg.val_interval=2'], 'coco/segm_mAP'),
    'segmentation': (SEGMENTATION, [
        'train_cfg.max_iters=200', 'train_cfg.val_interval=50', 'param_scheduler.1.end=200',
        'default_hooks.checkpoint.interval=25'], 'mIoU'),
}
COMMON = ['randomness.seed=0', 'default_hooks.logger.interval=1',
          'train_dataloader.num_workers=2', 'default_hooks.checkpoint.max_keep_ckpts=2']


class Experiment:
    """Runs of one config; ``root`` is a folder for data and work directories."""

    def __init__(self, kind, processes, root):
        self.config, self.options, self.metric = RUNS[kind]
        self.processes = processes
        self.root = Path(root)
        write_shapes(str(self.root / 'shapes'), train_images=64, val_images=12, image_size=192)

    def start(self, name):
        """Start training in the work directory ``name``."""
        command = [sys.executable, 'tools/train.py', self.config]
        if self.processes > 1:
            command = ['tools/dist_train.sh', self.config, str(self.processes)]
        command += ['--resume', '--data-root', str(self.root / 'shapes'),
                    '--work-dir', str(self.root / name), '--cfg-options', *COMMON, *self.options]
        environment = tool_environment(OMP_NUM_THREADS='1', PORT=free_port())
        with open(self.root / f'{name}.log', 'a') as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def finish(self, name):
        """Train to the end; return the seconds until the first iteration, and those after it."""
        before = logs(self.root / name)
        began = time.monotonic()
        process = self.start(name)
        while logs(self.root / name) == before and process.poll() is None:
            time.sleep(0.05)
        trained = time.monotonic()
        if process.wait():
            raise SystemExit(f'Training failed:\n{self.output(name)}')
        return trained - began, time.monotonic() - trained

    def kill_after(self, name, seconds):
        """Train for some seconds, then kill; return whether an iteration was completed.

        Raises:
            SystemExit: training ended before.
        """
        before = logs(self.root / name)
        process = self.start(name)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            parent = psutil.Process(process.pid)
            processes = [parent, *parent.children(recursive=True)]
            for each in processes:
                each.suspend()
            for each in processes:
                each.kill()
            psutil.wait_procs(processes)
            return logs(self.root / name) != before
        raise SystemExit(f'Training ended with status {process.returncode} before it was killed:\n'
                         f'{self.output(name)}')

    def output(self, name):
        """The end of what the runs of a work directory printed."""
        return (self.root / f'{name}.log').read_text()[-3000:]

    def last_checkpoint(self, name):
        return Path((self.root / name / 'last_checkpoint').read_text())


def logs(folder):
    """The log files of runs in a work directory that completed an iteration."""
    return {path for path in folder.glob('*/vis_data/scalars.json') if path.stat().st_size}


def run(kind, processes, kills, seed):
    """Print by how many entries of the last checkpoint the two runs differ, and their metrics."""
    with tempfile.TemporaryDirectory() as root:
        experiment = Experiment(kind, processes, root)
        start, training = experiment.finish('whole')
        rng = random.Random(seed)
        # On average, a run trains for an equal share of the whole.
        longest = start + 2 * training / (kills + 1)
        delays = [rng.uniform(0.5 * start, longest) for _ in range(kills)]
        trained = [experiment.kill_after('parts', delay) for delay in delays]
        experiment.finish('parts')
        whole, parts = (experiment.last_checkpoint(name) for name in ('whole', 'parts'))
        assert whole.name == parts.name, (whole, parts)
        whole_state, parts_state = training_state(whole), training_state(parts)
        unequal = differing(parts_state, whole_state)
        metrics = [logged(path.parent, experiment.metric)[-1] for path in (whole, parts)]
        resumed = (Path(root) / 'parts.log').read_text().count('resumed epoch:')
        print(json.dumps(dict(
            run=kind, processes=processes, kills=kills, while_starting=trained.count(False),
            seconds=[round(delay, 1) for delay in delays], resumed_from_checkpoint=resumed,
            entries=len(whole_state), equal=len(whole_state) - len(unequal), unequal=unequal[:10],
            metrics=metrics, start=round(start, 1), training=round(training, 1))))
        return unequal


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('kind', choices=RUNS)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--kills', type=int, default=6)
    parser.add_argument('--seed', type=int, default=0, help='of the times of the kills')
    args = parser.parse_args()
    sys.exit(bool(run(args.kind, args.processes, args.kills, args.seed)))


if __name__ == '__main__':
    main()
