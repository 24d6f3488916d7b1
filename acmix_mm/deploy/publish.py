"""Publishing a checkpoint: its weights, and where they come from."""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from acmix_mm.checkpoints.reading import HAS_ALLOW_LIST, read_checkpoint
from acmix_mm.engine.cli import file_to_write
from acmix_mm.environment import versions
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import CheckpointError, UsageError

# What is kept of MMEngine's account of a run. The rest is about the machine, or for going on.
KEPT = ('cfg', 'dataset_meta', 'epoch', 'iter', 'seed', 'time', 'mmengine_version', 'versions')


def publish(source: str, target: str) -> Path:
    """Write the weights of a training checkpoint to ``target``, its hash in the name.

    The file holds ``state_dict``, under EMA the averaged weights, which MMEngine saves there; and
    ``meta``: ``KEPT`` of the training's, and ``published_with``, the versions that wrote it. It is
    read back as data, and compared, before it gets its name.

    Args:
        source: a checkpoint of MMEngine.
        target: name of the file to write; its ending is replaced by ``-<8 digits>.pth``.

    Returns:
        The file: after ``target``, the first 8 digits of its SHA-256 and ``.pth``.

    Raises:
        UsageError: the folder of ``target`` does not exist, or torch is too old.
        CheckpointError: the source cannot be read, holds code, or has no weights.
    """
    if not HAS_ALLOW_LIST:
        raise UsageError('Publishing reads a training checkpoint as data, which takes torch 2.6 or '
                         f'newer; this is {torch.__version__}.')
    path = file_to_write(target)
    checkpoint = read_checkpoint(source)
    weights = checkpoint.get('state_dict') if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(
            isinstance(weight, Tensor) for weight in weights.values()):
        raise CheckpointError(f"The checkpoint {source} has no weights under 'state_dict'; name "
                              'one that training has written.')
    meta = checkpoint.get('meta')
    meta = {key: meta[key] for key in KEPT if isinstance(meta, Mapping) and key in meta}
    meta['published_with'] = versions()

    content = io.BytesIO()
    # A tensor that is a part of a larger one would take all of it along.
    torch.save(dict(meta=meta, state_dict={key: weight.detach().clone()
                                           for key, weight in weights.items()}), content)
    digits = hashlib.sha256(content.getbuffer()).hexdigest()[:8]
    published = path.with_name(f'{path.name.removesuffix(".pth")}-{digits}.pth')
    with atomic_write(published) as beside:
        beside.write_bytes(content.getbuffer())
        check_published(beside, weights)
    return published


def check_published(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless ``path`` loads back as plain data, with the same weights."""
    with no_allowed_classes():
        loaded = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
    if loaded.keys() != weights.keys() or not all(
            torch.equal(as_bytes(loaded[key]), as_bytes(weight))
            for key, weight in weights.items()):
        raise CheckpointError(f'What was written to {path} reads back differently; nothing was '
                              'published. Is the disk in order?')


def as_bytes(weight: Tensor) -> Tensor:
    """What a tensor holds, uint8: bytes are equal where it holds NaN, too."""
    return weight.detach().contiguous().reshape(-1).view(torch.uint8)


@contextlib.contextmanager
def no_allowed_classes() -> Iterator[None]:
    """Let torch load what is data to everybody, and not MMEngine's classes as well."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(allowed)
