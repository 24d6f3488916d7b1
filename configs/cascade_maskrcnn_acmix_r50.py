# Plain twin: mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py
_base_ = 'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['acmix_mm'])
# The ACmix layers start untrained, and so do the norms behind them: nothing above the stem is
# frozen, and statistics are learned, over all GPUs.
model = dict(
    backbone=dict(
        type='ACmixResNet',
        frozen_stages=0,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
