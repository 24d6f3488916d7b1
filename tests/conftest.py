"""Fixtures shared by all tests."""

import importlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import GOLDEN, ROOT, Golden
from helpers.tools import tool_environment
from torch._subclasses import FakeTensorMode

# Without a GPU, the Triton kernels run in Triton's interpreter. They read this when imported.
if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'


def pytest_collection_modifyitems(items):
    # Imports acmix_mm, which reads the variable above.
    from helpers.stack import skip_unavailable
    skip_unavailable(items)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def _fake_gpu(monkeypatch):
    """Tensors without data may be on a GPU of compute capability 9.0."""
    # It reads the variable above.
    from acmix_mm.ops.backend import has_triton
    if has_triton():
        # Later tests run the kernels in the interpreter, which they must be imported for.
        for operator in ('path_sum', 'path_weights', 'position_bias', 'position_encoding',
                         'rolling', 'shift_conv', 'sliding_attention', 'window_attention'):
            importlib.import_module(f'acmix_mm.ops.{operator}.triton_kernels')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_properties',
                        lambda device: SimpleNamespace(major=9, minor=0))
    with FakeTensorMode():
        try:
            torch.zeros(1).cuda()
        except RuntimeError as error:
            pytest.skip(f'torch {torch.__version__} needs a driver for fake tensors: {error}')
        yield


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """Root of a generated dataset: 8 training and 4 validation images of 96 pixels."""
    from acmix_mm.datasets.shapes import write_shapes
    root = tmp_path_factory.mktemp('data') / 'shapes'
    write_shapes(str(root), train_images=8, val_images=4, image_size=96)
    return root


@pytest.fixture(scope='session')
def run_tool():
    """Run a tool as a process; return it when it has finished, with its output as text."""
    def run(*arguments, timeout=600, **environment):
        command = [str(argument) for argument in arguments]
        if command[0].endswith('.py'):
            command.insert(0, sys.executable)
        return subprocess.run(command, cwd=ROOT, env=tool_environment(**environment),
                              timeout=timeout, text=True, capture_output=True, check=False)
    return run


@pytest.fixture
def log_text():
    """A function that returns what MMEngine's current logger has logged, as one string."""
    records = []

    class Collect(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    from mmengine.logging import MMLogger
    logger = MMLogger.get_current_instance()
    handler = Collect()
    logger.addHandler(handler)
    yield lambda: '\n'.join(records)
    logger.removeHandler(handler)


@pytest.fixture
def golden():
    if not GOLDEN.is_dir():
        pytest.skip(f'no fixtures of the published code: {GOLDEN} is absent')
    return Golden
