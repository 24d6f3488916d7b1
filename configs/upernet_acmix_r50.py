# Baseline: mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py
_base_ = ['./_base_/acmix_mm.py', 'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py']
custom_imports = dict(imports=['acmix_mm'])
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='ACmixResNet',
        depth=50,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
