"""What the backends of projected_shift_conv cost on a GPU, to choose between them."""

import math

# One multiplication outside of tensor cores takes as long as this many on them: an H200 multiplies
# 297 T pairs a second at 60 % of its peak in bfloat16; the Triton kernels of shift_conv 9.3 T, by
# their instruction count.
PLAIN = 32
# Reading or writing a value takes as long as this many: 2 bytes at 4 TB/s.
VALUE = 150
# Channels of a head that a grouped convolution takes as one group. Tensor cores multiply matrices
# whose sides are multiples of 8.
GROUP = 8


def group_size(head_dims: int) -> int:
    """The number of channels of a head in one group of the backend ``'grouped'``."""
    return math.gcd(head_dims, GROUP)


def operations(in_channels: int, head_dims: int, num_heads: int, num_maps: int, kernel_size: int,
               stride: int) -> dict[str, int]:
    """Count the operations of each backend for one position of the output.

    Multiplications on tensor cores count as one; others, and memory accesses, by the time they
    take. The projections count as free for ``'separate'``, because attention needs them, too.

    Args:
        in_channels: channels of the input.
        head_dims: channels of a head.
        num_heads: number of output heads.
        num_maps: number of projected maps.
        kernel_size: k.
        stride: distance between the positions of the output.
    """
    channels, projected, taps = head_dims * num_heads, head_dims * num_maps, kernel_size**2
    # Projections, the fc and the maps in between cover all positions.
    positions = stride**2
    mixed = taps * head_dims
    dense = taps * in_channels * channels
    grouped = positions * in_channels * mixed + taps**2 * group_size(head_dims) * channels
    separate = min(taps * num_maps * channels, positions * taps * projected + taps**2 * channels)
    return {'composed': dense + VALUE * positions * in_channels,
            'grouped': grouped + VALUE * positions * (in_channels + 2 * mixed),
            'separate': PLAIN * separate + VALUE * positions * projected}
