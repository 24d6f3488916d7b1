"""The networks, one file each, registered in MMEngine's root ``MODELS``."""

from .swin import ACmixSwinTransformer

__all__ = ['ACmixSwinTransformer']
