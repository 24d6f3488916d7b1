"""Publishing a checkpoint: its weights, config, classes and package versions.

MMEngine's ``CheckpointHook(published_keys=...)`` publishes only checkpoints of its own run, when
that run ends; this module publishes any existing checkpoint.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from acmix_mm.checkpoints.reading import (
    HAS_ALLOW_LIST,
    check_finite,
    is_state_dict,
    read_checkpoint,
)
from acmix_mm.environment import versions
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import CheckpointError
from acmix_mm.utils.output_paths import file_to_write

# The entries of a checkpoint's meta to keep; the others describe the machine or serve resuming.
PUBLISHED_META = ('cfg', 'dataset_meta', 'epoch', 'iter', 'seed', 'time', 'mmengine_version',
                  'versions')


def publish(source: str, target: str) -> Path:
    """Write the weights of a training checkpoint to a file named after ``target`` and its hash.

    The file contains ``state_dict``, which with EMA holds the averaged weights, and ``meta``: the
    entries ``PUBLISHED_META`` of the training checkpoint, and the package versions
    ``published_with``. It is read back and compared before it gets its final name.

    Args:
        source: checkpoint written by MMEngine.
        target: path of the file to write; a ``.pth`` suffix is replaced by ``-<hash>.pth``, with
            the first 8 hexadecimal digits of the file's SHA-256.

    Returns:
        The path of the published file.

    Raises:
        UsageError: the directory of ``target`` does not exist.
        CheckpointError: the source cannot be read, contains code, has no weights, or has weights
            that are NaN or infinite.
    """
    path = file_to_write(target)
    checkpoint = read_checkpoint(source)
    weights = checkpoint.get('state_dict') if isinstance(checkpoint, Mapping) else None
    if not is_state_dict(weights):
        raise CheckpointError(f"The checkpoint {source} has no weights under 'state_dict'; name "
                              'one that was written by training.')
    check_finite(weights, source)
    meta = checkpoint.get('meta')
    meta = {key: meta[key] for key in PUBLISHED_META if isinstance(meta, Mapping) and key in meta}
    meta['published_with'] = versions()

    content = io.BytesIO()
    # Without clone() a view would be saved with the whole storage that it belongs to.
    torch.save(dict(meta=meta, state_dict={key: weight.detach().clone()
                                           for key, weight in weights.items()}), content)
    digits = hashlib.sha256(content.getbuffer()).hexdigest()[:8]
    published = path.with_name(f'{path.name.removesuffix(".pth")}-{digits}.pth')
    with atomic_write(published) as temporary:
        temporary.write_bytes(content.getbuffer())
        check_published(temporary, weights)
    return published


def check_published(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Check that ``path`` loads as plain data and contains the same weights.

    Raises:
        CheckpointError: the weights differ.
    """
    with no_allowed_classes():
        loaded = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
    try:
        torch.testing.assert_close(loaded, weights, rtol=0, atol=0)
    except AssertionError as error:
        raise CheckpointError(f'The weights read back from {path} differ from those written; '
                              'nothing was published. Check the disk.') from error


@contextlib.contextmanager
def no_allowed_classes() -> Iterator[None]:
    """Make torch.load accept only what it accepts by default, without MMEngine's classes."""
    if not HAS_ALLOW_LIST:
        yield
        return
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(allowed)
