# One stage of ACmix-ResNet and a pointwise head, which adds no reach, for the diagnostic tasks.
# A minute on one core is enough. At this width, networks with any other mixer but involution can be
# given as many parameters.
_base_ = './upernet_acmix_r50.py'
crop_size = (72, 72)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        base_channels=34,
        num_heads=1,
        num_stages=1,
        stage_blocks=(2,),
        strides=(1,),
        dilations=(1,),
        out_indices=(0,)),
    decode_head=dict(
        _delete_=True,
        type='FCNHead',
        in_channels=136,
        in_index=0,
        channels=32,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        num_classes=2,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        # Nearly all pixels are ignored.
        loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)),
    auxiliary_head=None)
optim_wrapper = dict(optimizer=dict(lr=3e-3))
metainfo = dict(classes=('black', 'white'), palette=[(0, 0, 0), (255, 255, 255)])
train_dataloader = dict(batch_size=32, dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
# The accuracy alone, whose value at chance is that of a guess.
val_evaluator = dict(iou_metrics=[])
test_evaluator = val_evaluator
