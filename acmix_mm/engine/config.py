"""Loading configs, and adapting them to custom datasets and classes."""

import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from acmix_mm.backbones.base import ACmixBackbone
from acmix_mm.engine.annotations import (
    check_annotations,
    check_class_names,
    read_annotations,
    summary,
)
from acmix_mm.engine.construction import construction_errors_as_usage_errors
from acmix_mm.engine.settings import (
    SPLITS,
    check_option_names,
    check_sections,
    find,
    parameters_of,
)
from acmix_mm.utils.errors import UsageError


def load_config(path: str, options: Optional[dict[str, Any]] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    Raises:
        UsageError: the file, one of its base configs or a package that it imports is missing, it
            contains an error, or an option does not match the config.
    """
    if not os.path.isfile(path):
        raise UsageError(f'The config {path} does not exist; the configs provided here are in '
                         'configs/.')
    try:
        cfg = Config.fromfile(path)
        import_types(cfg)
    except FileNotFoundError as error:
        raise UsageError(f'The config {path} inherits from a file that does not exist: '
                         f'{error}') from error
    except ModuleNotFoundError as error:
        raise UsageError(f'The config {path} needs a package that is not installed: '
                         f'{error}') from error
    # A config is code, which may raise anything.
    except Exception as error:
        raise UsageError(f'The config {path} cannot be read: {type(error).__name__}: '
                         f'{error}{line_of(error)}') from error
    if options:
        check_option_names(options, cfg)
        try:
            cfg.merge_from_dict(options)
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(f'--cfg-options do not match the config {path}: {error}') from error
    check_sections(cfg)
    return cfg


def import_types(node: Any) -> None:
    """Import the classes that a config in MMEngine's pure Python style names.

    MMEngine imports them when their setting is read.
    """
    if isinstance(node, (Mapping, Config)):
        for child in node.values():
            import_types(child)
    elif isinstance(node, (list, tuple)):
        for child in node:
            import_types(child)


def line_of(error: Exception) -> str:
    """The line of a config that raised an error, as the end of a message; empty if it is unknown.
    """
    lines = [f' ({frame.filename}, line {frame.lineno})'
             for frame in traceback.extract_tb(error.__traceback__) if frame.name == '<module>']
    return lines[-1] if lines else ''


def build_model(cfg: Config) -> nn.Module:
    """Build the model of a config for inference in one process, without downloading weights.

    Raises:
        UsageError: the config has no model, or an invalid one.
    """
    enter_scope(cfg)
    return build_network(cfg.model)


def enter_scope(cfg: Config) -> None:
    """Make the config's registries the default ones, so that its model can be built.

    Raises:
        UsageError: the config has no model.
    """
    if not cfg.get('model'):
        raise UsageError(f'The config {cfg.filename} has no model; name a config that trains one.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))


def build_network(network: dict[str, Any]) -> nn.Module:
    """Build a model or a backbone for inference in one process.

    Raises:
        UsageError: an argument is invalid.
    """
    with construction_errors_as_usage_errors():
        built = revert_sync_batchnorm(MODELS.build(network))
    # MMDetection's Swin returns None from eval().
    built.eval()
    return built


def dataset_configs(cfg: Config, splits: Sequence[str] = SPLITS) -> Iterator[ConfigDict]:
    """Yield the dataset configs of the given splits, those inside dataset wrappers included."""
    def unwrap(dataset: ConfigDict) -> Iterator[ConfigDict]:
        wrapped = dataset.get('datasets', [dataset['dataset']] if 'dataset' in dataset else [])
        for each in wrapped:
            yield from unwrap(each)
        if not wrapped:
            yield dataset

    for split in splits:
        dataloader = cfg.get(f'{split}_dataloader')
        if dataloader is not None:
            yield from unwrap(dataloader['dataset'])


def evaluator_configs(cfg: Config,
                      splits: Sequence[str] = ('val', 'test')) -> Iterator[ConfigDict]:
    """Yield the metric configs of the given splits."""
    for split in splits:
        evaluator = cfg.get(f'{split}_evaluator') or []
        yield from evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]


def set_data_root(cfg: Config, data_root: str) -> None:
    """Make every dataset and evaluator of a config read its files from ``data_root``.

    Raises:
        UsageError: the datasets of the config have no data root or more than one.
    """
    old_roots = {dataset.get('data_root') for dataset in dataset_configs(cfg)}
    if len(old_roots) != 1 or None in old_roots:
        raise UsageError('--data-root replaces a data_root shared by all datasets, but this config '
                         f'has {sorted(map(str, old_roots))}; set each with --cfg-options '
                         'train_dataloader.dataset.data_root=… and so on.')
    old_root = os.path.join(old_roots.pop(), '')
    for dataset in dataset_configs(cfg):
        dataset.data_root = data_root
    for evaluator in evaluator_configs(cfg):
        for key, value in evaluator.items():
            if isinstance(value, str) and value.startswith(old_root):
                evaluator[key] = os.path.join(data_root, value[len(old_root):])


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the classes of every dataset, and ``num_classes`` of every head of the model.

    Raises:
        UsageError: a class is named twice, or an annotation file is invalid, has other classes, or
            has them in another order.
    """
    check_class_names(classes)
    for dataset in dataset_configs(cfg):
        if cfg.get('default_scope') == 'mmseg':
            accept_any_classes(dataset)
        elif is_coco(dataset):
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
    """Check that ``classes`` are categories of a COCO annotation file, in the order of the file.

    MMDetection numbers labels in the order of the file.

    Raises:
        UsageError: the file is invalid, a class is unknown, or the order differs.
    """
    path = annotation_file(dataset)
    if not path.is_file():
        return  # reported by check_data
    names = read_annotations(path).categories
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise UsageError(f'--classes names {", ".join(unknown)}, but the classes of {path} are '
                         f'{" ".join(names)}.')
    in_order = [name for name in names if name in classes]
    if list(classes) != in_order:
        raise UsageError(f'Labels follow the order of {path}: pass --classes {" ".join(in_order)}.')


def annotation_file(dataset: ConfigDict) -> Path:
    """Return the path of a dataset's annotation file."""
    return Path(dataset.get('data_root') or '', dataset.ann_file)


def is_coco(dataset: ConfigDict) -> bool:
    """Whether a dataset reads a COCO annotation file, with the categories as classes.

    Of MMDetection's subclasses, some read other formats.
    """
    kind = dataset.type
    return getattr(kind, '__name__', kind) in ('CocoDataset', 'mmdet.CocoDataset')


def classes_of(dataset: ConfigDict, scope: Optional[str]) -> Optional[Sequence[str]]:
    """Return the classes of a dataset, its own or those of its type.

    None if it has none, or divides them into things and stuff.

    Raises:
        UsageError: they are not a list of different names.
    """
    metainfo = dataset.get('metainfo') or {}
    if not isinstance(metainfo, Mapping):
        raise UsageError(f'The metainfo of a dataset must be a dict, got {metainfo!r}.')
    classes = metainfo.get('classes')
    if classes is None:
        kind = find(dataset.type, [DATASETS], scope, 'dataset.type')
        known = getattr(kind, 'METAINFO', {})
        return None if 'thing_classes' in known else known.get('classes')
    if isinstance(classes, str) and os.path.isfile(classes):
        return Path(classes).read_text().split('\n')
    check_class_names(classes)
    return classes


def accept_any_classes(dataset: ConfigDict) -> None:
    """Change a segmentation dataset to ``BaseSegDataset``, keeping its file suffixes.

    MMSegmentation's named datasets accept only subsets of their own classes.
    """
    for name in ('img_suffix', 'seg_map_suffix', 'reduce_zero_label'):
        dataset.setdefault(name, default_of(dataset, name))
    dataset.type = 'BaseSegDataset'


def default_of(dataset: ConfigDict, name: str) -> Any:
    """Return the default of an argument of a segmentation dataset; None if it has none."""
    kind = find(dataset.type, [DATASETS], 'mmseg', 'dataset.type')
    parameters = parameters_of(kind) or {}
    return parameters[name].default if name in parameters else None


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the data of the given splits exists, and matches the classes of the config.

    Raises:
        UsageError: a file or folder is missing, or an annotation file is invalid or has other
            classes.
    """
    expected: dict[str, None] = {}
    for dataset in dataset_configs(cfg, splits):
        root = dataset.get('data_root') or ''
        prefixes = dataset.get('data_prefix') or {}
        for path in (dataset.get('ann_file'), *prefixes.values()):
            if path:
                expected[os.path.join(root, path)] = None
    if set(splits) & {'val', 'test'}:
        for evaluator in evaluator_configs(cfg):
            if evaluator.get('ann_file'):
                expected[evaluator.ann_file] = None
    local = [path for path in expected if '://' not in path]
    missing = [path for path in local if not Path(path).exists()]
    if missing:
        raise UsageError(
            f'The data of this config is missing: {missing[0]} does not exist.\n'
            f'  Expected: {", ".join(local)}\n'
            '  If the data is elsewhere, pass --data-root DIR, the folder that contains these.\n'
            '  If you have no data, `make demo` generates a small dataset and trains on it.')
    # Of the processes on one machine, one is enough.
    if os.environ.get('LOCAL_RANK', '0') == '0':
        check_contents(cfg, splits)


def check_contents(cfg: Config, splits: Sequence[str]) -> None:
    """Check annotation files against the classes, and that image folders contain images.

    Raises:
        UsageError: a file is invalid, has other classes, or lacks masks; or a folder has no images.
    """
    scope = cfg.get('default_scope')
    for split in splits:
        evaluators = [each for each in evaluator_configs(cfg, [split])
                      if not each.get('format_only')]
        for dataset in dataset_configs(cfg, [split]):
            classes = classes_of(dataset, scope)
            if is_coco(dataset) and annotation_file(dataset).is_file():
                loads_masks = any(each.get('with_mask') for each in dataset.get('pipeline') or [])
                scores_masks = any('segm' in (each.get('metric') or ()) for each in evaluators)
                check_annotations(annotation_file(dataset), classes or (),
                                  needs_boxes=split == 'train' or bool(evaluators),
                                  needs_masks=loads_masks if split == 'train' else scores_masks)
            elif scope == 'mmseg':
                check_images(dataset)


def check_images(dataset: ConfigDict) -> None:
    """Check that the image folder of a segmentation dataset contains images.

    Raises:
        UsageError: it contains none.
    """
    prefix = (dataset.get('data_prefix') or {}).get('img_path')
    folder = Path(dataset.get('data_root') or '', prefix or '')
    if dataset.get('ann_file') or not folder.is_dir():
        return
    suffix = dataset.get('img_suffix') or default_of(dataset, 'img_suffix')
    if isinstance(suffix, str) and next(folder.rglob(f'*{suffix}'), None) is None:
        raise UsageError(f'The folder {folder} contains no image *{suffix}; set img_suffix of the '
                         'dataset, or correct its data_prefix.')


def check_class_counts(model: nn.Module, cfg: Config, splits: Sequence[str]) -> None:
    """Check that the heads of a model have as many classes as its datasets.

    MMDetection's ``NumClassCheckHook`` does so, for detectors only and when training has begun.

    Raises:
        UsageError: a head has another number of classes.
    """
    heads = {name: module.num_classes for name, module in model.named_modules()
             if hasattr(module, 'num_classes') and is_class_head(name, module)}
    # Detectors with a language model find what a text describes.
    if hasattr(model, 'language_model'):
        return
    for dataset in dataset_configs(cfg, splits):
        classes = classes_of(dataset, cfg.get('default_scope'))
        for name, number in heads.items():
            if classes and number != len(classes):
                raise UsageError(
                    f'The head {name} has num_classes={number}, but the dataset has {len(classes)} '
                    f'classes ({summary(classes)}): name the classes with --classes NAME …, or '
                    'correct num_classes in the config.')


def is_class_head(name: str, module: nn.Module) -> bool:
    """Whether a module with ``num_classes`` predicts the classes of its dataset.

    Proposals have none, and the semantic heads of detectors have those of another dataset.
    """
    part = re.sub(r'(\.\d+)+$', '', name)
    return (part.endswith('head') and not part.endswith(('rpn_head', 'semantic_head'))
            and type(module).__name__ != 'STDCHead')


def check_channels(model: nn.Module) -> None:
    """Check that what follows one of our backbones reads as many channels as that puts out.

    Raises:
        UsageError: the neck or a head reads other numbers of channels.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, ACmixBackbone):
        return
    outputs = [backbone.stage_info[index].channels for index in sorted(backbone.out_indices)]
    neck = getattr(model, 'neck', None)
    expected = getattr(neck, 'in_channels', None)
    if isinstance(expected, (list, tuple)) and list(expected) != outputs:
        raise UsageError(f'The neck has in_channels={list(expected)}, but the backbone puts out '
                         f'{outputs}; correct in_channels or the backbone.')
