# upernet_acmix_r50.py at stride 8: the last two stages are dilated instead of strided.
# Baseline: mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py, dilated as here.
_base_ = './upernet_acmix_r50.py'
model = dict(backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1)))
