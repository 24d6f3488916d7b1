"""The operators of ACmix, and of baselines, as functions on tensors.

Every operator has a reference implementation of the paper's equations and faster backends, chosen
automatically or by name; see :mod:`acmix_mm.ops.backend`. The package needs torch alone.
"""

from acmix_mm.ops.backend import available_backends, read_environment, use_backend
from acmix_mm.ops.block_attention import BlockPattern, block_attention
from acmix_mm.ops.global_attention import global_attention
from acmix_mm.ops.involution import involution
from acmix_mm.ops.linear import linear, linear_and_map
from acmix_mm.ops.patchwise_attention import patch_aggregation, patch_features
from acmix_mm.ops.path_sum import add_paths
from acmix_mm.ops.path_weights import compose_paths, convolve_composed
from acmix_mm.ops.position_bias import position_bias
from acmix_mm.ops.position_encoding import position_encoding
from acmix_mm.ops.projected_shift_conv import projected_shift_conv
from acmix_mm.ops.projection import project
from acmix_mm.ops.rolling import roll_map
from acmix_mm.ops.shift_conv import shift_conv, shift_sum
from acmix_mm.ops.sliding_attention import sliding_window_attention
from acmix_mm.ops.window_attention import projected_window_attention, window_attention

__all__ = ['BlockPattern', 'add_paths', 'available_backends', 'block_attention', 'compose_paths',
           'convolve_composed', 'global_attention', 'involution', 'linear', 'linear_and_map',
           'patch_aggregation', 'patch_features', 'position_bias', 'position_encoding', 'project',
           'projected_shift_conv', 'projected_window_attention', 'roll_map', 'shift_conv',
           'shift_sum', 'sliding_window_attention', 'use_backend', 'window_attention']

read_environment()
