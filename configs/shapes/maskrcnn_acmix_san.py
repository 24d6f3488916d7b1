# A small ACmix-SAN in the place of the small ACmix-Swin. Its attention has no softmax and relies
# on what its batch norms have learned of pictures: they see more of them here.
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
