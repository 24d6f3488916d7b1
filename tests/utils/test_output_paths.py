"""Checks of output paths."""

import pytest

from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.output_paths import file_to_write, folder_to_write


def test_nothing_is_created(tmp_path):
    assert folder_to_write(tmp_path / 'a' / 'b') == tmp_path / 'a' / 'b'
    assert file_to_write(tmp_path / 'a.pth') == tmp_path / 'a.pth'
    assert not any(tmp_path.iterdir())


def test_paths_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'a' / 'b', '/proc/none'):
        with pytest.raises(UsageError, match=f'{folder} cannot be written .*name another one'):
            folder_to_write(folder)
    with pytest.raises(UsageError, match=r'cannot be written \(it is a directory\); name a file'):
        file_to_write(tmp_path)
    with pytest.raises(UsageError, match='none does not exist; create it, or name another file'):
        file_to_write(tmp_path / 'none' / 'a.pth')
    with pytest.raises(UsageError, match='/proc cannot be written'):
        file_to_write('/proc/a.pth')
