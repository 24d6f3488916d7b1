"""Counting the model of a config, if possible on the ``meta`` device. Nothing is downloaded."""

from typing import Any, Optional

import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from torch import nn

from acmix_mm.analysis.flops import Count, count, total
from acmix_mm.engine.config import build_network, enter_scope
from acmix_mm.layers.base import OPERATOR_CLASSES
from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.markdown import table

# (height, width) after padding of a COCO image at the usual training scale.
DETECTION_SIZE = (800, 1344)


def padded_image_size(cfg: Config) -> tuple[int, int]:
    """Return the (height, width) that a config pads images to, by default ``DETECTION_SIZE``.

    It is that of the data preprocessor or, in detectors with inputs of a fixed size, of the test
    pipeline.
    """
    size = cfg.model.get('data_preprocessor', {}).get('size')
    if size:
        return tuple(size)
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
    transforms = {each.type: each for each in dataset.get('pipeline', [])}
    pad, resize = transforms.get('Pad', {}), transforms.get('Resize', {})
    # Unlike data preprocessors, transforms have (width, height).
    if pad.get('size'):
        return tuple(pad.size[::-1])
    if pad.get('pad_to_square') and resize.get('scale'):
        return (max(resize.scale),) * 2
    return DETECTION_SIZE


def complexity_report(cfg: Config, size: Optional[tuple[int, int]] = None) -> str:
    """Count the backbone and the whole model of a config, by operator class.

    The whole model is the inference path, without auxiliary training heads. A two-stage detector
    processes as many proposals, and masks, as its ``test_cfg`` allows.

    Args:
        cfg: a detection or segmentation config.
        size: (height, width) of the single image; :func:`padded_image_size` if None.

    Returns:
        A Markdown table of the counts below a description of what was counted.

    Raises:
        UsageError: the config has no model, or one that cannot be counted.
    """
    enter_scope(cfg)
    height, width = size or padded_image_size(cfg)
    model = build_to_count(cfg.model)
    rows = [('part', *OPERATOR_CLASSES, 'total')]
    for name, part in (('backbone', model.backbone), ('model', model)):
        counts = count_on_shapes(part, (height, width))
        columns = [*counts.values(), total(counts)]
        rows += [(f'{name}, parameters', *(f'{each.parameters / 1e6:.2f}M' for each in columns)),
                 (f'{name}, multiply-adds',
                  *(f'{each.multiply_adds / 1e9:.2f}G' for each in columns))]
    return '\n'.join([f'{cfg.filename}, one image of {height}×{width}', describe_model(model), '',
                      table(rows)])


def build_to_count(model: dict[str, Any]) -> nn.Module:
    """Build the model or backbone of a config without auxiliary training heads.

    It is on ``meta`` unless it has deformable attention, which reads the sizes of its maps from
    tensors.
    """
    # Not at the top: the tools check first whether mmcv has its operators.
    from mmcv.ops import MultiScaleDeformableAttention
    network = build_network(model)
    if getattr(network, 'auxiliary_head', None) is not None:
        network.auxiliary_head = None
    if any(isinstance(module, MultiScaleDeformableAttention) for module in network.modules()):
        return network
    return network.to('meta')


def count_on_shapes(network: nn.Module, size: tuple[int, int]) -> dict[str, Count]:
    """Count the inference path of a model, or a backbone, for one image.

    Args:
        network: from :func:`build_to_count`, or the backbone of such a model.
        size: (height, width) of the image.

    Raises:
        UsageError: the network does not run on its device.
    """
    device = next(network.parameters()).device
    image = torch.zeros(1, 3, *size, device=device)
    run = predict if hasattr(network, 'backbone') else type(network).__call__
    try:
        return count(network, lambda: run(network, image))
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError) as error:
        height, width = size
        raise UsageError(f'{type(network).__name__} does not run on an image of {height}×{width} '
                         f'on the {device} device, as dense, two-stage and query-based detectors '
                         f'and encoder-decoders do: {error!r:.200}') from error


def describe_model(model: nn.Module) -> str:
    """Describe which parts of a model the counts include."""
    if not has_roi_head(model):
        return 'The model is the whole inference path, without auxiliary training heads.'
    heads = [f'{name} heads ({number} proposals each)' for name, kind, number in zip(
        ('box', 'mask'), ('bbox', 'mask'), num_proposals(model))
        if getattr(model.roi_head, f'{kind}_head', None) is not None]
    return f'The model is backbone, neck, RPN, {" and ".join(heads)}.'


def predict(model: nn.Module, image: torch.Tensor) -> None:
    """Run inference without box selection, which depends on values and multiplies nothing."""
    size = tuple(image.shape[2:])
    metainfo = dict(batch_input_shape=size, img_shape=size, pad_shape=size, ori_shape=size)
    if hasattr(model, 'encode_decode'):
        model.encode_decode(image, [metainfo])
        return
    if not has_roi_head(model):
        model(image, [BaseDataElement(metainfo=metainfo)], mode='tensor')
        return
    maps = model.extract_feat(image)
    if model.with_rpn:
        model.rpn_head(maps)
    for kind, number in zip(('bbox', 'mask'), num_proposals(model)):
        head = getattr(model.roi_head, f'{kind}_head', None)
        if head is None:
            continue
        heads = cascade_stages(head)
        extractors = cascade_stages(getattr(model.roi_head, f'{kind}_roi_extractor'))
        for each, source in zip(heads, extractors * (len(heads) // len(extractors))):
            size = source.roi_layers[0].output_size
            each(image.new_zeros(number, source.out_channels, *size))


def has_roi_head(model: nn.Module) -> bool:
    """Return whether a model is a two-stage detector."""
    return getattr(model, 'roi_head', None) is not None


def num_proposals(model: nn.Module) -> tuple[int, int]:
    """Return the number of proposals for the box heads and of boxes for the mask heads."""
    return model.test_cfg.rpn.max_per_img, model.test_cfg.rcnn.max_per_img


def cascade_stages(module: Any) -> list[nn.Module]:
    """Return the modules of all stages of a cascade, or a single module as a list."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]
