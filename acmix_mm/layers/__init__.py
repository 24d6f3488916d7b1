"""Modules built on the operators. They only need torch."""

from acmix_mm.layers.acmix_conv import ACmixConv2d, acmix_or_pointwise
from acmix_mm.layers.involution import Involution2d, involution_or_pointwise
from acmix_mm.layers.linear import Linear
from acmix_mm.layers.patchwise_acmix import PatchwiseACmix
from acmix_mm.layers.pattern_acmix import (
    PatternACmix,
    PatternACmixConv2d,
    pattern_or_pointwise,
)
from acmix_mm.layers.reduced_acmix import ReducedACmix
from acmix_mm.layers.window_acmix import WindowACmix

__all__ = ['ACmixConv2d', 'Involution2d', 'Linear', 'PatchwiseACmix', 'PatternACmix',
           'PatternACmixConv2d', 'ReducedACmix', 'WindowACmix', 'acmix_or_pointwise',
           'involution_or_pointwise', 'pattern_or_pointwise']
