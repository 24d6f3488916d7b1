"""The networks, one file each, registered in MMEngine's root ``MODELS``."""

from .pvt import ACmixPyramidVisionTransformer
from .resnet import ACmixResNet
from .san import ACmixSAN
from .swin import ACmixSwinTransformer

__all__ = ['ACmixPyramidVisionTransformer', 'ACmixResNet', 'ACmixSAN', 'ACmixSwinTransformer']
