"""Random arguments: the backends of an operator agree with its reference, forward and backward."""

import functools

import pytest
import torch
from helpers.operators import (
    aggregation_tensors,
    attend_padded,
    compare,
    conv_tensors,
    features_tensors,
    involution_tensors,
    padded_window_tensors,
    sliding_tensors,
    window_tensors,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from acmix_mm.environment import TORCH_VERSION
from acmix_mm.ops import (
    BlockPattern,
    available_backends,
    block_attention,
    global_attention,
    involution,
    patch_aggregation,
    patch_features,
    shift_conv,
    sliding_window_attention,
    window_attention,
)

few = st.integers(1, 3)


@st.composite
def geometries(draw, kernel_sizes=(3, 5, 7)):
    """A kernel size, a dilation, and the size of a map that reflection can pad."""
    kernel_size, dilation = draw(st.sampled_from(kernel_sizes)), draw(few)
    smallest = dilation * (kernel_size // 2) + 1
    return kernel_size, dilation, [draw(st.integers(smallest, smallest + 12)) for _ in range(2)]


def draw_case(operator, data):
    """The operator with random arguments, and its random inputs."""
    batch, stride, heads, head_dims = (data.draw(few) for _ in range(4))
    kernel_size, dilation, size = data.draw(geometries())
    if operator == 'sliding_window_attention':
        run = functools.partial(sliding_window_attention, kernel_size=kernel_size, stride=stride,
                                dilation=dilation)
        return run, sliding_tensors(batch, heads, head_dims, *size, data.draw(st.booleans()))
    if operator in ('global_attention', 'block_attention'):
        run = functools.partial(global_attention, stride=stride)
        if operator == 'block_attention':
            has_window = data.draw(st.booleans())
            pattern = BlockPattern(stride * data.draw(few), data.draw(st.integers(
                0 if has_window else 1, 4)), data.draw(st.integers(0, 9)),
                data.draw(few), has_window)
            run = functools.partial(block_attention, pattern=pattern, stride=stride)
        return run, sliding_tensors(batch, heads, head_dims, *size, data.draw(st.booleans()))
    if operator == 'window_attention':
        window, grid = (tuple(data.draw(st.integers(1, most)) for _ in range(2)) for most in (5, 4))
        shift = data.draw(st.integers(0, min(window) - 1))
        if data.draw(st.booleans()):
            size = [data.draw(st.integers(1, 3 * side)) for side in window]
            return (attend_padded(window, shift),
                    padded_window_tensors(batch, size, window, heads, head_dims))
        run = functools.partial(window_attention, window_size=window, shift_size=shift)
        return run, window_tensors(batch, grid, window, heads, head_dims)
    if operator == 'shift_conv':
        # In float64, conv2d of torch 2.1 refuses a single kernel that is not contiguous.
        assume(TORCH_VERSION != (2, 1) or heads * head_dims > 1)
        run = functools.partial(shift_conv, stride=stride, dilation=dilation)
        return run, conv_tensors(batch, heads, head_dims, *size, 3, data.draw(st.booleans()),
                                 data.draw(st.booleans()))
    if operator == 'involution':
        run = functools.partial(involution, stride=stride, dilation=dilation)
        return run, involution_tensors(batch, heads, head_dims, *size, kernel_size, stride)
    if operator == 'patch_features':
        run = functools.partial(patch_features, kernel_size=kernel_size)
        return run, features_tensors(batch, heads, *size, kernel_size)
    run = functools.partial(patch_aggregation, kernel_size=kernel_size)
    return run, aggregation_tensors(batch, 2 * heads, *size, kernel_size)


@pytest.mark.parametrize('operator', [
    'sliding_window_attention', 'global_attention', 'block_attention', 'window_attention',
    'shift_conv', 'involution', 'patch_features', 'patch_aggregation'])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_backends_agree(operator, data):
    run, tensors = draw_case(operator, data)
    for backend in available_backends(operator):
        # Triton's interpreter is slow; see test_kernels.
        if backend not in ('reference', 'triton'):
            compare(run, tensors, backend, torch.float64)
