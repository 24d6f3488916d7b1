"""A small RetinaNet on generated shapes, written like MMDetection's pure Python configs."""

from mmcv.ops import nms
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models import (
    FPN,
    DetDataPreprocessor,
    FocalLoss,
    L1Loss,
    ResNet,
    RetinaHead,
    RetinaNet,
)
from mmdet.models.task_modules import (
    AnchorGenerator,
    DeltaXYWHBBoxCoder,
    MaxIoUAssigner,
    PseudoSampler,
)
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import DefaultSampler
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from torch.optim import AdamW

default_scope = None
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, pad_size_divisor=32),
    backbone=dict(type=ResNet, depth=18),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=16, num_outs=5),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=80,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        anchor_generator=dict(type=AnchorGenerator, scales=[4], ratios=[1.],
                              strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss),
        loss_bbox=dict(type=L1Loss)),
    train_cfg=dict(assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4),
                   sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1),
    test_cfg=dict(nms_pre=100, score_thr=0., nms=dict(type=nms, iou_threshold=0.5),
                  max_per_img=10))

data_root = 'data/coco/'
pipeline = [dict(type=LoadImageFromFile), dict(type=LoadAnnotations, with_bbox=True),
            dict(type=Resize, scale=(64, 64), keep_ratio=True), dict(type=PackDetInputs)]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=CocoDataset, data_root=data_root, pipeline=pipeline,
                 ann_file='annotations/instances_train2017.json',
                 data_prefix=dict(img='train2017/')))
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=CocoDataset, data_root=data_root, pipeline=pipeline, test_mode=True,
                 ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/')))
test_dataloader = val_dataloader
val_evaluator = dict(
    type=CocoMetric, ann_file=data_root + 'annotations/instances_val2017.json', metric='bbox')
test_evaluator = val_evaluator

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
param_scheduler = [dict(type=LinearLR, start_factor=0.1, by_epoch=False, begin=0, end=2)]
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=DetVisualizationHook))
visualizer = dict(type=DetLocalVisualizer, name='visualizer',
                  vis_backends=[dict(type=LocalVisBackend)])
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
