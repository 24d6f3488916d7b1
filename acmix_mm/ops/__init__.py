"""Operators of ACmix as functions on tensors, each beside a reference that follows the paper.

They need torch alone.
"""

from .shift_conv import shift_conv
from .window_attention import window_attention

__all__ = ['shift_conv', 'window_attention']
