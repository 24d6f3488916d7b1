"""Reading checkpoints as data, and loading them with an account of every key.

No checkpoint runs code here: torch unpickles tensors and plain containers, and refuses the rest.
"""

import argparse
import contextlib
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from typing import Callable, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import Tensor

from acmix_mm.utils.errors import CheckpointError

# What torch raises on files that are missing, unreachable, damaged, or more than data.
LOAD_ERRORS = (OSError, EOFError, RuntimeError, LookupError, ValueError, pickle.UnpicklingError)
# Where checkpoints keep their weights, averaged ones first. (MMEngine's ``ema_state_dict`` is what
# was averaged: its hook exchanges the two as it saves.)
NESTS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
# What wraps a model, for several processes or to compile it, puts in front of its names.
WRAPPERS = re.compile(r'^((module|_orig_mod)\.)+')
# An older torch cannot be told which of MMEngine's classes are data, and would refuse them all.
HAS_ALLOW_LIST = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)
# Names that timm takes: one of its models, or a model on a hub.
TIMM_SCHEME = 'timm://'
HUB_SCHEMES = ('hf-hub:', 'hf_hub:')


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse what is not data, downloads included.

    MMEngine passes no ``weights_only``, and torch.hub, which downloads for it, passes False. The
    ``argparse.Namespace`` in which timm's and many other scripts keep their arguments is data: it
    holds attributes and runs nothing (torch older than 2.5 cannot be told so, and refuses it).
    """
    allowed = getattr(torch.serialization, 'safe_globals', contextlib.nullcontext)
    force, force_not = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
    before = {name: os.environ.pop(name, None) for name in (force, force_not)}
    os.environ[force] = '1'
    try:
        with allowed([argparse.Namespace]):
            yield
    finally:
        del os.environ[force]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def read_checkpoint(source: str) -> Mapping:
    """Load a checkpoint onto the CPU, as data.

    Args:
        source: a path, a URL, or another scheme that MMEngine's ``CheckpointLoader`` knows; the
            path of a ``.safetensors`` file; ``timm://MODEL`` for the weights of a timm model, or
            ``hf-hub:OWNER/NAME`` for those of a timm model on the Hugging Face hub.

    Raises:
        CheckpointError: it is missing, cannot be downloaded, is damaged, or holds code.
    """
    try:
        if source.startswith((TIMM_SCHEME, *HUB_SCHEMES)):
            return read_from_timm(source.removeprefix(TIMM_SCHEME))
        if source.endswith('.safetensors'):
            return read_safetensors(source)
        allow_mmengine_checkpoints()
        with weights_only():
            return CheckpointLoader.load_checkpoint(source, map_location='cpu')
    except LOAD_ERRORS as error:
        raise CheckpointError(explain_load_error(source, error)) from error


def is_path(source: str) -> bool:
    """Whether a checkpoint's source is a file here, and no address that something downloads."""
    return '://' not in source and not source.startswith(HUB_SCHEMES)


def read_from_timm(name: str) -> Mapping[str, Tensor]:
    """Let timm build a model, download its weights if it has to, and load them."""
    try:
        import timm

        # A hub may hold ACmix models, which timm knows from there.
        import acmix_mm.timm  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f'The weights of {name} come through timm, which cannot be imported '
                              f'({error}); pip install timm.') from error
    try:
        with weights_only():
            return timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:
        # Whatever went wrong on the way to the hub, a missing file in its cache included.
        raise ConnectionError(str(error).split('\n')[0]) from error
    except RuntimeError as error:
        raise CheckpointError(f'timm has no weights of the name {name} ({error}); '
                              'timm.list_pretrained() lists those that it has.') from error


