# A small ACmix-SAN in the place of the small ACmix-Swin.
_base_ = './maskrcnn_acmix_swin.py'
model = dict(
    backbone=dict(_delete_=True, type='ACmixSAN', depth=10, base_channels=32),
    neck=dict(in_channels=[128, 256, 512, 1024]))
