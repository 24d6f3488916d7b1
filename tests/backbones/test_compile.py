"""torch.compile keeps each operator as one custom op and computes the same."""

import pytest
import torch
from helpers.operators import (
    DEVICE,
    assert_compiled_is_equal,
    conv_tensors,
    encoding_tensors,
    padded_window_tensors,
    sliding_tensors,
    sum_tensors,
    weights_tensors,
)
from helpers.stack import needs_custom_ops

from acmix_mm.backbones import ACmixResNet, ACmixSwinTransformer
from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.layers.window_acmix import relative_position_index
from acmix_mm.ops import use_backend

pytestmark = needs_custom_ops


@pytest.mark.parametrize(('layer', 'shape'), [
    (lambda: WindowACmix(12, 3, window_size=7, shift_size=3), (1, 16, 21, 12)),
    (lambda: ACmixConv2d(4, 8, stride=2), (1, 4, 19, 16)),
])
def test_layers_compile_to_code(layer, shape):
    assert_compiled_is_equal(layer(), torch.randn(shape), 'inductor')


@pytest.mark.parametrize('backbone', [
    lambda: ACmixSwinTransformer(embed_dims=24, depths=(2, 2), num_heads=(3, 12), strides=(4, 2),
                                 out_indices=(0, 1), drop_path_rate=0.),
    lambda: ACmixResNet(26, base_channels=8, stage_blocks=(1, 1, 1, 1),
                        norm_cfg=dict(type='GN', num_groups=4)),
])
def test_backbones_are_one_graph(backbone):
    module = backbone()
    module.init_weights()
    assert_compiled_is_equal(module, torch.randn(1, 3, 64, 80), 'aot_eager')


def test_attention_that_pads_in_place_compiles():
    """The Triton kernels' custom op, and its backward pass, in a graph."""
    layer = WindowACmix(8, 2, 4, shift_size=2, mix='attn').to(DEVICE)
    with use_backend('triton'):
        assert_compiled_is_equal(layer, torch.randn(1, 5, 4, 8, device=DEVICE), 'aot_eager')


@pytest.mark.parametrize(('layer', 'shape', 'composition'), [
    (lambda: WindowACmix(4, 2, 3, shift_size=1), (1, 4, 5, 4), 'composed'),
    (lambda: ACmixConv2d(4, 4, num_heads=1, attn_kernel_size=3), (1, 4, 3, 4), 'grouped'),
])
def test_composed_paths_compile(layer, shape, composition):
    """As on GPUs: all kernels are custom ops, with backward passes, of one graph."""
    with use_backend('triton'), use_backend(composition):
        assert_compiled_is_equal(layer().to(DEVICE), torch.randn(shape, device=DEVICE), 'aot_eager')


def test_operators_are_custom_ops():
    """The backends for exports, which are written out, are not selected."""
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    for layer, shape in ((WindowACmix(12, 3, window_size=7, shift_size=3), (1, 16, 21, 12)),
                         (ACmixConv2d(4, 8), (1, 4, 19, 16))):
        torch._dynamo.reset()
        torch.compile(layer.requires_grad_(False), backend=backend, fullgraph=True)(
            torch.randn(shape))
    assert {'acmix_mm.attend_windows.default', 'acmix_mm.attend_tiled.default'} <= targets


