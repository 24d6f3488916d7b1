# Baseline: mmdet::retinanet/retinanet_r50_fpn_1x_coco.py with a SAN-19 backbone.
# Trained from scratch: no ACmix-SAN weights are published. To start from the SAN authors' plain
# san19_patchwise, pass --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['acmix_mm'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='ACmixSAN',
        depth=19,
        norm_cfg=dict(type='SyncBN', requires_grad=True)))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
