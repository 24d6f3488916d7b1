"""The Involution2d layer, and as the convolution type of OpenMMLab's modules."""

import itertools

import pytest
import torch
from helpers.operators import assert_compiled_is_equal, involution_loop
from helpers.stack import needs_custom_ops
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils._pytree import tree_flatten

from acmix_mm.analysis.flops import count, total
from acmix_mm.layers import Involution2d
from acmix_mm.layers.base import REST
from acmix_mm.ops import use_backend


@needs_custom_ops
@pytest.mark.parametrize('stride', [1, 2])
def test_compile(stride):
    assert_compiled_is_equal(Involution2d(8, 8, 3, stride=stride, group_channels=4).eval(),
                             torch.randn(2, 8, 9, 7), 'aot_eager')


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 24), st.integers(1, 24)), kernel=st.sampled_from([3, 5, 7]),
       stride=st.integers(1, 4), dilation=st.integers(1, 3), bias=st.booleans())
def test_output_size_is_that_of_a_convolution(size, kernel, stride, dilation, bias):
    arguments = (8, 8, kernel, stride, dilation * (kernel // 2), dilation)
    x = torch.randn(2, 8, *size)
    out = Involution2d(*arguments, bias=bias, group_channels=4)(x)
    assert out.shape == nn.Conv2d(*arguments)(x).shape
    assert out.isfinite().all()


@pytest.mark.parametrize('stride', [1, 2])
def test_kernels_follow_from_the_average_of_each_cell(stride):
    layer = Involution2d(8, 8, 3, stride=stride, group_channels=4, bias=True).double()
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, mean=float('reduce.1' in name))
    layer.reduce[1].running_mean.normal_()
    layer.eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64)
    reduce, norm, _ = layer.reduce
    kernels = torch.empty(2, 2, 3, 3, -(-5 // stride), -(-4 // stride), dtype=torch.float64)
    for row, column in itertools.product(*map(range, kernels.shape[4:])):
        cell = x[..., row * stride:(row + 1) * stride, column * stride:(column + 1) * stride]
        hidden = cell.mean((2, 3)) @ reduce.weight.flatten(1).T
        hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
        hidden = (norm.weight * hidden + norm.bias).relu()
        made = hidden @ layer.span.weight.flatten(1).T + layer.span.bias
        kernels[..., row, column] = made.view(2, 2, 3, 3)
    expected = involution_loop(x, kernels, stride, 1) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('stride', [1, 2])
def test_memory_format_is_kept(stride):
    layer = Involution2d(16, 16, stride=stride, bias=True).double()
    x = torch.randn(2, 16, 13, 17, dtype=torch.float64)
    expected, actual = layer(x), layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)
    assert expected.is_contiguous()
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_half_precision(dtype, stride, dilation):
    layer = Involution2d(16, 16, stride=stride, dilation=dilation, bias=True)
    x = torch.randn(2, 16, 13, 17)
    expected = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < 0.04 * expected.abs().max()
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_autocast():
    layer = Involution2d(16, 16, bias=True)
    x = torch.randn(2, 16, 13, 17)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.04 * expected.abs().max()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_state_dict():
    layer = Involution2d(32, 32)
    shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {'reduce.0.weight': (8, 32, 1, 1), 'reduce.1.weight': (8,),
                      'reduce.1.bias': (8,), 'span.weight': (98, 8, 1, 1), 'span.bias': (98,)}
    assert [Involution2d(width, width).group_channels for width in (24, 12, 96)] == [8, 4, 16]
    other = Involution2d(32, 32)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 32, 6, 7)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(out_channels=32), 'in_channels=16 and out_channels=32 must be equal; put a 1×1'),
    (dict(groups=2), 'no groups, got groups=2; allowed is 1'),
    (dict(kernel_size=4), 'kernel_size must be odd, got 4'),
    (dict(padding=0), 'kernel_size=7 with dilation=1 allows padding=3, got 0'),
    (dict(group_channels=5), 'group_channels must divide in_channels, got group_channels=5 for 16'),
    (dict(reduction=32), 'reduction must divide in_channels, got reduction=32 for 16 channels'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**{**dict(in_channels=16, out_channels=16), **arguments})


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_counts_do_not_depend_on_the_backend(backend):
    """Stride 2 on 7×5: each of the 4×3 outputs generates and applies its kernels."""
    layer = Involution2d(16, 16, 5, stride=2, group_channels=8)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), layer)
    with use_backend(backend):
        counts = count(model, lambda: model(torch.zeros(2, 3, 7, 5)))
    generation = 16 * 4 + 4 * 2 * 25
    assert counts[REST].multiply_adds == 2 * 35 * 3 * 16 + 2 * 12 * (generation + 16 * 25)
    assert total(counts) == counts[REST]
    assert counts[REST].parameters == 3 * 16 + 16 + generation + 2 * 4 + 2 * 25


