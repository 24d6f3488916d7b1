# Baseline: mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['acmix_mm'])
# The convolution paths only approximate the plain 3×3 convolutions, and attention starts untrained.
# Therefore only the stem is frozen, and batch norm statistics are updated, synchronised over all
# GPUs.
model = dict(
    backbone=dict(
        type='ACmixResNet',
        frozen_stages=0,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
