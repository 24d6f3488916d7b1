"""The RetinaNet of the base config with a small ACmix-Swin, in MMEngine's pure Python style."""

from mmengine.config import read_base

with read_base():
    from .retinanet import *

from acmix_mm.backbones import ACmixSwinTransformer

model.backbone = dict(
    type=ACmixSwinTransformer,
    embed_dims=12,
    depths=[1, 1, 1, 1],
    num_heads=[3, 3, 6, 12],
    window_size=4)
model.neck.update(in_channels=[12, 24, 48, 96])
