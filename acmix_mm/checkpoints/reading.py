"""Reading checkpoints as data: torch unpickles tensors and plain containers, and nothing else."""

import argparse
import contextlib
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Callable, NamedTuple
from unittest import mock
from urllib.error import URLError

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import Tensor

from acmix_mm.checkpoints import data_pickle
from acmix_mm.utils.errors import CheckpointError, summary

# Raised for files that are missing, unreachable, damaged, or that hold more than data.
LOAD_ERRORS = (OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError)
# Entries that may hold the weights, averaged weights first. MMEngine's EMA hook saves the averaged
# weights as ``state_dict``, and the others as ``ema_state_dict``.
WEIGHT_ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
# Prefixes added by DistributedDataParallel and torch.compile.
WRAPPERS = re.compile(r'^((module|_orig_mod)\.)+')
# Older versions of torch have no allow list for the classes of MMEngine's checkpoints.
HAS_ALLOW_LIST = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)
# Addresses without '://'.
HUB_SCHEMES = ('hf-hub:', 'hf_hub:')


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Force every ``torch.load`` in the context to load data only, also after a download.

    MMEngine does not pass ``weights_only``, and torch.hub, which downloads for MMEngine, passes
    False. ``argparse.Namespace`` is allowed: timm and many training scripts save their arguments
    in one, and unpickling it only sets attributes.

    Before torch 2.6, ``torch.load`` is replaced by one that uses
    :mod:`acmix_mm.checkpoints.data_pickle`.
    """
    force, force_not = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
    before = {name: os.environ.pop(name, None) for name in (force, force_not)}
    try:
        if HAS_ALLOW_LIST:
            os.environ[force] = '1'
            with torch.serialization.safe_globals([argparse.Namespace]):
                yield
        else:
            with mock.patch.object(torch, 'load', partial(load_data, torch.load)):
                yield
    finally:
        os.environ.pop(force, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})


def load_data(load: Callable, f: Any, *args: Any, **kwargs: Any) -> Any:
    """Load data with ``torch.load`` of an older torch; ``weights_only`` is ignored."""
    data_pickle.check_format(f)
    return load(f, *args, **{**kwargs, 'weights_only': False, 'pickle_module': data_pickle})


def read_checkpoint(source: str) -> Mapping:
    """Read a checkpoint as data, onto the CPU.

    Args:
        source: a path, a URL, or another address that MMEngine's ``CheckpointLoader`` supports; the
            path of a ``.safetensors`` file; ``timm://MODEL`` for the weights of a timm model, or
            ``hf-hub:OWNER/NAME`` for a timm model on the Hugging Face hub.

    Raises:
        CheckpointError: the checkpoint is missing, cannot be downloaded, is damaged, or holds code.
    """
    try:
        if source.endswith('.safetensors'):
            return read_safetensors(source)
        with weights_only():
            return CheckpointLoader.load_checkpoint(source, map_location='cpu')
    except LOAD_ERRORS as error:
        raise CheckpointError(explain_load_error(source, error)) from error


def is_path(source: str) -> bool:
    """Whether the source of a checkpoint is a local path rather than an address to download."""
    return '://' not in source and not source.startswith(HUB_SCHEMES)


def read_safetensors(path: str) -> Mapping[str, Tensor]:
    """Read a ``.safetensors`` file."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f'{path} needs the package safetensors, which cannot be imported '
                              f'({error}); pip install safetensors.') from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def allow_mmengine_checkpoints() -> None:
    """Allow torch to load the log history in MMEngine's checkpoints, with its NumPy arrays.

    Importing ``acmix_mm`` calls this. All other classes stay refused. Before torch 2.6, this holds
    only inside :func:`weights_only`.
    """
    dtypes = [type(np.dtype(name)) for name in ('bool', 'int32', 'int64', 'float32', 'float64')]
    named: list[tuple[Any, str]] = [
        (function, name) for name, function in data_pickle.NUMPY_FUNCTIONS.items()]
    named.append((history_statistic, 'builtins.getattr'))
    classes = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    if HAS_ALLOW_LIST:
        torch.serialization.add_safe_globals([*classes, *named])
        return
    # Pickle's protocol 2 uses Python 2's name, and encodes the bytes of a NumPy number as text.
    named += [(history_statistic, '__builtin__.getattr'),
              (data_pickle.latin1_bytes, '_codecs.encode')]
    # MultiStepLR saves its milestones in a Counter.
    classes += [argparse.Namespace, Counter]
    named += [(each, f'{each.__module__}.{each.__qualname__}') for each in classes]
    data_pickle.ALLOWED.update({name: value for value, name in named})


