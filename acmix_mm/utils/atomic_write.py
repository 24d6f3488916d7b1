"""Atomic file writes."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from acmix_mm.utils.errors import UsageError

# Prefix of the names of files that are not complete.
PARTIAL = '.partial.'


@contextlib.contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and move what was written there to ``path``.

    If the block raises, ``path`` is left as it was and the temporary file is removed.

    Raises:
        UsageError: the file cannot be written.
    """
    target = Path(path)
    # Keeps the suffix of the target: some writers choose the file format by it. Processes may write
    # the same file at once, as the metrics of a distributed test.
    temporary = target.with_name(f'{PARTIAL}{secrets.token_hex(4)}.{target.name}')
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f'{path} cannot be written ({error.strerror}).') from error
    finally:
        temporary.unlink(missing_ok=True)
