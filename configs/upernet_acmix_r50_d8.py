# upernet_acmix_r50.py at stride 8: the last two stages are dilated in place of strided.
_base_ = './upernet_acmix_r50.py'
model = dict(backbone=dict(dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1)))
