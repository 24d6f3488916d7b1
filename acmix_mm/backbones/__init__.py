"""The networks, one file each, registered in MMEngine's root ``MODELS``."""

from .resnet import ACmixResNet
from .swin import ACmixSwinTransformer

__all__ = ['ACmixResNet', 'ACmixSwinTransformer']
