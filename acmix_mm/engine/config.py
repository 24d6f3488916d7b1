"""Loading a config, and pointing it at one's own data and classes."""

import contextlib
import inspect
import json
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, build_functions, init_default_scope
from torch import nn

from acmix_mm.utils.errors import UsageError

SPLITS = ('train', 'val', 'test')
PACKAGE = Path(__file__).parents[1]


def load_config(path: str, options: Optional[dict[str, Any]] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    Raises:
        UsageError: the file, or a base that it inherits from, is missing.
    """
    if not os.path.isfile(path):
        raise UsageError(f'The config {path} does not exist; the shipped ones are in configs/.')
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise UsageError(f'The config {path} inherits from a file that does not exist: '
                         f'{error}') from error
    except ModuleNotFoundError as error:
        raise UsageError(f'The config {path} needs a package that is not installed: '
                         f'{error}') from error
    if options:
        try:
            cfg.merge_from_dict(options)
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(f'--cfg-options do not fit the config {path}: {error}') from error
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config for predictions in one process; nothing is downloaded.

    Raises:
        UsageError: the config has none.
    """
    enter_scope(cfg)
    return build_network(cfg.model)


def enter_scope(cfg: Config) -> None:
    """Make the registries that a config's model is built from the default ones.

    Raises:
        UsageError: the config has no model.
    """
    if not cfg.get('model'):
        raise UsageError(f'The config {cfg.filename} has no model; name one that trains one.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))


@contextlib.contextmanager
def explained_arguments() -> Iterator[None]:
    """Make what our modules refuse, and arguments that no module has, a message without a trace.

    Raises:
        UsageError: a network cannot be built from its config.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        by_ours = isinstance(error, ValueError) and PACKAGE in Path(raised_in).parents
        by_call = isinstance(error, TypeError) and raised_in == build_functions.__file__
        if by_ours or by_call:
            raise UsageError(f"The config's model cannot be built: {error}") from error
        raise


def build_network(network: dict[str, Any]) -> nn.Module:
    """Build a model, or a backbone, for predictions in one process.

    Raises:
        UsageError: it does not take its arguments.
    """
    with explained_arguments():
        built = revert_sync_batchnorm(MODELS.build(network))
    # MMDetection's Swin returns nothing from eval().
    built.eval()
    return built


def datasets(cfg: Config, splits: Sequence[str] = SPLITS) -> Iterator[ConfigDict]:
    """Yield the dataset configs that read files, from inside whatever wraps them."""
    def inside(dataset: ConfigDict) -> Iterator[ConfigDict]:
        inner = dataset.get('datasets', [dataset['dataset']] if 'dataset' in dataset else [])
        for wrapped in inner:
            yield from inside(wrapped)
        if not inner:
            yield dataset

    for split in splits:
        dataloader = cfg.get(f'{split}_dataloader')
        if dataloader is not None:
            yield from inside(dataloader['dataset'])


def evaluators(cfg: Config) -> Iterator[ConfigDict]:
    """Yield the metric configs of validation and test."""
    for split in ('val', 'test'):
        evaluator = cfg.get(f'{split}_evaluator') or []
        yield from evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]


def set_data_root(cfg: Config, data_root: str) -> None:
    """Read every dataset and annotation file from below ``data_root``.

    Raises:
        UsageError: the config has several roots, so that one cannot stand for all.
    """
    old_roots = {dataset.get('data_root') for dataset in datasets(cfg)}
    if len(old_roots) != 1 or None in old_roots:
        raise UsageError('--data-root stands for the one data_root of a config, and this one has '
                         f'{sorted(map(str, old_roots))}; set each with --cfg-options '
                         'train_dataloader.dataset.data_root=… and so on.')
    old_root = os.path.join(old_roots.pop(), '')
    for dataset in datasets(cfg):
        dataset.data_root = data_root
    for evaluator in evaluators(cfg):
        for key, value in evaluator.items():
            if isinstance(value, str) and value.startswith(old_root):
                evaluator[key] = os.path.join(data_root, value[len(old_root):])


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Name the classes of every dataset, and size every head of the model for them.

    Raises:
        UsageError: an annotation file has other classes, or has them in another order.
    """
    for dataset in datasets(cfg):
        if cfg.get('default_scope') == 'mmseg':
            make_open_to_classes(dataset)
        elif dataset.type == 'CocoDataset':
            check_categories(dataset, classes)
        dataset.metainfo = dict(classes=tuple(classes))

    def resize_heads(node: Any) -> None:
        if isinstance(node, dict):
            if 'num_classes' in node:
                node['num_classes'] = len(classes)
            node = node.values()
        if not isinstance(node, str) and hasattr(node, '__iter__'):
            for child in node:
                resize_heads(child)

    resize_heads(cfg.model)


def check_categories(dataset: ConfigDict, classes: Sequence[str]) -> None:
    """Raise UsageError unless ``classes`` are categories of COCO annotations, in their order.

    MMDetection leaves out what it does not find, and numbers labels by the order in the file.
    """
    path = Path(dataset.get('data_root') or '', dataset.ann_file)
    if not path.is_file():
        return  # check_data says so
    names = [category['name'] for category in json.loads(path.read_text())['categories']]
    strange = [name for name in classes if name not in names]
    if strange:
        raise UsageError(f'--classes names {", ".join(strange)}, which {path} does not have; it '
                         f'has {" ".join(names)}.')
    in_order = [name for name in names if name in classes]
    if list(classes) != in_order:
        raise UsageError(f'Labels follow the order of {path}: pass --classes {" ".join(in_order)}.')


def make_open_to_classes(dataset: ConfigDict) -> None:
    """Make a segmentation dataset read any classes, its files laid out as before.

    MMSegmentation's named datasets accept only subsets of their own classes; ``BaseSegDataset``
    accepts any.
    """
    with DATASETS.switch_scope_and_registry('mmseg') as registry:
        named = registry.get(dataset.type)
    for name in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
        default = inspect.signature(named.__init__).parameters[name].default
        dataset.setdefault(name, default)
    dataset.type = 'BaseSegDataset'


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Raise UsageError, naming path, layout and remedy, if data of ``splits`` is missing."""
    expected: dict[str, None] = {}
    for dataset in datasets(cfg, splits):
        root = dataset.get('data_root') or ''
        prefixes = dataset.get('data_prefix') or {}
        for path in (dataset.get('ann_file'), *prefixes.values()):
            if path:
                expected[os.path.join(root, path)] = None
    if set(splits) & {'val', 'test'}:
        for evaluator in evaluators(cfg):
            if evaluator.get('ann_file'):
                expected[evaluator.ann_file] = None
    local = [path for path in expected if '://' not in path]
    missing = [path for path in local if not Path(path).exists()]
    if missing:
        raise UsageError(
            f'The data of this config is not there: {missing[0]} does not exist.\n'
            f'  Expected: {", ".join(local)}\n'
            '  Data kept elsewhere: pass --data-root DIR, the folder that holds these.\n'
            '  No data at hand: `make demo` writes a small set and trains on it.')
