"""Paths and comparisons shared by the tests, and outputs of the authors' published code."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT.parent / 'shared' / 'golden'
# All configs that can be run.
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('configs/**/*.py')
                 if path.parent.name != '_base_')


class Golden:
    """Outputs of the authors' published code, with the weights and inputs that produce them."""

    def __init__(self, name):
        sys.path.insert(0, str(GOLDEN))
        import rule
        sys.path.remove(str(GOLDEN))
        self.rule = rule
        self.arrays = np.load(GOLDEN / f'{name}.npz')
        self.meta = json.loads(str(self.arrays['meta']))

    def __getitem__(self, name):
        return torch.from_numpy(self.arrays[name])

    def __iter__(self):
        return iter(self.arrays.files)

    def array(self, name, shape):
        return torch.from_numpy(self.rule.array(self.meta['salt'] + name, shape))

    def state_dict(self):
        shapes = self.meta['state']
        weights = self.rule.state_dict(shapes, self.meta['salt'])
        return {key: torch.from_numpy(value) for key, value in weights.items()}


def relative_error(actual, expected):
    """The largest absolute difference, relative to the largest absolute expected value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
