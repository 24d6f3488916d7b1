# ACmix in the neck and head of RTMDet-s, selected by conv_cfg. The backbone and the depthwise
# convolutions of the neck stay plain.
# Baseline: mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
custom_imports = dict(imports=['acmix_mm'])
conv_cfg = dict(type='ACmix', num_heads=4)
model = dict(neck=dict(conv_cfg=conv_cfg), bbox_head=dict(conv_cfg=conv_cfg))
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys=dict(rate1=dict(decay_mult=0.), rate2=dict(decay_mult=0.))))
# For --auto-scale-lr: the learning rate is for 8 GPUs with 32 images each, not for 16 images.
auto_scale_lr = dict(base_batch_size=256)
