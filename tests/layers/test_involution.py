"""Involution against a loop written from its equations, and the layer against what it replaces."""

import functools
import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.operators import TOLERANCE, assert_compiled_is_equal, compare
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.nn.functional import conv2d
from torch.utils._pytree import tree_leaves

import acmix_mm.layers.involution as layer_module
from acmix_mm.analysis.flops import REST, count, total
from acmix_mm.layers import Involution2d
from acmix_mm.ops import involution

# The package has a function of the same name.
op_module = importlib.import_module('acmix_mm.ops.involution')


def tensors_of(batch, groups, per_group, height, width, kernel_size, stride=1):
    size = [-(-extent // stride) for extent in (height, width)]
    return [torch.randn(batch, groups * per_group, height, width),
            torch.randn(batch, groups, kernel_size, kernel_size, *size)]


def loop(x, kernels, stride, dilation):
    """Equation 4 of the paper for one position, channel and neighbour after the other."""
    batch, channels, height, width = x.shape
    groups, kernel_size, out_height, out_width = kernels.shape[1], *kernels.shape[3:]
    out = torch.zeros(batch, channels, out_height, out_width, dtype=x.dtype)
    for picture, channel, row, column in itertools.product(*map(range, out.shape)):
        group = channel // (channels // groups)
        for u, v in itertools.product(range(kernel_size), repeat=2):
            down = stride * row + dilation * (u - kernel_size // 2)
            across = stride * column + dilation * (v - kernel_size // 2)
            if 0 <= down < height and 0 <= across < width:
                out[picture, channel, row, column] += (
                    kernels[picture, group, u, v, row, column] * x[picture, channel, down, across])
    return out


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize(('height', 'width', 'kernel_size', 'stride', 'dilation'), [
    (1, 1, 3, 1, 1), (2, 1, 5, 2, 1), (4, 5, 3, 1, 1), (5, 4, 3, 2, 1), (4, 3, 3, 1, 2),
    (5, 7, 3, 2, 3), (3, 4, 1, 3, 1)])
def test_equals_the_equation(backend, height, width, kernel_size, stride, dilation):
    tensors = [each.double() for each in tensors_of(2, 2, 2, height, width, kernel_size, stride)]
    results = []
    for run in (loop, functools.partial(involution, backend=backend)):
        leaves = [each.clone().requires_grad_() for each in tensors]
        out = run(*leaves, stride=stride, dilation=dilation)
        cotangent = torch.arange(out.numel()).view_as(out).double().sin()
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('batch', 'groups', 'per_group', 'height', 'width', 'kernel_size'), [
    (1, 1, 1, 1, 1, 7), (2, 2, 8, 1, 12, 7), (1, 4, 4, 3, 2, 7), (2, 1, 16, 9, 8, 5),
    (2, 2, 4, 33, 30, 3)])
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_form_equals_reference(dtype, batch, groups, per_group, height, width, kernel_size, stride,
                               dilation, monkeypatch):
    # Five rows of the largest map at a time.
    monkeypatch.setattr(op_module, 'SUMMED_AT_ONCE', 2 * 8 * 30 * 5)
    tensors = tensors_of(batch, groups, per_group, height, width, kernel_size, stride)
    run = functools.partial(involution, stride=stride, dilation=dilation)
    compare(run, tensors, 'chunked', dtype)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(op_module, 'SUMMED_AT_ONCE', 1)
    for stride, dilation in ((1, 1), (2, 2)):
        leaves = [each.double().requires_grad_() for each in tensors_of(2, 2, 2, 4, 3, 3, stride)]
        assert torch.autograd.gradcheck(
            functools.partial(involution, stride=stride, dilation=dilation), leaves)


def test_same_kernel_everywhere_is_a_convolution():
    x, kernels = torch.randn(2, 6, 7, 5), torch.randn(2, 3, 3)
    out = involution(x, kernels[None, ..., None, None].expand(2, -1, -1, -1, 7, 5))
    depthwise = kernels.repeat_interleave(3, 0).unsqueeze(1)
    torch.testing.assert_close(out, conv2d(x, depthwise, padding=1, groups=6))


def test_takes_an_empty_batch():
    leaves = [each.requires_grad_() for each in tensors_of(0, 2, 2, 4, 3, 3)]
    out = involution(*leaves)
    assert out.shape == (0, 4, 4, 3)
    out.sum().backward()


def test_memory():
    """Forward and backward at 64 channels, 100×168, in a process of its own.

    A copy of the map for each of 49 neighbours takes 201 MiB; the kernels take 13, and so do their
    gradients.
    """
    done = subprocess.run([sys.executable, '-c', '''
import re
import torch
from acmix_mm.ops import involution

def mebibytes(entry):
    with open('/proc/self/status') as status:
        return int(re.search(entry + r':\\s+(\\d+) kB', status.read()).group(1)) / 1024

def run(backend, *size):
    x = torch.randn(1, 64, *size, requires_grad=True)
    kernels = torch.randn(1, 4, 7, 7, *size, requires_grad=True)
    with open('/proc/self/clear_refs', 'w') as peak:
        peak.write('5')
    idle = mebibytes('VmRSS')
    involution(x, kernels, backend=backend).sum().backward()
    return mebibytes('VmHWM') - idle

run('chunked', 16, 16)
print(run('chunked', 100, 168), run('reference', 100, 168))
'''], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                          check=True)
    ours, reference = map(float, done.stdout.split())
    assert 20 < ours < 60
    assert reference > 400


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='cuda'), 'has no backend .cuda.; it has chunked, reference'),
    (dict(x=torch.zeros(4, 5, 6)), 'takes x of shape'),
    (dict(kernels=torch.zeros(1, 18, 5, 6)), r'needs kernels of shape \(1, groups, k, k, 5, 6\)'),
    (dict(kernels=torch.zeros(1, 3, 3, 3, 5, 6)), 'groups dividing 4'),
    (dict(kernels=torch.zeros(1, 0, 3, 3, 5, 6)), 'groups dividing 4'),
    (dict(stride=2), r'\(1, groups, k, k, 3, 3\)'),
    (dict(kernels=torch.zeros(1, 2, 4, 4, 5, 6)), 'takes odd kernels, got some of 4'),
])
def test_operator_refuses(change, message):
    given = dict(zip(('x', 'kernels'), tensors_of(1, 2, 2, 5, 6, 3)))
    with pytest.raises(ValueError, match=message):
        involution(**{**given, **change})


