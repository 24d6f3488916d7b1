# A small dilated ACmix-ResNet instead of the small ACmix-Swin.
_base_ = './upernet_acmix_swin.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ACmixResNet',
        depth=26,
        base_channels=16,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_eval=False),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
