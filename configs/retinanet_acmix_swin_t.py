# Baseline: mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py
_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'
custom_imports = dict(imports=['acmix_mm'])
model = dict(backbone=dict(type='ACmixSwinTransformer'))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
