"""Fixtures shared by the analysis tests."""

import pytest
from helpers.analysis import small_model
from helpers.tools import DETECTION


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    """Checkpoint and config of a small detector."""
    folder = tmp_path_factory.mktemp('small')
    cfg = small_model(DETECTION, folder / 'epoch_1.pth',
                      **{'model.neck.in_channels': [12, 24, 48, 96]})
    return folder / 'epoch_1.pth', cfg
