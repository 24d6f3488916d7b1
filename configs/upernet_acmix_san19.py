# Baseline: mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py with a SAN-19 backbone.
# Trained from scratch: no ACmix-SAN weights are published. To start from the SAN authors' plain
# san19_patchwise, pass --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = ['./_base_/acmix_mm.py', 'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py']
custom_imports = dict(imports=['acmix_mm'])
model = dict(
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='ACmixSAN',
        depth=19,
        norm_cfg=dict(type='SyncBN', requires_grad=True)))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
