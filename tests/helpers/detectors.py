"""Detectors with random weights, their predictions, and comparisons with exported files."""

import torch
from torch import nn

from acmix_mm.deploy.masks import paste_masks
from acmix_mm.deploy.onnx import matching_detections


def responsive(model):
    """Make the predictions of a random detector depend on the image, with scores up to 1."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and 'head' in name:
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # Otherwise the boxes of YOLOX would be 10⁷ pixels wide, and several classes have the score 1,
    # as they would in RetinaNet.
    head = getattr(model, 'bbox_head', None)
    for name in ('multi_level_conv_reg', 'multi_level_conv_cls', 'retina_cls', 'retina_reg'):
        layers = getattr(head, name, [])
        for layer in [layers] if isinstance(layers, nn.Conv2d) else layers:
            layer.weight.data /= 8
    if getattr(model, 'roi_head', None):
        # Otherwise many proposals would have the score 1, whose order is arbitrary.
        model.rpn_head.rpn_cls.weight.data /= 8
        heads = model.roi_head.bbox_head
        layers = [head.fc_cls for head in (heads if isinstance(heads, nn.ModuleList) else [heads])]
        make_decisive(model.eval(), layers)
    return model


def make_decisive(model, layers):
    """Scale layers that classify boxes so that half of the boxes are likely to be objects."""
    logits = {}
    hooks = [layer.register_forward_hook(
        lambda layer, _, out: logits.__setitem__(layer, out[:, :-1])) for layer in layers]
    predict(model, torch.randn(1, 3, 64, 96))
    for hook, layer in zip(hooks, layers):
        hook.remove()
        scale = max(4 / logits[layer].std(), 1)
        layer.weight.data *= scale
        # The last logit is that of the background.
        layer.weight.data[-1] = 0
        layer.bias.data[-1] = scale * logits[layer].amax(1).median()


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


def assert_same(actual, instances):
    """Compare boxes, scores, labels and masks with MMDetection's, in any order of equal scores."""
    boxes, scores, labels, *masks = (torch.as_tensor(each) for each in actual)
    assert len(boxes) == len(instances)
    if len(boxes) == 0:
        return
    expected = instances.bboxes, instances.scores, instances.labels
    found, total = matching_detections((boxes, scores, labels), expected, min_score=0.)
    # Rounding decides which of two equal scores is the last to be kept, or suppresses the other.
    assert total - found <= max(1, 0.03 * total)
    torch.testing.assert_close(scores, instances.scores, rtol=0, atol=2e-3)
    if masks:
        assert differing_mask_pixels(boxes, labels, masks[0], instances) < 1e-3


def differing_mask_pixels(boxes, labels, masks, instances):
    """The share of mask pixels that differ between MMDetection's and the nearest detections."""
    pasted = torch.from_numpy(paste_masks(masks.numpy(), boxes.numpy(),
                                          instances.masks.shape[1:]))
    distance = (instances.bboxes[:, None] - boxes).abs().amax(2)
    distance += 1e3 * (instances.labels[:, None] != labels)
    distance, nearest = distance.min(1)
    return (pasted[nearest] != instances.masks)[distance < 0.1].float().mean().item()
