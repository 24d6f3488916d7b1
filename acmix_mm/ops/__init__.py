"""Operators as functions on tensors, each beside a reference that follows the paper.

Those of ACmix, and involution, which it is compared with. They need torch alone.
"""

from acmix_mm.ops.involution import involution
from acmix_mm.ops.patchwise_attention import patch_aggregation, patch_features
from acmix_mm.ops.projection import project
from acmix_mm.ops.shift_conv import shift_conv, shift_sum
from acmix_mm.ops.sliding_attention import sliding_window_attention
from acmix_mm.ops.window_attention import window_attention

__all__ = ['involution', 'patch_aggregation', 'patch_features', 'project', 'shift_conv',
           'shift_sum', 'sliding_window_attention', 'window_attention']
