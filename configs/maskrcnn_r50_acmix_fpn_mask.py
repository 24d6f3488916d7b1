# ACmix in the FPN and mask head of a plain R50 Mask R-CNN, selected by conv_cfg.
# Baseline: mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['acmix_mm'])
conv_cfg = dict(type='ACmix', num_heads=4)
model = dict(neck=dict(conv_cfg=conv_cfg), roi_head=dict(mask_head=dict(conv_cfg=conv_cfg)))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
