# A small ACmix-PVT instead of the small ACmix-Swin.
_base_ = './maskrcnn_acmix_swin.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ACmixPyramidVisionTransformer',
        pretrain_img_size=192,
        embed_dims=16,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.),
    neck=dict(in_channels=[16, 32, 80, 128]))
