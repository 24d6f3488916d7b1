"""Tests of exported detectors: their post-processing, the ONNX file, its evaluation, examples."""

import json
import subprocess
import sys
import venv

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from helpers import ROOT, relative_error
from helpers.stack import needs_export
from PIL import Image
from torch import nn

from acmix_mm.deploy.dynamic_modules import dynamic_module
from acmix_mm.deploy.masks import paste_masks
from acmix_mm.deploy.onnx import export_onnx, inputs_of, matching_detections, network_of
from acmix_mm.engine.config import build_model, load_config
from acmix_mm.layers import WindowACmix
from acmix_mm.utils.errors import UsageError

pytestmark = needs_export
SMALL = {
    'model.backbone.depth': 18, 'model.backbone.base_channels': 8,
    'model.neck.in_channels': [8, 16, 32, 64], 'model.neck.out_channels': 16}
HEADS = {
    f'model.{part}': 16 for part in (
        'rpn_head.in_channels', 'rpn_head.feat_channels',
        'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels', 'roi_head.bbox_head.in_channels',
        'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels',
        'roi_head.bbox_head.fc_out_channels')}
RETINA = {'model.bbox_head.in_channels': 16, 'model.bbox_head.feat_channels': 16}
CASCADE = {key.replace('bbox_head', f'bbox_head.{stage}'): value for key, value in HEADS.items()
           for stage in range(3)}
CASCADE.update({f'model.roi_head.{head}.num_classes': 3 for head in (
    'bbox_head.0', 'bbox_head.1', 'bbox_head.2', 'mask_head')})
YOLO = {
    'model.backbone.widen_factor': 0.125, 'model.neck.in_channels': [32, 64, 128],
    'model.neck.out_channels': 32, 'model.bbox_head.in_channels': 32,
    'model.bbox_head.feat_channels': 32}
# A config of each kind of detector, reduced.
CONFIGS = {
    'shapes/maskrcnn_acmix_r50': {**SMALL, **HEADS},
    'cascade_maskrcnn_acmix_r50': {**SMALL, **CASCADE},
    'retinanet_acmix_r50': {**SMALL, **RETINA},
    'yolox_acmix_s': YOLO,
    'rtmdet_acmix_s': YOLO,
}


def config(name, options=()):
    return load_config(str(ROOT / f'configs/{name}.py'), {**CONFIGS.get(name, {}), **dict(options)})


def responsive(model):
    """Make the predictions of a random detector depend on the image, with scores up to 1."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and 'head' in name:
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if getattr(model, 'roi_head', None):
        heads = model.roi_head.bbox_head
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            head.fc_cls.bias.data[-1] = 4  # the background
    return model


def predict(model, image):
    """The predictions of MMDetection for a normalised image, (1, 3, height, width)."""
    from mmdet.structures import DetDataSample
    height, width = image.shape[2:]
    sample = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width),
                                         scale_factor=(1., 1.)))
    with torch.no_grad():
        return model.predict(padded(image), [sample])[0].pred_instances


def padded(image):
    return nn.functional.pad(image, (0, -image.shape[3] % 32, 0, -image.shape[2] % 32))


def assert_same(actual, instances, size):
    """Compare boxes, scores, labels and masks with MMDetection's, in any order of equal scores."""
    boxes, scores, labels, *masks = (torch.as_tensor(each) for each in actual)
    assert len(boxes) == len(instances)
    if len(boxes) == 0:
        return
    expected = instances.bboxes, instances.scores, instances.labels
    found, total = matching_detections((boxes, scores, labels), expected, min_score=0.)
    # Rounding decides a few times which of two overlapping boxes is suppressed.
    assert found >= 0.97 * total
    torch.testing.assert_close(scores, instances.scores, rtol=0, atol=2e-3)
    if masks:
        pasted = torch.from_numpy(paste_masks(masks[0].numpy(), boxes.numpy(), size))
        same_place = (boxes - instances.bboxes).abs().amax(1) < 0.1
        assert same_place.float().mean() > 0.9
        differing = (pasted != instances.masks)[same_place].float().mean()
        assert differing < 1e-3


@pytest.mark.parametrize('name', CONFIGS)
def test_post_processing_equals_mmdetection(name):
    from acmix_mm.deploy.detectors import KINDS
    cfg = config(name)
    model = responsive(build_model(cfg))
    detector = KINDS[cfg.model.type](model).eval()
    for size in ((64, 96), (70, 45)):
        image = torch.randn(1, 3, *size)
        expected = predict(model, image)
        assert len(expected) > 1
        with torch.no_grad():
            outputs = detector(inputs_of(detector, padded(image))[0], torch.tensor(size))
        assert_same(outputs[:len(detector.output_names)], expected, size)


@pytest.mark.parametrize('size', [(6, 6), (7, 7), (1, 9), (42, 3), (2, 8), (15, 13)])
@pytest.mark.parametrize('shift_size', [0, 3])
def test_dynamic_windows_equal_the_layer(size, shift_size):
    for mix, (embed_dims, num_heads) in (('acmix', (24, 3)), ('acmix', (8, 2)), ('attn', (8, 2)),
                                         ('conv', (8, 2))):
        layer = WindowACmix(embed_dims, num_heads, 7, shift_size=shift_size, mix=mix).eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, *size, embed_dims)
        with torch.no_grad():
            assert relative_error(dynamic_module(layer)(x), layer(x)) < 1e-5


def test_pasting_equals_mmdetection():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    masks = torch.rand(40, 28, 28)
    corner, side = torch.rand(40, 2) * 90 - 10, torch.rand(40, 2) * 60
    boxes = torch.cat([corner, corner + side], 1)
    expected, _ = _do_paste_mask(masks[:, None], boxes, 70, 90, skip_empty=False)
    actual = torch.from_numpy(paste_masks(masks.numpy(), boxes.numpy(), (70, 90)))
    # Away from the threshold, where rounding decides.
    clear = (expected - 0.5).abs() > 1e-4
    assert torch.equal(actual[clear], (expected >= 0.5)[clear])
    assert paste_masks(np.zeros((0, 28, 28)), np.zeros((0, 4)), (7, 9)).shape == (0, 7, 9)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A small Mask R-CNN, its config, and the files with and without preprocessing."""
    folder = tmp_path_factory.mktemp('detector')
    torch.manual_seed(0)
    cfg = config('shapes/maskrcnn_acmix_r50')
    network = network_of(cfg, None, backbone_only=False)
    responsive(network.detector)
    torch.save(dict(state_dict=network.detector.state_dict(), meta={}), folder / 'small.pth')
    export_onnx(network, str(folder / 'raw.onnx'), (100, 130), False, cfg, with_preprocessing=True)
    return network.detector, cfg, folder
