"""Loading configs, and adapting them to custom datasets and classes."""

import difflib
import os
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import ConfigParsingError
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from acmix_mm.backbones.base import ACmixBackbone
from acmix_mm.engine.annotations import (
    check_annotations,
    check_class_names,
    read_annotations,
)
from acmix_mm.engine.construction import construction_errors_as_usage_errors
from acmix_mm.engine.settings import (
    SPLITS,
    check_option_names,
    check_sections,
    find,
    parameters_of,
)
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError, summary

CONFIGS = Path(__file__).parents[1] / '.mim/configs/configs'


def find_config(name: str) -> str:
    """Return the path of a config.

    Args:
        name: a file, or an installed config such as ``shapes/maskrcnn_acmix_swin``, both with or
            without ``.py``. A file takes precedence.

    Raises:
        UsageError: there is neither.
    """
    for folder in ('', CONFIGS):
        for path in (os.path.join(folder, name), os.path.join(folder, f'{name}.py')):
            if os.path.isfile(path):
                return path
    installed = sorted(path.relative_to(CONFIGS).with_suffix('').as_posix()
                       for path in CONFIGS.glob('**/*.py') if path.parent.name != '_base_')
    wanted = Path(name).with_suffix('').as_posix().removeprefix('configs/')
    close = difflib.get_close_matches(wanted, installed)
    known = f'similar ones are {", ".join(close)}' if close else f'there are {", ".join(installed)}'
    raise UsageError(f'{name} is neither a file nor the name of an installed config; {known}.')


def load_config(path: str, options: Optional[dict[str, Any]] = None) -> Config:
    """Read a config and merge ``--cfg-options`` into it.

    Args:
        path: see :func:`find_config`.
        options: settings to override, by their dotted names.

    Raises:
        UsageError: the file, one of its base configs, or a package or class that it imports is
            missing, it contains an error, or an option does not match the config.
    """
    path = find_config(path)
    try:
        cfg = Config.fromfile(path)
    except (FileNotFoundError, ConfigParsingError) as error:
        raise UsageError(f'The config {path} inherits from a file that does not exist: '
                         f'{error}') from error
    except ModuleNotFoundError as error:
        raise UsageError(f'The config {path} needs a package that is not installed: '
                         f'{error}') from error
    # A config is code, which may raise anything.
    except Exception as error:
        # MMEngine fails this way on acmix_mm::NAME.py.
        if '_get_package_and_cfg_path' in str(error):
            raise UsageError(f'The config {path} inherits from a package, but names no folder in '
                             'it; write acmix_mm::configs/NAME.py or, for example, '
                             'mmdet::mask_rcnn/NAME.py.') from error
        raise UsageError(f'The config {path} cannot be read: {type(error).__name__}: '
                         f'{error}{line_of(error)}') from error
    if options:
        check_option_names(options, cfg)
        try:
            cfg.merge_from_dict(options)
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(f'--cfg-options do not match the config {path}: {error}') from error
    try:
        if cfg.get('default_scope') is None:
            cfg.default_scope = scope_of_model(cfg)
        name_operators(cfg)
    except ImportError as error:
        raise UsageError(f'The config {path} names a class that cannot be imported: '
                         f'{error}') from error
    check_sections(cfg)
    return cfg


def scope_of_model(cfg: Config) -> str:
    """Return the package that defines the class of a config's model.

    MMDetection's pure Python configs have no default scope. The tools need one, because they add
    settings by name.
    """
    model_type = (cfg.get('model') or {}).get('type', '')
    modules = [model_type] if isinstance(model_type, str) else [
        each.__module__ for each in model_type.__mro__]
    packages = [module.partition('.')[0] for module in modules]
    return next((package for package in packages if package in ('mmdet', 'mmseg')), 'mmengine')


def name_operators(node: Any) -> None:
    """Replace mmcv's operators by their names where they are a ``type``, as ``nms`` is.

    MMEngine writes them with their module into the work directory, where mmcv does not find them.
    """
    if isinstance(node, (Config, dict)):
        operator = node.get('type')
        if getattr(operator, '__module__', '').startswith('mmcv.ops') and not isinstance(
                operator, type):
            node['type'] = type_name(operator)
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            name_operators(child)


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
    """Set the classes of every dataset, and the number of classes of every head of the model.

    Raises:
        UsageError: a class is named twice, an annotation file is invalid, has other classes or has
            them in another order, or a head or a loss cannot be resized.
    """
    check_class_names(classes)
    for dataset in dataset_configs(cfg):
        if cfg.get('default_scope') == 'mmseg':
            accept_any_classes(dataset)
        elif is_coco(dataset):
            check_categories(dataset, classes)
        dataset.metainfo = dict(classes=tuple(classes))
    resize_heads(cfg.model, len(classes))


def resize_heads(node: Any, num_classes: int, old_num_classes: Optional[int] = None) -> None:
    """Set the number of classes, and class weights in losses, everywhere in a model's config.

    Args:
        node: the model, or a part of it.
        num_classes: the new number of classes.
        old_num_classes: that of the head that ``node`` is part of, before the change.

    Raises:
        UsageError: a head segments stuff, or a loss weights its classes differently.
    """
    if isinstance(node, dict):
        # Heads for panoptic and instance segmentation, such as Mask2Former's.
        if node.get('num_stuff_classes'):
            raise UsageError(f"The config's {node['type']} is for panoptic segmentation, but "
                             '--classes is for detection, and for instance or semantic '
                             'segmentation: name a config for one of these.')
        for key in ('num_classes', 'num_things_classes'):
            if key in node:
                old_num_classes = node[key]
                node[key] = num_classes
        weights = node.get('class_weight')
        if old_num_classes is not None and isinstance(weights, (list, tuple)):
            node['class_weight'] = resize_class_weight(weights, num_classes, old_num_classes)
        node = node.values()
    if not isinstance(node, str) and hasattr(node, '__iter__'):
        for child in node:
            resize_heads(child, num_classes, old_num_classes)


