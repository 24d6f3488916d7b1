_base_ = '../../configs/shapes/upernet_acmix_swin.py'
# The toy host by its registered name; everything else comes from the config of the shapes.
model = dict(
    backbone=dict(_delete_=True, type='ACmixToyNet', embed_dims=16, depths=(1, 1)),
    decode_head=dict(type='FCNHead', _delete_=True, in_channels=32, in_index=1, channels=16,
                     num_convs=1, num_classes=4, norm_cfg=dict(type='BN')),
    auxiliary_head=None)
