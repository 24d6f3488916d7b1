"""Fixtures shared by the analysis tests."""

import runpy
import sys

import pytest
from helpers import ROOT
from helpers.analysis import small_model
from helpers.tools import DETECTION


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    """Checkpoint and config of a small detector."""
    folder = tmp_path_factory.mktemp('small')
    cfg = small_model(DETECTION, folder / 'epoch_1.pth',
                      **{'model.neck.in_channels': [12, 24, 48, 96]})
    return folder / 'epoch_1.pth', cfg


@pytest.fixture
def get_flops(monkeypatch, capsys):
    """Run tools/get_flops.py in this process, which has imported its dependencies already."""
    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['get_flops.py', *arguments])
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(ROOT / 'tools/get_flops.py'), run_name='__main__')
        return capsys.readouterr().out
    return run
