"""Explaining why an object cannot be built from its config."""

import contextlib
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import mmcv.cnn.bricks
from mmengine.config import Config
from mmengine.registry import build_functions
from mmengine.runner import runner
from torch.cuda import OutOfMemoryError

from acmix_mm.utils.errors import UsageError

PACKAGE = Path(__file__).parents[1]
# Code that builds objects from configs: MMEngine's registries, mmcv's layers (functions named
# build_…), and methods of MMEngine's runner, with the part of the config that they build.
BUILD_FUNCTIONS = Path(build_functions.__file__)
BRICKS = Path(mmcv.cnn.bricks.__file__).parent
RUNNER = Path(runner.__file__)
RUNNER_METHODS = {
    '__init__': 'run', 'build_dataloader': 'data loader', 'build_evaluator': 'evaluator',
    'build_optim_wrapper': 'optim_wrapper', '_build_param_scheduler': 'param_scheduler',
    'build_train_loop': 'train_cfg', 'build_val_loop': 'val_cfg', 'build_test_loop': 'test_cfg',
    'register_default_hooks': 'default_hooks', 'register_custom_hooks': 'custom_hooks',
    'build_visualizer': 'visualizer', 'build_log_processor': 'log_processor',
    'set_randomness': 'randomness', 'scale_lr': 'auto_scale_lr'}
# What constructors of other packages raise for invalid arguments.
INVALID_ARGUMENTS = (
    AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def construction_errors_as_usage_errors() -> Iterator[None]:
    """Turn errors of constructors that get their arguments from a config into UsageError.

    This package checks arguments with ValueError; everything else that it raises is a bug. Bugs and
    errors that are raised while nothing is being built pass unchanged.

    Raises:
        UsageError: an object cannot be built from its config.
    """
    try:
        yield
    except UsageError:
        raise
    except INVALID_ARGUMENTS as error:
        built = what_was_built(error)
        if built is None or isinstance(error, OutOfMemoryError):
            raise
        raise UsageError(f"The config's {built} cannot be built: {describe(error)}") from error


def what_was_built(error: Exception) -> Optional[str]:
    """Name the innermost object that was being built from a config when an error was raised.

    Returns None if there is none, or the error is a bug of this package.
    """
    name, in_package, last = None, False, Path()
    for frame, _ in traceback.walk_tb(error.__traceback__):
        function, last = frame.f_code.co_name, Path(frame.f_code.co_filename)
        if last == RUNNER and function in RUNNER_METHODS:
            name, in_package = RUNNER_METHODS[function], False
        elif last == BUILD_FUNCTIONS or (last.parent == BRICKS and function.startswith('build_')):
            name, in_package = name_of(frame.f_locals) or name, False
        elif PACKAGE in last.parents:
            in_package = True
    is_check = isinstance(error, ValueError) and PACKAGE in last.parents
    return None if in_package and not is_check else name


def name_of(variables: Mapping[str, Any]) -> Optional[str]:
    """Name what a function builds from its ``cfg``: what it is registered as, and its type."""
    cfg, registry = variables.get('cfg'), variables.get('registry')
    if not isinstance(cfg, (Mapping, Config)):
        return None
    kind = cfg.get('type') or cfg.get('runner_type', '')
    words = [getattr(registry, 'name', ''), getattr(kind, '__name__', str(kind))]
    return ' '.join(word for word in words if word)


def describe(error: Exception) -> str:
    """Describe an error in one line; a bare assertion by its source code."""
    message = str(error).strip().split('\n')[0]
    if not message:
        message = traceback.extract_tb(error.__traceback__)[-1].line or ''
    if isinstance(error, (TypeError, ValueError)):
        return message
    return f'{type(error).__name__}: {message}'