def test_operator_is_registered_rightly():
    operators, opcheck = torch.ops.acmix_mm, torch.library.opcheck
    for stride in (1, 2):
        x, kernels = tensors_of(2, 2, 2, 5, 4, 3, stride)
        grad = torch.randn(x[:, :, ::stride, ::stride].shape)
        for each in (x, x.contiguous(memory_format=torch.channels_last)):
            opcheck(operators.involve_by_offset.default, (each, kernels, stride, 1))
            opcheck(operators.involve_by_offset_backward.default, (grad, each, kernels, stride, 1))


@pytest.mark.parametrize('stride', [1, 2])
def test_layer_compiles(stride):
    assert_compiled_is_equal(Involution2d(8, 8, 3, stride=stride, group_channels=4).eval(),
                             torch.randn(2, 8, 9, 7), 'aot_eager')


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 24), st.integers(1, 24)), kernel=st.sampled_from([3, 5, 7]),
       stride=st.integers(1, 4), dilation=st.integers(1, 3), bias=st.booleans())
def test_has_the_output_size_of_the_convolution(size, kernel, stride, dilation, bias):
    arguments = (8, 8, kernel, stride, dilation * (kernel // 2), dilation)
    x = torch.randn(2, 8, *size)
    out = Involution2d(*arguments, bias=bias, group_channels=4)(x)
    assert out.shape == nn.Conv2d(*arguments)(x).shape
    assert out.isfinite().all()


@pytest.mark.parametrize('stride', [1, 2])
def test_layer_makes_each_kernel_from_the_average_of_what_it_stands_for(stride):
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
    expected = loop(x, kernels, stride, 1) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('stride', [1, 2])
def test_keeps_the_memory_format_as_a_convolution_does(stride):
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


def test_state_dict_round_trip_and_names():
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
def test_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Involution2d(**{**dict(in_channels=16, out_channels=16), **arguments})


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
def test_counts_alike_in_every_form(backend, monkeypatch):
    """Stride 2 on 7×5: 4×3 outputs, each of which makes and applies its kernels."""
    monkeypatch.setattr(layer_module, 'involution', functools.partial(involution, backend=backend))
    layer = Involution2d(16, 16, 5, stride=2, group_channels=8)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), layer)
    counts = count(model, lambda: model(torch.zeros(2, 3, 7, 5)))
    made = 16 * 4 + 4 * 2 * 25
    assert counts[REST].multiply_adds == 2 * 35 * 3 * 16 + 2 * 12 * (made + 16 * 25)
    assert total(counts) == counts[REST]
    assert counts[REST].parameters == 3 * 16 + 16 + made + 2 * 4 + 2 * 25


def test_conv_cfg_builds_involution_and_plain_pointwise_convolutions():
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
def test_serves_as_conv_cfg_where_channels_stay(cfg, inputs, layers):
    """Each module builds with involution, computes what its plain twin's shapes say, and trains."""
    init_default_scope(cfg['type'].split('.')[0])
    x = ([torch.randn(size) for size in inputs] if isinstance(inputs, list) else
         torch.randn(inputs))
    conv_cfg = dict(type='Involution', group_channels=4)
    plain, ours = MODELS.build(dict(cfg)), MODELS.build(dict(cfg, conv_cfg=conv_cfg))
    built = [module for module in ours.modules() if isinstance(module, Involution2d)]
    assert len(built) == layers
    ours.init_weights()
    expected, actual = (tree_leaves(module(x)) for module in (plain, ours))
    assert [each.shape for each in actual] == [each.shape for each in expected]
    sum(each.square().sum() for each in actual).backward()
    assert all(module.span.weight.grad is not None for module in built)


def test_conv_cfg_is_refused_where_channels_change():
    with pytest.raises(ValueError, match='Involution mixes no channels'):
        MODELS.build(dict(type='mmdet.ResNet', depth=50, conv_cfg=dict(type='Involution')))
