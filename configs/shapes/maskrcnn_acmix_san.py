# A small ACmix-SAN instead of the small ACmix-Swin. Its attention has no softmax and depends on
# batch norm statistics, so that batches are larger here.
_base_ = './maskrcnn_acmix_swin.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ACmixSAN',
        depth=10,
        base_channels=32,
        norm_cfg=dict(type='BN', momentum=0.03)),
    neck=dict(in_channels=[128, 256, 512, 1024]))
train_dataloader = dict(batch_size=4)
