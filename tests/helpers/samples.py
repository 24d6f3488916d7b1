"""Inputs for whole models."""

import torch
from mmengine.structures import InstanceData, PixelData


def image_sample(cfg, height=96, width=72):
    """An image of two boxes and its ground truth, in the data structure that the model expects."""
    meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
                scale_factor=(1.0, 1.0), img_path='', img_id=0)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    boxes = torch.tensor([[8., 8., 40., 40.], [30., 50., 66., 90.]])
    labels = torch.tensor([0, 1])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.int().tolist()):
        mask[box[1]:box[3], box[0]:box[2]] = 1
    image[:, masks.any(0).bool()] = 200
    if cfg.default_scope == 'mmseg':
        from mmseg.structures import SegDataSample
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=(masks[0] + 2 * masks[1]).long()[None])
        return image, sample
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
    # RTMDet assigns boxes by masks, as tensors, if there are any.
    if cfg.model.type != 'RTMDet':
        sample.gt_instances.masks = BitmapMasks(masks.numpy(), height, width)
    return image, sample
