"""Files that are there as a whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Union

from acmix_mm.utils.errors import UsageError


@contextlib.contextmanager
def atomic_write(path: Union[str, Path]) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; what was written there then takes its place.

    If the writing fails, what was at ``path`` stays, and nothing else does.

    Raises:
        UsageError: the file system does not take the file.
    """
    target = Path(path)
    # With the ending of the target, by which some choose a format.
    beside = target.with_name(f'.partial.{target.name}')
    try:
        yield beside
        os.replace(beside, target)
    except OSError as error:
        raise UsageError(f'{path} cannot be written ({error.strerror}).') from error
    finally:
        beside.unlink(missing_ok=True)
