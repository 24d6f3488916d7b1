"""Operators as functions on tensors, each beside a reference that follows the paper.

Those of ACmix, and involution, which it is compared with. They need torch alone.
"""

from .involution import involution
from .patchwise_attention import patch_aggregation, patch_features
from .projections import project
from .shift_conv import shift_conv, shift_sum
from .sliding_attention import sliding_window_attention
from .window_attention import window_attention

__all__ = ['involution', 'patch_aggregation', 'patch_features', 'project', 'shift_conv',
           'shift_sum', 'sliding_window_attention', 'window_attention']
