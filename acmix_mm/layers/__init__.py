"""Modules built on the operators, one for each kind of host. They need torch alone."""

from .acmix_conv import ACmixConv2d, acmix_or_pointwise
from .reduced_acmix import ReducedACmix
from .window_acmix import WindowACmix

__all__ = ['ACmixConv2d', 'ReducedACmix', 'WindowACmix', 'acmix_or_pointwise']
