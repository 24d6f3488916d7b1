# A small ACmix-Swin UperNet for tools/make_shapes.py's data; trains in minutes on two CPU cores.
_base_ = '../upernet_acmix_swin_t.py'

crop_size = (192, 192)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        embed_dims=24,
        depths=[2, 2, 2, 2],
        num_heads=[3, 3, 6, 12],
        drop_path_rate=0.,
        init_cfg=None),
    decode_head=dict(in_channels=[24, 48, 96, 192], channels=64, num_classes=4),
    auxiliary_head=dict(in_channels=96, channels=32, num_classes=4))

data_root = 'data/shapes/'
metainfo = dict(
    classes=('background', 'circle', 'square', 'triangle'),
    palette=[(0, 0, 0), (220, 20, 60), (0, 160, 60), (30, 90, 255)])
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True)]
train_pipeline = [*load, dict(type='RandomFlip', prob=0.5), dict(type='PackSegInputs')]
test_pipeline = [*load, dict(type='PackSegInputs')]
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo,
               reduce_zero_label=True)
train_dataloader = dict(batch_size=4, num_workers=2,
                        dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(num_workers=2, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader

max_iters = 1000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', power=1.0, by_epoch=False, begin=30, end=max_iters),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=max_iters))
