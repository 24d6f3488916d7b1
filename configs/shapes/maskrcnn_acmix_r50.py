# A small ACmix-ResNet instead of the small ACmix-Swin.
_base_ = './maskrcnn_acmix_swin.py'
model = dict(
    backbone=dict(
        _delete_=True, type='ACmixResNet', depth=50, base_channels=16, norm_eval=False),
    neck=dict(in_channels=[64, 128, 256, 512]))
