"""Check the settings of all configs that MMDetection and MMSegmentation install; run by hand.

The checks must not reject what works. Usage:

    PYTHONPATH=.:tests python tests/engine/sweep_settings.py
"""

import warnings
from collections import Counter
from pathlib import Path

import pytest
from helpers.installed_configs import LIBRARIES, parse_once

from acmix_mm.engine.config import enter_scope, load_config
from acmix_mm.engine.settings import check_config, warn_of_misspelt_settings
from acmix_mm.engine.unread import check_unread
from acmix_mm.utils.errors import UsageError


def sweep():
    """Print the configs with an error or a warning, and how many there are of each kind."""
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        parse_once(patch)
        for package in LIBRARIES.values():
            root = Path(package.__file__).parent / '.mim/configs'
            for file in sorted(root.rglob('*.py')):
                if '_base_' not in file.parts:
                    counts[outcome(file)] += 1
    print(', '.join(f'{kind}: {count}' for kind, count in counts.items()))


def outcome(file):
    """Check a config; return the kind of the result."""
    try:
        cfg = load_config(str(file))
    except UsageError as error:
        print(f'{file}: {error}')
        return 'cannot be loaded'
    if not cfg.get('model'):
        return 'without a model'
    try:
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter('always')
            enter_scope(cfg)
            check_config(cfg)
            check_unread(cfg)
            warn_of_misspelt_settings(cfg)
    except UsageError as error:
        print(f'{file}: {error}')
        return 'rejected'
    ours = [str(each.message) for each in raised if 'effect' in str(each.message)]
    for message in ours:
        print(f'{file}: {message}')
    return 'with a warning' if ours else 'accepted'


if __name__ == '__main__':
    sweep()
