"""Checks of output paths, for before the work starts."""

import os
import tempfile
from pathlib import Path
from typing import Union

from acmix_mm.utils.errors import UsageError


def file_to_write(name: Union[str, Path]) -> Path:
    """Return the path of an output file, after checking that it can be written.

    Raises:
        UsageError: the directory does not exist or is not writable, or the path is a directory.
    """
    path = Path(name)
    if path.is_dir():
        raise UsageError(f'{path} cannot be written (it is a directory); name a file.')
    if not path.parent.is_dir():
        raise UsageError(f'The directory {path.parent} does not exist; create it, or name another '
                         'file.')
    folder_to_write(path.parent)
    return path


def folder_to_write(name: Union[str, Path]) -> Path:
    """Return the path of an output directory, after checking that files can be written there.

    It is not created.

    Raises:
        UsageError: the directory cannot be created or is not writable.
    """
    path = Path(name).absolute()
    existing = next(each for each in (path, *path.parents) if os.path.lexists(each))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(f'The directory {name} cannot be written ({existing}: {error.strerror}); '
                         'name another one.') from error
    return Path(name)
