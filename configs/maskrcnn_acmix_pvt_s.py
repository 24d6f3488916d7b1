# Baseline: mask_rcnn_pvt_s_fpn_1x_coco.py of PVT's authors.
_base_ = './maskrcnn_acmix_pvt_t.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
model = dict(
    backbone=dict(
        num_layers=[3, 4, 6, 3], init_cfg=dict(type='Pretrained', checkpoint=pretrained)))
