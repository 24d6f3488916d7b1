"""Loading checkpoints, annotations and proposals as data: nothing that a file contains is run.

A config is different: it is a program by design. Only use configs that you trust.
"""

import contextlib
import functools
import pickle
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Callable, Optional

import mmengine
import numpy as np
import yaml
from mmengine.fileio import PickleHandler, YamlHandler
from mmengine.fileio.handlers import file_handlers
from mmengine.runner import CheckpointLoader
from mmengine.structures import InstanceData

from acmix_mm.checkpoints.data_pickle import NUMPY_FUNCTIONS, latin1_bytes
from acmix_mm.checkpoints.reading import (
    LOAD_ERRORS,
    explain_load_error,
    weights_only,
)
from acmix_mm.utils.errors import CheckpointError, UsageError


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Make torch, MMEngine's ``CheckpointLoader`` and ``mmengine.load`` load data only.

    This covers every module's ``init_cfg``, ``load_from``, resuming and annotation files, whichever
    runner and dataset read them. Contexts may be nested; also a decorator.

    Raises:
        CheckpointError: a checkpoint cannot be read, or contains code.
        UsageError: an annotation or proposal file contains code.
    """
    # CheckpointLoader has no public list of its loaders.
    loaders = dict(CheckpointLoader._schemes)
    safe_loaders = {prefix: without_code(loader) for prefix, loader in loaders.items()}
    handlers = dict(file_handlers)
    safe_handlers = {**dict.fromkeys(('pkl', 'pickle'), DataPickleHandler()),
                     **dict.fromkeys(('yml', 'yaml'), SafeYamlHandler())}
    CheckpointLoader._schemes.update(safe_loaders)
    file_handlers.update(safe_handlers)
    try:
        with weights_only():
            yield
    except (pickle.UnpicklingError, yaml.YAMLError) as error:
        path = file_being_loaded(error)
        if path is None:
            raise
        raise UsageError(f'The file {path} is refused and nothing in it was run: it is damaged, or '
                         f'holds more than data ({str(error).splitlines()[0]}); save it as JSON, '
                         'or as a pickle of lists, dicts and NumPy arrays.') from error
    finally:
        # Others may have been registered meanwhile, by imports of a config.
        schemes = CheckpointLoader._schemes
        schemes.update((prefix, loader) for prefix, loader in loaders.items()
                       if schemes[prefix] is safe_loaders[prefix])
        file_handlers.update((suffix, handlers[suffix]) for suffix, handler in safe_handlers.items()
                             if file_handlers[suffix] is handler)


def without_code(loader: Callable) -> Callable:
    """Wrap a loader of ``CheckpointLoader`` so that a checkpoint's config is not executed.

    MMEngine's runners execute the config text in ``meta`` when they resume.
    """
    # The name of a loader appears in the log.
    @functools.wraps(loader)
    def load(filename: str, *args: Any, **kwargs: Any) -> Any:
        try:
            checkpoint = loader(filename, *args, **kwargs)
        except LOAD_ERRORS as error:
            raise CheckpointError(explain_load_error(filename, error)) from error
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
            checkpoint['meta'].pop('config', None)
        return checkpoint
    return load


def file_being_loaded(error: BaseException) -> Optional[str]:
    """Return the file that ``mmengine.load`` was reading when the error was raised, if any."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code is mmengine.load.__code__:
            return str(frame.f_locals['file'])
    return None


# What a pickle may name, by module and name.
ALLOWED: dict[tuple[str, str], Any] = {
    **{(module, cls.__name__): cls for module in ('builtins', '__builtin__')
       for cls in (bytearray, complex, frozenset, range, set, slice)},
    # Bytes, in protocol 2 and below.
    ('_codecs', 'encode'): latin1_bytes,
    ('collections', 'OrderedDict'): OrderedDict,
    ('mmengine.structures.instance_data', 'InstanceData'): InstanceData,
    ('numpy', 'ndarray'): np.ndarray,
    ('numpy', 'dtype'): np.dtype,
    **{tuple(name.rsplit('.', 1)): function for name, function in NUMPY_FUNCTIONS.items()},
    # In protocol 5.
    **{(f'numpy.{core}.numeric', '_frombuffer'): np.empty(1).__reduce_ex__(5)[0]
       for core in ('core', '_core')},
}


class DataUnpickler(pickle.Unpickler):
    """Unpickles plain containers, NumPy arrays, and ``InstanceData`` as in files of proposals."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f'Unsupported GLOBAL {module}.{name}')
        return ALLOWED[module, name]


class DataPickleHandler(PickleHandler):
    """MMEngine's handler for pickles, which loads data only."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        return DataUnpickler(file, **kwargs).load()


class SafeYamlHandler(YamlHandler):
    """MMEngine's handler for YAML, which constructs no Python objects."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        return super().load_from_fileobj(file, Loader=yaml.SafeLoader, **kwargs)
