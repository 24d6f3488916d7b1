"""Detectors as modules that torch.export can trace: MMDetection's networks, own post-processing.

Each module computes what its detector's ``predict`` computes for one image, before boxes are
rescaled and masks are pasted. Backbone, neck, the forward passes of the heads, anchors and box
coders are MMDetection's. Its post-processing branches on the number of boxes, which torch.export
cannot trace; here it is written without such branches, so that any number may be zero.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import torch
from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import onnx_delta2bbox
from mmengine.config import Config
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError

# Far above the number of anchors times classes.
MOST_BOXES = 2**40
# The parts of a detector that the modules below compute as MMDetection does, by their keys.
SUPPORTED = dict(
    bbox_head=('RetinaHead', 'RTMDetSepBNHead', 'YOLOXHead', 'Shared2FCBBoxHead',
               'Shared4Conv1FCBBoxHead', 'ConvFCBBoxHead'),
    rpn_head=('RPNHead',),
    roi_head=('StandardRoIHead', 'CascadeRoIHead'),
    mask_head=('FCNMaskHead',),
    bbox_roi_extractor=('SingleRoIExtractor',),
    mask_roi_extractor=('SingleRoIExtractor',),
    roi_layer=('RoIAlign',),
    bbox_coder=('DeltaXYWHBBoxCoder', 'DistancePointBBoxCoder'),
    nms=('nms',),
    loss_cls=('CrossEntropyLoss', 'FocalLoss', 'QualityFocalLoss'),
)
# Further parts that detectors may have, and what they are for.
UNSUPPORTED = dict(semantic_head='panoptic segmentation', panoptic_head='panoptic segmentation',
                   panoptic_fusion_head='panoptic segmentation', shared_head='a shared head',
                   mask_iou_head='mask scoring')


class Detector(nn.Module):
    """Base class of the detectors.

    Maps an image, normalised and padded, and its size without padding, (2,), int64, (height,
    width), to the outputs below. The image is (1, 3, height / step, step, width / step, step), from
    which torch.export sees that the sides are multiples of ``step``.

    - boxes (n, 4), x1, y1, x2, y2 in pixels of the image;
    - scores (n,), descending;
    - labels (n,), int64;
    - with a mask head, the mask of each box, as probabilities, (n, mask height, mask width);
    - the feature maps that the heads read, which serve only verification.

    Attributes:
        step: padded heights and widths are multiples of this.

    Args:
        detector: a detector of MMDetection in evaluation mode.
    """

    step = 32

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs."""
        return ['boxes', 'scores', 'labels']

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        maps = self.detector.extract_feat(image.flatten(4, 5).flatten(2, 3))
        # The largest x1, y1, x2, y2.
        limits = size.flip(0).repeat(2).to(image.dtype)
        return (*self.predict(maps, limits), *maps)

    def predict(self, maps: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs from the feature maps and the largest coordinates, (4,)."""
        raise NotImplementedError


class AnchorDetector(Detector):
    """RetinaNet and RTMDet."""

    def predict(self, maps: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        head = self.detector.bbox_head
        cfg = head.test_cfg
        levels = []
        for logits, boxes, priors in levels_of(head, *head(maps)):
            scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(1)[:, :-1]
            num_classes = scores.shape[1]
            scores, index = top_k(scores.flatten(), cfg.get('nms_pre', -1))
            box = index // num_classes
            levels.append((decode(head.bbox_coder, priors[box], boxes[box], limits), scores,
                           label_of(index, num_classes)))
        boxes, scores, labels = map(torch.cat, zip(*levels))
        keep = where(is_larger(boxes, cfg.get('min_bbox_size', -1)) & (scores > cfg.score_thr))
        return suppress(boxes[keep], scores[keep], labels[keep], cfg.nms, cfg.max_per_img)


class YOLOX(Detector):
    """YOLOX, whose boxes have one class each and are not clipped to the image."""

    def predict(self, maps: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        head = self.detector.bbox_head
        classes, boxes, objectness = ([flatten(each, channels) for each in levels] for levels,
                                      channels in zip(head(maps), (head.cls_out_channels, 4, 1)))
        priors = head.prior_generator.grid_priors([each.shape[2:] for each in maps],
                                                  device=maps[0].device, with_stride=True)
        boxes = head._bbox_decode(torch.cat(priors), torch.cat(boxes))
        scores, labels = torch.cat(classes).sigmoid().max(1)
        scores = scores * torch.cat(objectness)[:, 0].sigmoid()
        keep = where(scores >= head.test_cfg.score_thr)
        return suppress(boxes[keep], scores[keep], labels[keep], head.test_cfg.nms)


class RCNN(Detector):
    """Mask R-CNN and Cascade Mask R-CNN, with or without masks."""

    @property
    def output_names(self) -> list[str]:
        names = super().output_names
        return [*names, 'masks'] if self.detector.roi_head.with_mask else names

    def predict(self, maps: Sequence[Tensor], limits: Tensor) -> tuple[Tensor, ...]:
        head = self.detector.roi_head
        boxes, scores, labels = self.detect(maps, self.propose(maps, limits), limits)
        if not head.with_mask:
            return boxes, scores, labels
        return boxes, scores, labels, self.segment(maps, boxes, labels)

    def propose(self, maps: Sequence[Tensor], limits: Tensor) -> Tensor:
        """Compute the region proposals, (n, 4).

        Only the order of their scores matters. It is that of the logits: ONNX Runtime's sigmoid has
        an error of 1e-7, larger than the scores of the last proposals.
        """
        head = self.detector.rpn_head
        cfg = head.test_cfg
        levels = []
        for level, (logits, boxes, priors) in enumerate(levels_of(head, *head(maps))):
            scores = logits[:, 0] if head.use_sigmoid_cls else logits[:, 0] - logits[:, 1]
            scores, index = top_k(scores, cfg.get('nms_pre', -1))
            boxes = decode(head.bbox_coder, priors[index], boxes[index], limits)
            levels.append((boxes, scores, torch.full_like(index, level)))
        boxes, scores, level_of = map(torch.cat, zip(*levels))
        keep = where(is_larger(boxes, cfg.get('min_bbox_size', -1)))
        return suppress(boxes[keep], scores[keep], level_of[keep], cfg.nms, cfg.max_per_img)[0]

    def detect(self, maps: Sequence[Tensor], rois: Tensor,
               limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classify the proposals and refine their boxes, in one or several stages."""
        head, cfg = self.detector.roi_head, self.detector.roi_head.test_cfg
        extractors, heads = as_list(head.bbox_roi_extractor), as_list(head.bbox_head)
        logits = []
        for stage, (extractor, bbox_head) in enumerate(zip(extractors, heads)):
            stage_logits, deltas = bbox_head(roi_features(extractor, maps, rois))
            logits.append(stage_logits)
            coder, num_classes = bbox_head.bbox_coder, bbox_head.num_classes
            if stage < len(heads) - 1:
                if not bbox_head.reg_class_agnostic:
                    likely = stage_logits[:, :num_classes].argmax(1)
                    deltas = of_label(deltas.unflatten(1, (num_classes, 4)), likely)
                rois = decode(coder, rois, deltas, limits)
        scores = torch.stack(logits).mean(0).softmax(1)[:, :num_classes]
        deltas = deltas.unflatten(1, (-1, 4)).expand(-1, num_classes, 4)
        boxes = decode(coder, rois[:, None].expand_as(deltas), deltas, limits)
        boxes, scores = boxes.flatten(0, 1), scores.flatten()
        keep = where(scores > cfg.score_thr)
        return suppress(boxes[keep], scores[keep], label_of(keep, num_classes), cfg.nms,
                        cfg.max_per_img)

    def segment(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Compute the mask of each box for its label, averaged over the stages."""
        head = self.detector.roi_head
        masks = []
        for extractor, mask_head in zip(as_list(head.mask_roi_extractor), as_list(head.mask_head)):
            logits = mask_head(roi_features(extractor, maps, boxes))
            masks.append(logits[:, 0] if mask_head.class_agnostic else of_label(logits, labels))
        return torch.stack([each.sigmoid() for each in masks]).mean(0)


KINDS: dict[str, type[Detector]] = dict(
    RetinaNet=AnchorDetector, RTMDet=AnchorDetector, YOLOX=YOLOX, FasterRCNN=RCNN, MaskRCNN=RCNN,
    CascadeRCNN=RCNN)


def check_detector(cfg: Config) -> None:
    """Check by the names in a config whether its detector can be exported.

    Raises:
        UsageError: it cannot.
    """
    kind = type_name(cfg.model.type)
    if kind == 'DetTTAModel':
        raise UsageError('Test-time augmentation cannot be exported: export the config without its '
                         'tta_model.')
    parts = list(parts_of(cfg.model))
    for key, _ in parts:
        if key in UNSUPPORTED:
            raise UsageError(f"The config's {key} cannot be exported, as {UNSUPPORTED[key]} is not "
                             'supported; --backbone-only exports the backbone.')
    if kind not in KINDS:
        raise UsageError(f'The detector {kind} cannot be exported; supported: {", ".join(KINDS)}. '
                         '--backbone-only exports the backbone.')
    for key, value in parts:
        found = type_name(value.get('type', key))
        if 'type' in value and found not in SUPPORTED.get(key, (found,)):
            raise UsageError(f"The config's {key}, {found}, cannot be exported; supported: "
                             f'{", ".join(SUPPORTED[key])}. --backbone-only exports the backbone.')
        if key == 'roi_layer' and value.get('pool_mode', 'avg') != 'avg':
            raise UsageError("Only RoIAlign with pool_mode='avg' can be exported.")
        further = value.keys() - {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
        if key == 'nms' and further:
            raise UsageError(f'The settings {", ".join(sorted(further))} of nms cannot be '
                             'exported.')


def parts_of(node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dicts below a node of a model's config and their keys, without settings of training."""
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from parts_of(child)
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key != 'train_cfg':
                for each in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(each, Mapping):
                        yield key, each
                yield from parts_of(value)


def as_list(stages: nn.Module) -> Sequence[nn.Module]:
    """The stages of a part of an RoI head; only in a cascade it is a list."""
    return stages if isinstance(stages, nn.ModuleList) else [stages]


def flatten(maps: Tensor, channels: int) -> Tensor:
    """Reshape (1, priors · channels, height, width) to (height · width · priors, channels)."""
    return maps[0].permute(1, 2, 0).reshape(-1, channels)


def levels_of(head: nn.Module, logits: Sequence[Tensor],
              boxes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The logits (n, channels), encoded boxes (n, 4) and priors of each level of a dense head."""
    priors = head.prior_generator.grid_priors([each.shape[2:] for each in logits],
                                              device=logits[0].device)
    return [(flatten(each_logits, head.cls_out_channels), flatten(each_boxes, 4), each_priors)
            for each_logits, each_boxes, each_priors in zip(logits, boxes, priors)]


def decode(coder: Any, priors: Tensor, encoded: Tensor, limits: Tensor) -> Tensor:
    """Decode boxes, (…, 4), and clip them to the image."""
    if hasattr(coder, 'means'):
        boxes = onnx_delta2bbox(priors, encoded, coder.means, coder.stds,
                                add_ctr_clamp=coder.add_ctr_clamp, ctr_clamp=coder.ctr_clamp)
    else:
        boxes = coder.decode(priors, encoded)
    return boxes.clamp(min=0).minimum(limits) if coder.clip_border else boxes


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest ``k`` scores, or all if there are fewer or ``k`` is not positive, sorted.

    Returns:
        The scores, and their positions, int64.
    """
    number = scores.shape[0]
    return scores.topk(torch.sym_min(k, number) if k > 0 else number)


def where(condition: Tensor) -> Tensor:
    """The positions where a condition, (n,), holds, int64."""
    return bounded(condition.nonzero()[:, 0])


def bounded(index: Tensor) -> Tensor:
    """Tell torch.export that a tensor is not so long that other sizes exceed ONNX's integers."""
    torch._check(index.shape[0] <= MOST_BOXES)
    return index


def label_of(index: Tensor, num_classes: int) -> Tensor:
    """The labels that positions in a flattened (n, num_classes) have."""
    return index - index // num_classes * num_classes


def is_larger(boxes: Tensor, side: float) -> Tensor:
    """Whether both sides of each box are longer than ``side``; all are if that is negative."""
    if side < 0:
        return torch.ones_like(boxes[:, 0], dtype=torch.bool)
    return (boxes[:, 2:] - boxes[:, :2] > side).all(1)


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Mapping[str, Any],
             max_boxes: Optional[int] = None) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression among the boxes of each group, as in ``mmcv.ops.batched_nms``.

    Args:
        boxes: (n, 4).
        scores: (n,).
        groups: (n,), int64.
        cfg: the config's ``nms``.
        max_boxes: how many boxes to keep.

    Returns:
        The remaining boxes, scores and groups, sorted by score.
    """
    shifted = boxes
    if not cfg.get('class_agnostic', False):
        # Boxes of different groups are moved apart. The zero is for an image without boxes.
        largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).amax(0)
        shifted = boxes + (groups.to(boxes.dtype) * (largest + 1))[:, None]
    keep = bounded(nms(shifted, scores, cfg['iou_threshold']))[:max_boxes]
    return boxes[keep], scores[keep], groups[keep]


def of_label(maps: Tensor, labels: Tensor) -> Tensor:
    """Select the label's channel of each (n, channels, …)."""
    return maps[torch.arange(labels.shape[0], device=labels.device), labels]


def roi_features(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Pool each box from the feature map that suits its size, as ``SingleRoIExtractor`` does.

    Returns:
        (n, channels, pooled height, pooled width).
    """
    layers = extractor.roi_layers
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    level_of = extractor.map_roi_levels(rois, len(layers))
    features, order = [], []
    for level, (layer, feature_map) in enumerate(zip(layers, maps)):
        index = where(level_of == level)
        features.append(roi_align(feature_map, rois[index], layer.output_size,
                                  layer.spatial_scale, layer.sampling_ratio, layer.aligned))
        order.append(index)
    return torch.cat(features)[torch.cat(order).argsort()]
