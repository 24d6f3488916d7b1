"""Tests of atomic file writes."""

import pytest

from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError


def test_replaces_the_target(tmp_path):
    target = tmp_path / 'weights.pth'
    target.write_text('old')
    with atomic_write(target) as temporary:
        temporary.write_text('new')
        assert (temporary.suffix, target.read_text()) == ('.pth', 'old')
    assert [path.name for path in tmp_path.iterdir()] == ['weights.pth']
    assert target.read_text() == 'new'


def test_processes_may_write_the_same_file(tmp_path):
    target = tmp_path / 'metrics.json'
    with atomic_write(target) as first:
        first.write_text('first')
        with atomic_write(target) as second:
            second.write_text('second')
        assert target.read_text() == 'second'
    assert target.read_text() == 'first'
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.json']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_keeps_the_target_when_writing_fails(error, tmp_path):
    target = tmp_path / 'weights.pth'
    target.write_text('old')
    with pytest.raises(error), atomic_write(target) as temporary:
        temporary.write_text('half')
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ['weights.pth']
    assert target.read_text() == 'old'


def test_reports_a_path_that_cannot_be_written(tmp_path):
    target = tmp_path / 'none' / 'weights.pth'
    with pytest.raises(UsageError, match=rf'{target} cannot be written \(No such file'), \
            atomic_write(target) as temporary:
        temporary.write_text('new')
