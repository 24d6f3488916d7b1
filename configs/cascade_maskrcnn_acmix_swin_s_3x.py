# Baseline: the Swin authors' cascade_mask_rcnn_swin_small_patch4_window7_mstrain_480-800_giou_
# 4conv1f_adamw_3x_coco.
_base_ = './cascade_maskrcnn_acmix_swin_t_3x.py'
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
model = dict(
    backbone=dict(depths=(2, 2, 18, 2), init_cfg=dict(type='Pretrained', checkpoint=pretrained)))