def test_conv_cfg_builds_involution_or_pointwise_convolution():
    conv_cfg = dict(type='Involution', group_channels=4, reduction=2)
    assert type(build_conv_layer(conv_cfg, 8, 16, 1, bias=False)) is nn.Conv2d
    assert type(build_conv_layer(conv_cfg, 8, 16, kernel_size=(1, 1), stride=2)) is nn.Conv2d
    layer = build_conv_layer(conv_cfg, 8, 8, 3, stride=2, padding=1, bias=False)
    assert isinstance(layer, Involution2d)
    assert (layer.group_channels, layer.span.out_channels, layer.bias) == (4, 18, None)
    module = ConvModule(8, 8, 3, padding=2, dilation=2, conv_cfg=conv_cfg)
    assert module(torch.randn(2, 8, 9, 5)).shape == (2, 8, 9, 5)
    assert module.conv.bias is not None


@pytest.mark.parametrize(('cfg', 'inputs', 'layers'), [
    (dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=3),
     [(2, 8, 20, 13), (2, 16, 10, 7)], 2),
    (dict(type='mmdet.RetinaHead', num_classes=3, in_channels=8, feat_channels=8),
     [(2, 8, size, size) for size in (16, 8, 4, 2, 1)], 8),
    (dict(type='mmdet.FCNMaskHead', in_channels=8, conv_out_channels=8, num_classes=3),
     (5, 8, 14, 14), 4),
    (dict(type='mmdet.Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8,
          fc_out_channels=16, num_classes=3), (5, 8, 7, 7), 4),
    (dict(type='mmseg.FCNHead', in_channels=8, channels=8, num_classes=3, in_index=0,
          dilation=2, concat_input=False), [(2, 8, 9, 13)], 2),
], ids=lambda value: value['type'] if isinstance(value, dict) else None)
def test_conv_cfg_in_necks_and_heads(cfg, inputs, layers):
    """Modules with involution give the same shapes as with convolutions, and train."""
    init_default_scope(cfg['type'].split('.')[0])
    x = ([torch.randn(size) for size in inputs] if isinstance(inputs, list) else
         torch.randn(inputs))
    conv_cfg = dict(type='Involution', group_channels=4)
    plain, involved = MODELS.build(dict(cfg)), MODELS.build(dict(cfg, conv_cfg=conv_cfg))
    built = [module for module in involved.modules() if isinstance(module, Involution2d)]
    assert len(built) == layers
    involved.init_weights()
    expected, actual = (tree_flatten(module(x))[0] for module in (plain, involved))
    assert [each.shape for each in actual] == [each.shape for each in expected]
    sum(each.square().sum() for each in actual).backward()
    assert all(module.span.weight.grad is not None for module in built)


def test_conv_cfg_requires_equal_channels():
    with pytest.raises(ValueError, match='Involution mixes no channels'):
        MODELS.build(dict(type='mmdet.ResNet', depth=50, conv_cfg=dict(type='Involution')))