def history_statistic(owner: type, name: str) -> Callable:
    """Replace ``getattr`` for pickled instances of ``HistoryBuffer``, which look up their methods.

    The real ``getattr`` would give a checkpoint access to arbitrary code.

    Raises:
        pickle.UnpicklingError: the attribute is not a statistic of ``HistoryBuffer``.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'Unsupported GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def explain_load_error(source: str, error: Exception) -> str:
    """Explain in one line why ``source`` could not be loaded, and what to do about it."""
    if isinstance(error, FileNotFoundError):
        return f'The checkpoint {source} does not exist; check the path.'
    if isinstance(error, (URLError, ConnectionError, TimeoutError)):
        reason = getattr(error, 'reason', error)
        return (f'The checkpoint {source} could not be downloaded ({reason}); fetch it elsewhere '
                'and name the file, with --cfg-options model.backbone.init_cfg.checkpoint=FILE, or '
                'train from scratch, with --cfg-options model.backbone.init_cfg=None.')
    reason = str(error).strip().split('\n')[0] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        # torch's message starts with advice on how to load the file anyway.
        unsafe = re.search(r'(?:GLOBAL|Unsupported class) (\S+)', str(error))
        if unsafe:
            return (f'The checkpoint {source} is refused and nothing in it was run: besides data, '
                    f'it holds {unsafe.group(1)}, which could be code; save its weights alone, '
                    'with torch.save(model.state_dict(), path).')
        reason = 'not what torch.save writes'
    return (f'The checkpoint {source} cannot be read ({reason}): it is damaged or not a PyTorch '
            'checkpoint; fetch or save it again.')


class Weights(NamedTuple):
    """Weights read from a checkpoint.

    Attributes:
        source: the checkpoint, for messages.
        part: which part of the checkpoint the weights are, for messages; empty for all of it.
        state_dict: the weights, under the keys of the checkpoint.
    """

    source: str
    part: str
    state_dict: dict[str, Tensor]


def read_weights(source: str) -> Weights:
    """Read the weights of a backbone from its own checkpoint or that of a whole detector.

    Averaged weights are preferred.

    Raises:
        CheckpointError: the checkpoint cannot be read (see :func:`read_checkpoint`), or holds no
            weights.
    """
    weights = read_model_weights(source)
    backbone = {key.removeprefix('backbone.'): value
                for key, value in weights.state_dict.items() if key.startswith('backbone.')}
    if not backbone:
        return weights
    return Weights(source, ', '.join(filter(None, [weights.part, 'its backbone'])), backbone)


def read_model_weights(source: str) -> Weights:
    """Read all weights of a checkpoint, with those of neck and heads; averaged ones if it has any.

    Raises:
        CheckpointError: the checkpoint cannot be read (see :func:`read_checkpoint`), or holds no
            weights.
    """
    checkpoint = read_checkpoint(source)
    part = ''
    for entry in WEIGHT_ENTRIES:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(entry), Mapping):
            checkpoint = checkpoint[entry]
            if entry.endswith('_ema'):
                part = f'the averaged weights in {entry}'
    if not is_state_dict(checkpoint):
        raise CheckpointError(f'The checkpoint {source} holds no weights: neither it nor its '
                              f'{" or ".join(map(repr, WEIGHT_ENTRIES))} maps names to tensors.')
    return Weights(source, part,
                   {WRAPPERS.sub('', key): value for key, value in checkpoint.items()})


def is_state_dict(weights: Any) -> bool:
    """Whether ``weights`` maps one or more names to tensors."""
    return isinstance(weights, Mapping) and len(weights) > 0 and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items())


def check_finite(weights: Mapping[str, Any], source: str) -> None:
    """Check that no weights are NaN or infinite.

    Args:
        weights: the weights; other entries are ignored.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: some are.
    """
    invalid = [key for key, value in weights.items()
               if isinstance(value, Tensor) and not value.isfinite().all()]
    if invalid:
        raise CheckpointError(f'The checkpoint {source} has weights that are NaN or infinite '
                              f'({summary(invalid)}): its training diverged; use an earlier one.')