def read_safetensors(path: str) -> Mapping[str, Tensor]:
    """Load a ``.safetensors`` file."""
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
    """Tell torch which of the classes in MMEngine's own checkpoints are data.

    They are the log history of a run and the NumPy arrays in it. Everything else stays refused.
    """
    if not HAS_ALLOW_LIST:
        return
    dtypes = [type(np.dtype(name)) for name in ('bool', 'int32', 'int64', 'float32', 'float64')]
    # NumPy 1 and 2 have these in modules of different names.
    functions = dict(_reconstruct=np.empty(0).__reduce__()[0], scalar=np.int64(0).__reduce__()[0])
    torch.serialization.add_safe_globals([
        HistoryBuffer, np.ndarray, np.dtype, *dtypes, (history_statistic, 'builtins.getattr'),
        *((function, f'numpy.{core}.multiarray.{name}')
          for name, function in functions.items() for core in ('core', '_core'))])


def history_statistic(owner: type, name: str) -> Callable:
    """Stand in for ``getattr``, by which a pickled ``HistoryBuffer`` names its own methods.

    The real one would let a checkpoint reach anything.

    Raises:
        pickle.UnpicklingError: something else than a statistic of ``HistoryBuffer`` is asked for.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'Unsupported GLOBAL getattr({owner!r}, {name!r})')
    return getattr(owner, name)


def explain_load_error(source: str, error: Exception) -> str:
    """Say in one sentence why ``source`` could not be loaded, and what to do."""
    if isinstance(error, FileNotFoundError):
        return f'The checkpoint {source} does not exist; check the path.'
    if isinstance(error, (URLError, ConnectionError, TimeoutError)):
        reason = getattr(error, 'reason', error)
        return (f'The checkpoint {source} could not be downloaded ({reason}); fetch it elsewhere '
                'and name the file, with --cfg-options model.backbone.init_cfg.checkpoint=FILE, or '
                'train from scratch, with --cfg-options model.backbone.init_cfg=None.')
    reason = str(error).strip().split('\n')[0] or type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        # torch puts advice to load it all the same first, and what it found further down.
        unsafe = re.search(r'(?:GLOBAL|Unsupported class) (\S+)', str(error))
        if unsafe:
            return (f'The checkpoint {source} is refused and nothing of it was run: besides data '
                    f'it holds {unsafe.group(1)}, which could be code; save its weights alone, '
                    'with torch.save(model.state_dict(), path).')
        reason = 'not what torch.save writes'
    return (f'The checkpoint {source} cannot be read ({reason}): it is damaged or not a PyTorch '
            'checkpoint; fetch or save it again.')


class Weights(NamedTuple):
    """Weights of one network, as a checkpoint names them.

    Attributes:
        source: where they come from, for messages.
        part: which part of the checkpoint they are, for messages; empty if all of it.
        state_dict: the weights.
    """

    source: str
    part: str
    state_dict: dict[str, Tensor]


def read_weights(source: str) -> Weights:
    """Load the weights of a checkpoint: averaged ones, where it has them, and of the backbone
    alone, where it is a whole detector.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or the file holds no weights.
    """
    weights = read_model_weights(source)
    if not any(key.startswith('backbone.') for key in weights.state_dict):
        return weights
    return Weights(source, ', '.join(filter(None, [weights.part, 'its backbone'])),
                   {key.removeprefix('backbone.'): value
                    for key, value in weights.state_dict.items() if key.startswith('backbone.')})


def read_model_weights(source: str) -> Weights:
    """Load the weights of a checkpoint, of a whole detector with neck and heads: averaged ones,
    where it has them.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or the file holds no weights.
    """
    checkpoint = read_checkpoint(source)
    part = ''
    for nest in NESTS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(nest), Mapping):
            checkpoint = checkpoint[nest]
            if nest.endswith('_ema'):
                part = f'the averaged weights in {nest}'
    if not isinstance(checkpoint, Mapping) or not all(
            isinstance(value, Tensor) for value in checkpoint.values()) or not checkpoint:
        raise CheckpointError(f'The checkpoint {source} holds no weights: neither it nor its '
                              f'{" or ".join(map(repr, NESTS))} maps names to tensors.')
    return Weights(source, part,
                   {WRAPPERS.sub('', key): value for key, value in checkpoint.items()})
