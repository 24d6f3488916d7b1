"""Counting the model of a config, on shapes alone: nothing is computed and nothing downloaded."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from mmengine.config import Config
from torch import nn

from acmix_mm.analysis.flops import Count, count, total
from acmix_mm.engine.config import build_network, enter_scope
from acmix_mm.layers.base import OPERATOR_CLASSES
from acmix_mm.utils.errors import UsageError

# What a picture of COCO's usual scale is padded to.
DETECTION_SIZE = (800, 1344)


def read_shape(words: Sequence[str]) -> tuple[int, int]:
    """Read (height, width).

    Raises:
        UsageError: these are not two positive integers.
    """
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError('--shape takes two positive integers, height and width, as in '
                         f'--shape 800 1344; got {" ".join(words)}.')
    return int(words[0]), int(words[1])


def picture_shape(cfg: Config) -> tuple[int, int]:
    """(height, width) that a segmentation config pads to, or ``DETECTION_SIZE``."""
    return tuple(cfg.model.get('data_preprocessor', {}).get('size') or DETECTION_SIZE)


def complexity_report(cfg: Config, shape: Optional[tuple[int, int]]) -> str:
    """Count backbone and whole model of a config, by operator class.

    The whole model is what predicts, without the auxiliary heads of training. A two-stage detector
    runs as many proposals, and masks, as its ``test_cfg`` lets through.

    Args:
        cfg: a detection or segmentation config.
        shape: (height, width) of the one picture; if None the size that the config pads to, or
            ``DETECTION_SIZE``.

    Returns:
        The counts as a Markdown table, and what they are of.

    Raises:
        UsageError: the config has no model, or one that does not run on shapes alone.
    """
    enter_scope(cfg)
    height, width = shape or picture_shape(cfg)
    model = build_to_count(cfg.model)
    parts = {name: count_on_shapes(part, (height, width))
             for name, part in dict(backbone=model.backbone, model=model).items()}
    return '\n'.join([f'{cfg.filename}, one picture of {height}×{width}', included(model), '',
                      table(parts)])


def build_to_count(model: dict[str, Any]) -> nn.Module:
    """The network of a config, a model or a backbone, as it predicts, on ``meta``."""
    network = build_network(model)
    if getattr(network, 'auxiliary_head', None) is not None:
        network.auxiliary_head = None
    return network.to('meta')


def count_on_shapes(network: nn.Module, shape: tuple[int, int]) -> dict[str, Count]:
    """Count a model, as it predicts, or a backbone, on one picture.

    Args:
        network: on ``meta``, from :func:`build_to_count`, or the backbone of one.
        shape: (height, width) of the picture.

    Raises:
        UsageError: the network does not run on shapes alone.
    """
    image = torch.empty(1, 3, *shape, device='meta')
    run = predict if hasattr(network, 'backbone') else type(network).__call__
    try:
        return count(network, lambda: run(network, image))
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        height, width = shape
        raise UsageError(f'{type(network).__name__} does not run on a picture of {height}×{width} '
                         'by shapes alone, as dense and two-stage detectors and encoder-decoders '
                         f'do: {error!r:.200}') from error


def included(model: nn.Module) -> str:
    """Say in words what the counts of the whole model are of."""
    if not has_roi_head(model):
        return 'The model is all that predicts, without auxiliary heads of training.'
    heads = [f'{name} heads ({number} proposals each)' for name, kind, number in zip(
        ('box', 'mask'), ('bbox', 'mask'), proposals(model))
        if getattr(model.roi_head, f'{kind}_head', None) is not None]
    return f'The model is backbone, neck, RPN, {" and ".join(heads)}.'


def predict(model: nn.Module, image: torch.Tensor) -> None:
    """Run all that multiplies in a prediction; what selects boxes needs values, and is left out."""
    if not has_roi_head(model):
        model(image, mode='tensor')
        return
    maps = model.extract_feat(image)
    if model.with_rpn:
        model.rpn_head(maps)
    for kind, number in zip(('bbox', 'mask'), proposals(model)):
        head = getattr(model.roi_head, f'{kind}_head', None)
        if head is None:
            continue
        heads = stages(head)
        extractors = stages(getattr(model.roi_head, f'{kind}_roi_extractor'))
        for each, source in zip(heads, extractors * (len(heads) // len(extractors))):
            size = source.roi_layers[0].output_size
            each(image.new_zeros(number, source.out_channels, *size))


def has_roi_head(model: nn.Module) -> bool:
    """Whether a model is a two-stage detector."""
    return getattr(model, 'roi_head', None) is not None


def proposals(model: nn.Module) -> tuple[int, int]:
    """How many proposals box heads take, and how many of their boxes mask heads."""
    return model.test_cfg.rpn.max_per_img, model.test_cfg.rcnn.max_per_img


def stages(module: Any) -> list[nn.Module]:
    """The modules of all stages of a cascade, or the one module there is."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def table(parts: dict[str, dict[str, Count]]) -> str:
    """The counts of each part as a Markdown table."""
    lines = [f'| | {" | ".join(OPERATOR_CLASSES)} | total |',
             '|---' * (len(OPERATOR_CLASSES) + 2) + '|']
    for name, counts in parts.items():
        columns = [*counts.values(), total(counts)]
        lines.append(f'| {name}, parameters | ' + ' | '.join(
            f'{each.parameters / 1e6:.2f}M' for each in columns) + ' |')
        lines.append(f'| {name}, multiply-adds | ' + ' | '.join(
            f'{each.multiply_adds / 1e9:.2f}G' for each in columns) + ' |')
    return '\n'.join(lines)