def resize_class_weight(weights: Sequence[float], num_classes: int,
                        old_num_classes: int) -> Sequence[float]:
    """Change the number of equal class weights; a weight of the background stays the last.

    Weights that ``--cfg-options`` has set for the new classes stay as they are.

    Raises:
        UsageError: the weights are of the old classes and differ.
    """
    background = (0, 1)
    if len(weights) - old_num_classes in background and len(set(weights[:old_num_classes])) == 1:
        return [*weights[:1] * num_classes, *weights[old_num_classes:]]
    if len(weights) - num_classes in background:
        return weights
    raise UsageError(f"The config's class_weight {list(weights)} is not for the {num_classes} "
                     'classes of --classes: set it with --cfg-options, with a weight for each '
                     'class, or to None.')


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
    return type_name(dataset.type) == 'CocoDataset'


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
    """Check the data of the given splits: it exists, matches the classes, and contains no code.

    Raises:
        UsageError: a file or folder is missing, would be unpickled, or is an annotation file that
            is invalid or has other classes.
    """
    expected: dict[str, None] = {}
    for dataset in dataset_configs(cfg, splits):
        root = dataset.get('data_root') or ''
        prefixes = dict(dataset.get('data_prefix') or {})
        # MMDetection's Mask2Former for instances inherits the label maps of the panoptic one.
        if is_coco(dataset) and not any(
                transform.get('with_seg') for transform in dataset.get('pipeline', [])):
            prefixes.pop('seg', None)
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
            '  If the data is elsewhere, pass --data-root DIR, the directory that contains '
            'these.\n'
            '  If you have no data, `python -m acmix_mm make_shapes data/shapes` generates some '
            'for the configs shapes/….')
    check_pickled_data(cfg, splits)
    # Of the processes on one machine, one is enough.
    if os.environ.get('LOCAL_RANK', '0') == '0':
        check_contents(cfg, splits)


def check_pickled_data(cfg: Config, splits: Sequence[str]) -> None:
    """Refuse data that MMDetection and MMSegmentation would unpickle by themselves.

    Raises:
        UsageError: a class hierarchy of Open Images contains Python objects, or a transform loads
            images as pickles.
    """
    for dataset in dataset_configs(cfg, splits):
        hierarchy = dataset.get('hierarchy_file') or ''
        path = os.path.join(dataset.get('data_root') or '', hierarchy)
        if hierarchy and not hierarchy.endswith('.json') and os.path.isfile(path):
            try:
                np.load(path, allow_pickle=False)
            except ValueError as error:
                raise UsageError(f'The file {path} is refused and nothing in it was run: it is not '
                                 f'an array of numbers ({error}).') from error
        for transform in dataset.get('pipeline') or []:
            if transform.get('decode_backend') == 'pickle':
                raise UsageError(f'{transform.type} would load images as pickles, which may '
                                 'contain code: convert them to .npy files and set '
                                 "decode_backend='numpy'.")


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
    """Check that neck and heads have as many input channels as an ACmix backbone has outputs.

    Raises:
        UsageError: they differ.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, ACmixBackbone):
        return
    outputs = [backbone.stage_info[index].channels for index in sorted(backbone.out_indices)]
    neck = getattr(model, 'neck', None)
    expected = getattr(neck, 'in_channels', None)
    if isinstance(expected, (list, tuple)) and list(expected) != outputs:
        raise UsageError(f'The neck has in_channels={list(expected)}, but the backbone outputs '
                         f'{outputs} channels; correct in_channels or the backbone.')
    if neck is None:
        for name, head in model.named_modules():
            # MMSegmentation's heads that read outputs of the backbone; others have no in_index.
            if hasattr(head, 'in_index') and hasattr(head, 'input_transform'):
                check_head_channels(name, head, outputs)


def check_head_channels(name: str, head: nn.Module, outputs: Sequence[int]) -> None:
    """Check the input channels of a segmentation head.

    Raises:
        UsageError: ``in_index`` names no output of the backbone, or ``in_channels`` differ.
    """
    indices = head.in_index if isinstance(head.in_index, (list, tuple)) else [head.in_index]
    if any(not -len(outputs) <= index < len(outputs) for index in indices):
        raise UsageError(f'The head {name} has in_index={head.in_index}, but the backbone has '
                         f'{len(outputs)} outputs; correct in_index, or out_indices of the '
                         'backbone.')
    channels = [outputs[index] for index in indices]
    expected = head.in_channels if isinstance(head.in_channels, (list, tuple)) else [
        head.in_channels]
    if head.input_transform == 'resize_concat':
        channels = [sum(channels)]
    if list(expected) != channels:
        raise UsageError(f'The head {name} has in_channels={head.in_channels}, but the outputs '
                         f'{head.in_index} of the backbone have {channels} channels; correct '
                         'in_channels or in_index.')
