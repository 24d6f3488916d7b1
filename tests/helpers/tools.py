"""Options for small runs of the tools, and what they print and log."""

import contextlib
import io
import itertools
import json
import os
import runpy
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

from helpers import ROOT

RUNS = itertools.count()

DETECTION = 'configs/shapes/maskrcnn_acmix_swin.py'

SEGMENTATION = 'configs/shapes/upernet_acmix_swin.py'

FAST = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        'val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False',
        'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False',
        'default_hooks.logger.interval=1']

SMALL_IMAGES = [f'{split}_dataloader.dataset.pipeline.{index}.scale=(64,64)'
                for split, index in (('train', 2), ('val', 1), ('test', 1))]


def free_port():
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return str(found.getsockname()[1])


def tool_environment(**variables):
    """Environment variables for a tool of this checkout in a process of its own."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'PATH': path, **variables}


def as_options(settings):
    """The settings of a dict as arguments of ``--cfg-options``."""
    return [f'{key}={value}'.replace(' ', '') for key, value in settings.items()]


def own_visualizer():
    """A config option without which MMEngine reuses the visualizer of this process's last run."""
    return f'visualizer.name=visualizer_{next(RUNS)}'


def epochs(count):
    return [f'train_cfg.max_epochs={count}', f'train_cfg.val_interval={count}',
            f'param_scheduler.1.T_max={count}']


def data_roots(root):
    """What ``--data-root`` sets in a segmentation config, as config options for other tools."""
    return [f'{split}_dataloader.dataset.data_root={root}/' for split in ('train', 'val', 'test')]


def data_options(root):
    """What ``--data-root`` sets in a detection config, as config options for other tools."""
    annotations = f'{root}/annotations/instances_val2017.json'
    return [*data_roots(root), f'val_evaluator.ann_file={annotations}',
            f'test_evaluator.ann_file={annotations}']


def logged(folder, key):
    """All values of ``key`` that the last run in ``folder`` logged."""
    scalars = max(folder.glob('*/vis_data/scalars.json'))
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


def plain_message(done):
    """The only error message on stderr, after checking that there is no traceback."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    message = done.stderr[done.stderr.index('error: '):]
    assert message.count('error: ') == 1
    return message


def call_tool(tool, *arguments):
    """Run a tool in this process; return what a finished process would have."""
    command = [str(ROOT / 'tools' / f'{tool}.py'), *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch.object(sys, 'argv', command), mock.patch.dict(os.environ, LOCAL_RANK='0'):
        try:
            runpy.run_path(command[0], run_name='__main__')
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            status = traceback.format_exc()
    if isinstance(status, str):
        err.write(f'{status}\n')
        status = 1
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def logged_metric(folder, key):
    """The metric ``key`` of the last test in ``folder``."""
    metrics = json.loads(max(folder.glob('*/*.json')).read_text())
    return metrics[key]


class Bomb:
    """An object that creates the file ``path`` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)
