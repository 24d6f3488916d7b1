"""Configs of small networks, for training in the process of the tests."""

import itertools

import pytest
from helpers.comparison import DETECTION, config

SMALL = {**{f'{split}_dataloader.dataset.pipeline.{index}.scale': (32, 32)
            for split, index in (('train', 2), ('val', 1), ('test', 1))},
         **{f'{split}_dataloader.{name}': value for split in ('train', 'val', 'test')
            for name, value in (('num_workers', 0), ('persistent_workers', False))},
         'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 5,
         'model.backbone.embed_dims': 12, 'model.neck.in_channels': [12, 24, 48, 96]}
numbers = itertools.count()


@pytest.fixture
def small_detector(shapes, tmp_path, monkeypatch):
    """A function that returns a config of a small detector, with a new work directory."""
    # Formatting the logged config takes longer than anything else; the fork has no such function.
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **_: (text, True),
                        raising=False)

    def make(**options):
        cfg = config(DETECTION, shapes, **SMALL)
        number = next(numbers)
        # MMEngine's own names of runs have a resolution of a second.
        cfg.update(work_dir=str(tmp_path / f'work{number}'), launcher='none',
                   experiment_name=f'small-{number}')
        cfg.merge_from_dict(options)
        return cfg
    return make