def test_custom_ops_are_registered_correctly():
    """Shapes, strides and schema are those promised to the compiler."""
    operators, opcheck = torch.ops.acmix_mm, torch.library.opcheck
    qkv, bias, padding = padded_window_tensors(2, (12, 21), (7, 7), 2, 4)
    geometry = [7, 7], 3, 0.5
    for each in (qkv, heads_last(qkv)):
        opcheck(operators.attend_windows.default, (each, bias, padding, *geometry))
        opcheck(operators.attend_windows_backward.default,
                (torch.randn(2, 12, 21, 8), each, bias.transpose(1, 2), padding, *geometry))

    qkv, bias, padding = (
        tensor.to(DEVICE) for tensor in padded_window_tensors(1, (2, 4), (2, 3), 1, 4))
    grad, geometry = torch.randn(1, 2, 4, 4, device=DEVICE), ([2, 3], 1, True, False, 0.5)
    for each in (qkv, heads_last(qkv)):
        inputs = each, bias.transpose(1, 2), padding
        opcheck(operators.attend_windows_triton.default, (*inputs, *geometry))
        _, biases = operators.attend_windows_triton(*inputs, *geometry)
        opcheck(operators.attend_windows_triton_backward.default,
                (grad, *inputs, biases, *geometry))

    qkv, positions = (tensor.to(DEVICE) for tensor in sliding_tensors(1, 1, 4, 5, 4))
    grad, geometry = torch.randn(1, 3, 2, 1, 4, device=DEVICE), (3, 2, 1, 0.5)
    for each in (qkv, heads_last(qkv)):
        inputs = each, positions
        opcheck(operators.attend_tiled.default, (*inputs, *geometry))
        opcheck(operators.attend_tiled_backward.default, (grad, *inputs, *geometry))
        opcheck(operators.attend_triton.default, (*inputs, *geometry))
        results = operators.attend_triton(*inputs, *geometry)
        opcheck(operators.attend_triton_backward.default, (grad, *inputs, *results, *geometry))

    maps, _, kernels, _ = conv_tensors(1, 3, 2, 2, 2, 3, False, True)
    groups, kernels = maps.permute(0, 3, 4, 2, 1).to(DEVICE), kernels.to(DEVICE)
    bias = torch.randn(6, 2, 2, device=DEVICE)
    for groups_last in (True, False):
        opcheck(operators.convolve_triton.default, (groups, kernels, bias, 1, 1, groups_last))
    opcheck(operators.convolve_triton_backward.default,
            (torch.randn(1, 2, 2, 2, 3, device=DEVICE), groups, kernels, 1, 1))


def test_small_custom_ops_are_registered_correctly():
    operators, opcheck = torch.ops.acmix_mm, torch.library.opcheck
    for exists, is_grouped in ((True, False), (True, True), (False, False)):
        tensors = on_device(weights_tensors(3, 1, 2, 3, *[exists] * 4))
        opcheck(operators.compose_paths_kernels.default, (*tensors, torch.float16, is_grouped))
        outs = operators.compose_paths_kernels(*tensors, torch.float16, is_grouped)
        grads = [torch.randn_like(each) if each.numel() else None for each in outs]
        opcheck(operators.compose_paths_kernels_backward.default, (*grads, *tensors, is_grouped))
    for taps in (3, None):
        maps, other, taps = on_device(sum_tensors(1, 2, 3, 4, taps))
        for channels_first in (False, True):
            opcheck(operators.add_paths_kernels.default,
                    (maps, other, taps, [2, 3], 1, 1, 1, channels_first))
        opcheck(operators.add_paths_kernels_backward.default,
                (maps, taps, [2, 3], 1, 1, 1, True))
    taps = torch.randn(4, 9, device=DEVICE)
    opcheck(operators.add_paths_kernels_backward.default,
            (maps, taps, [2, 3], 1, 1, 0, False))
    weight, bias = on_device(encoding_tensors(4))
    opcheck(operators.encode_positions.default, (weight, bias, 2, 3))
    opcheck(operators.encode_positions_backward.default, (maps[0], weight, bias))
    opcheck(operators.roll_map_kernel.default, (maps, -1, torch.float16))
    table, index = torch.randn(25, 2, device=DEVICE), relative_position_index(3).to(DEVICE)
    opcheck(operators.read_position_bias.default, (table, index, [2, 3]))
    opcheck(operators.read_position_bias_backward.default,
            (torch.randn(2, 6, 6, device=DEVICE), table, index, [2, 3]))


def on_device(tensors):
    return [None if each is None else each.to(DEVICE) for each in tensors]


def heads_last(qkv):
    """The same tensor in the strides of projections on a CPU."""
    return qkv.permute(0, 1, 2, 5, 3, 4).contiguous().permute(0, 1, 2, 4, 5, 3)
