# Baseline: mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py with a Swin-T backbone, and with the drop
# path rate of detrex's DINO with Swin-T. MMDetection has only DINO with Swin-L.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['acmix_mm'])
pretrained = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ACmixSwinTransformer',
        drop_path_rate=0.1,
        out_indices=(1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    neck=dict(in_channels=[192, 384, 768]))
# The baseline trains the backbone at a tenth of the learning rate. The convolution paths and the
# rates, which the checkpoint of a plain Swin lacks, train at the full one.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'attn.w_msa.fc': dict(lr_mult=1.),
            'attn.w_msa.dep_conv': dict(lr_mult=1.),
            'attn.w_msa.rate': dict(lr_mult=1., decay_mult=0.)
        }))
