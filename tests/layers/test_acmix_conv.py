"""ACmixConv2d against the published code, and as a replacement of a convolution."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, relative_error
from helpers.operators import DEVICE
from helpers.stack import needs_triton
from helpers.weights import randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from acmix_mm.gpu_check.checks import largest_error
from acmix_mm.layers import ACmixConv2d
from acmix_mm.ops import use_backend
from acmix_mm.ops.backend import raising_kernel_errors
from acmix_mm.ops.position_encoding.reference import coordinates


@pytest.mark.parametrize('name', ['acmix_conv_s1', 'acmix_conv_s2', 'acmix_conv_k5'])
def test_layer_equals_published_code(golden, name):
    fixture = golden(name)
    meta = fixture.meta
    layer = ACmixConv2d(meta['in_channels'], meta['out_channels'], meta['kernel_conv'],
                        meta['stride'], num_heads=meta['head'],
                        attn_kernel_size=meta['kernel_att'])
    layer.load_state_dict(fixture.state_dict())
    x = fixture.array('x', meta['input']).requires_grad_()
    out = layer(x)
    assert relative_error(out, fixture['output']) < 1e-5
    out.backward(fixture.array('grad', out.shape))
    assert relative_error(x.grad, fixture['grad_input']) < 1e-5
    parameters = dict(layer.named_parameters())
    assert {f'grad.{key}' for key in parameters} <= set(fixture)
    for key, parameter in parameters.items():
        expected = fixture[f'grad.{key}']
        # Softmax cancels the bias of the position encoding, so both gradients are rounding errors.
        # The gradient of a rate is a sum over the map of terms that nearly cancel.
        slack = 1e-4 * fixture['grad_input'].abs().max() if key == 'conv_p.bias' else 0
        bound = 1e-3 if key.startswith('rate') else 1e-4
        assert (parameter.grad - expected).abs().max() <= bound * expected.abs().max() + slack, key


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 24), st.integers(1, 24)), kernel=st.sampled_from([3, 5]),
       stride=st.integers(1, 3), dilation=st.integers(1, 3),
       mix=st.sampled_from(['acmix', 'attn', 'conv']), batch=st.integers(1, 2))
def test_output_size_equals_that_of_a_convolution(size, kernel, stride, dilation, mix, batch):
    padding = dilation * (kernel // 2)
    arguments = (4, 8, kernel, stride, padding, dilation)
    x = torch.randn(batch, 4, *size)
    out = ACmixConv2d(*arguments, num_heads=2, attn_kernel_size=5, mix=mix)(x)
    assert out.shape == nn.Conv2d(*arguments)(x).shape
    assert out.isfinite().all()


def solve_for(layer, conv):
    """Set the weights of a three-head ``mix='conv'`` layer so that it equals ``conv``.

    For each head channel, the taps of its outputs, stacked to (heads · 9, in_channels), must factor
    through the 3 · heads maps of that channel, so their rank must be at most nine.
    """
    heads, head_dims = layer.num_heads, conv.out_channels // layer.num_heads
    with torch.no_grad():
        layer.fc.weight.copy_(torch.eye(9)[:, :, None, None])
        for channel in range(head_dims):
            outputs = slice(channel * heads, (channel + 1) * heads)
            stacked = conv.weight[outputs].permute(0, 2, 3, 1).reshape(heads * 9, -1)
            left, values, right = torch.linalg.svd(stacked, full_matrices=False)
            assert values[9:].abs().max() < 1e-10
            projected = right[:9].unflatten(0, (3, heads))
            for projection, rows in zip((layer.conv1, layer.conv2, layer.conv3), projected):
                projection.weight[channel::head_dims] = rows[:, :, None, None]
            taps = (left * values)[:, :9].view(heads, 3, 3, 9).permute(0, 3, 1, 2)
            layer.dep_conv.weight[outputs] = taps


@pytest.mark.parametrize('kernel', ['three taps', 'low rank'])
def test_convolution_path_equals_a_convolution_of_low_rank(kernel):
    conv = nn.Conv2d(11, 12, 3, padding=1, bias=False).double()
    layer = ACmixConv2d(11, 12, 3, num_heads=3, bias=False, mix='conv').double()
    with torch.no_grad():
        if kernel == 'three taps':
            taps = torch.zeros(3, 3)
            taps[0, 2] = taps[1, 0] = taps[2, 2] = 1
            conv.weight.mul_(taps)
        else:
            conv.weight[:, :2] = conv.weight[:, 2:4]
    solve_for(layer, conv)
    x = torch.randn(2, 11, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_half_precision(dtype, stride, dilation):
    layer = ACmixConv2d(8, 16, stride=stride, dilation=dilation)
    x = torch.randn(2, 8, 13, 17)
    expected = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < 0.03
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_autocast():
    layer = ACmixConv2d(8, 16)
    x = torch.randn(2, 8, 13, 17)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), expected) < 0.03
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_positions_are_evenly_spaced_in_half_precision():
    """On a wide map, bfloat16 would round neighbours to steps of 0.65 to 1.31 times the true one.
    """
    layer = ACmixConv2d(8, 16)
    expected = layer.position_encoding((2, 336), torch.empty(0))
    with torch.autocast('cpu', torch.bfloat16):
        mixed = layer.position_encoding((2, 336), torch.empty(0, dtype=torch.bfloat16))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
    half = layer.bfloat16().position_encoding((2, 336), torch.empty(0, dtype=torch.bfloat16))
    assert half.dtype == torch.float32
    steps = half.diff(dim=1)
    torch.testing.assert_close(steps, steps.mean(1, keepdim=True).expand_as(steps), rtol=1e-3,
                               atol=0)


@pytest.mark.parametrize('mix', ['acmix', 'attn', 'conv'])
@pytest.mark.parametrize('stride', [1, 2])
def test_preserves_the_memory_format(stride, mix):
    layer = ACmixConv2d(8, 16, stride=stride, mix=mix).double()
    x = torch.randn(2, 8, 13, 17, dtype=torch.float64)
    expected, actual = layer(x), layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)
    assert expected.is_contiguous()
    assert actual.is_contiguous(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.parametrize(('composition', 'options'), [
    ('composed', {}), ('grouped', dict(stride=2)), ('composed', dict(stride=2, bias=False)),
    ('composed', dict(dilation=2, combine='convex'))])
def test_composed_paths_on_kernels(composition, options):
    """As on GPUs: output and all gradients, in both memory formats."""
    layer = randomised(ACmixConv2d(4, 4, num_heads=2, attn_kernel_size=3, **options)).to(DEVICE)
    x = torch.randn(1, 4, 4, 5, device=DEVICE, requires_grad=True)

    def results(x):
        out = layer(x)
        return [out, *torch.autograd.grad(out.sin().sum(), (x, *layer.parameters()))]

    with use_backend('reference'):
        expecteds = results(x)
    for order in (torch.contiguous_format, torch.channels_last):
        with use_backend('triton'), use_backend(composition), raising_kernel_errors():
            actuals = results(x.contiguous(memory_format=order))
        assert actuals[0].is_contiguous(memory_format=order)
        assert largest_error(actuals, expecteds) < 2e-5


def test_position_maps_are_cached_by_size():
    layer = ACmixConv2d(8, 16)
    # Maps from inference mode also work in training.
    with torch.inference_mode():
        layer(torch.randn(1, 8, 9, 7))
    layer(torch.randn(1, 8, 9, 7)).sum().backward()
    device = torch.device('cpu')
    cached = coordinates(9, 7, torch.float32, device)
    assert coordinates(9, 7, torch.float32, device) is cached
    assert coordinates(9, 7, torch.float64, device).dtype == torch.float64
    grid = coordinates(3, 5, torch.float32, torch.device('cpu'))
    assert grid[0, 0].tolist() == [-1, -1]
    assert grid[2, 4].tolist() == [1, 1]
    assert grid[0, 4].tolist() == [1, -1]


def test_state_dict_round_trip_and_names():
    layer = ACmixConv2d(8, 16)
    names = {f'conv{index}.{kind}' for index in (1, 2, 3) for kind in ('weight', 'bias')}
    names |= {'conv_p.weight', 'conv_p.bias', 'fc.weight', 'dep_conv.weight', 'rate1', 'rate2'}
    assert set(layer.state_dict()) == names
    other = ACmixConv2d(8, 16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 6, 7)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(groups=2), 'no groups, got groups=2; allowed is 1'),
    (dict(num_heads=3), 'num_heads must divide out_channels, got 3 heads for 16 channels'),
    (dict(kernel_size=4), 'kernel_size must be odd, got 4'),
    (dict(attn_kernel_size=6), 'attn_kernel_size must be odd, got 6'),
    (dict(padding=0), 'kernel_size=3 with dilation=1 allows padding=1, got 0'),
    (dict(padding=1, dilation=2), 'dilation=2 allows padding=2, got 1'),
    (dict(kernel_size=(3, 5)), 'kernel_size must be the same along both axes'),
    (dict(stride=(1, 2)), 'stride must be the same along both axes'),
    (dict(mix='all'), 'mix must be one of'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixConv2d(**{**dict(in_channels=8, out_channels=16), **arguments})


class Largest(TorchDispatchMode):
    """Records the largest number of elements in any tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_flatten(results)[0]:
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_no_tensor_is_much_larger_than_the_map(stride, dilation):
    """The published code creates several tensors of 49 times the size of the map."""
    layer = ACmixConv2d(64, 64, stride=stride, dilation=dilation)
    x = torch.randn(1, 64, 96, 160, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert x.numel() < largest.elements <= 10 * x.numel()


def test_memory_at_detection_size():
    """Forward and backward at 64 channels, 200×336, in a separate process."""
    done = subprocess.run([sys.executable, '-c', '''
import re
import torch
from acmix_mm.gpu_check.checks import largest_error
from acmix_mm.layers import ACmixConv2d

def mebibytes(entry):
    with open('/proc/self/status') as status:
        return int(re.search(entry + r':\\s+(\\d+) kB', status.read()).group(1)) / 1024

torch.set_num_threads(2)
layer = ACmixConv2d(64, 64)
layer(torch.randn(1, 64, 16, 16, requires_grad=True)).sum().backward()
x = torch.randn(1, 64, 200, 336, requires_grad=True)
with open('/proc/self/clear_refs', 'w') as peak:
    peak.write('5')
idle = mebibytes('VmRSS')
layer(x).sum().backward()
print(mebibytes('VmHWM') - idle)
'''], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                          check=True)
    assert 50 < float(done.stdout) < 400
