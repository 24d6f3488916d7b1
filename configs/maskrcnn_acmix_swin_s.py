# Baseline: that of Swin-T with depths [2, 2, 18, 2]; MMDetection has no 1x config of Swin-S.
_base_ = './maskrcnn_acmix_swin_t.py'
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        depths=[2, 2, 18, 2], init_cfg=dict(type='Pretrained', checkpoint=pretrained)))
