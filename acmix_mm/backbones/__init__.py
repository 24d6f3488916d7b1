"""The backbones, one file for each host, registered in MMEngine's root ``MODELS``."""

# In the order of the paper's results, which BACKBONES and all tables follow.
# isort: off
from acmix_mm.backbones.resnet import ACmixResNet, ACmixResNetV1c, ACmixResNetV1d
from acmix_mm.backbones.san import ACmixSAN
from acmix_mm.backbones.pvt import (
    ACmixPyramidVisionTransformer,
    ACmixPyramidVisionTransformerV2,
)
from acmix_mm.backbones.swin import ACmixSwinTransformer
# isort: on

__all__ = ['ACmixPyramidVisionTransformer', 'ACmixPyramidVisionTransformerV2', 'ACmixResNet',
           'ACmixResNetV1c', 'ACmixResNetV1d', 'ACmixSAN', 'ACmixSwinTransformer']
