"""The networks, one file each, registered in MMEngine's root ``MODELS``."""

from acmix_mm.backbones.pvt import ACmixPyramidVisionTransformer
from acmix_mm.backbones.resnet import ACmixResNet
from acmix_mm.backbones.san import ACmixSAN
from acmix_mm.backbones.swin import ACmixSwinTransformer

__all__ = ['ACmixPyramidVisionTransformer', 'ACmixResNet', 'ACmixSAN', 'ACmixSwinTransformer']
