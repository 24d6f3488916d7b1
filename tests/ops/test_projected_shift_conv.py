"""The backends of projected_shift_conv against the reference, and the choice between them."""

import functools

import pytest
import torch
from helpers import relative_error
from helpers.operators import TOLERANCE, compare
from helpers.stack import needs_export
from helpers.weights import randomised

from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.ops import projected_shift_conv, use_backend
from acmix_mm.ops.projected_shift_conv import composition, operations

BACKENDS = ('separate', 'composed', 'grouped')


def tensors_of(height, width, heads=3, head_dims=4, kernel_size=3, bias=True, fc_bias=True):
    shifts = kernel_size**2
    return [torch.randn(2, 6, height, width), torch.randn(3 * heads * head_dims, 6) / 6**0.5,
            torch.randn(3 * heads * head_dims) if bias else None,
            torch.randn(shifts, 3 * heads) / (3 * heads)**0.5,
            torch.randn(heads * head_dims, shifts, kernel_size, kernel_size) / shifts,
            torch.randn(shifts) if fc_bias else None]


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('options', [
    dict(height=1, width=1), dict(height=1, width=6, bias=False), dict(height=7, width=5),
    dict(height=6, width=9, fc_bias=False), dict(height=5, width=4, bias=False, fc_bias=False),
    dict(height=5, width=8, heads=2, head_dims=16, kernel_size=5)])
def test_equals_reference(backend, dtype, options):
    for stride, dilation in ((1, 1), (2, 1), (3, 2), (1, 3)):
        if options == dict(height=1, width=1) and stride == 2 and dtype == torch.bfloat16:
            # Torch 2.11 to 2.15 compute the weight gradient from memory that was never written.
            continue
        run = functools.partial(projected_shift_conv, stride=stride, dilation=dilation)
        compare(run, tensors_of(**options), backend, dtype)


@pytest.mark.parametrize('backend', ['composed', 'grouped'])
def test_second_derivatives(backend):
    tensors = [each.double().requires_grad_() for each in tensors_of(3, 4, 2, 2)]
    assert torch.autograd.gradgradcheck(
        functools.partial(projected_shift_conv, backend=backend), tensors, fast_mode=True)


@pytest.mark.parametrize('backend', ['composed', 'grouped'])
def test_float32_under_autocast(backend):
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        leaves = [each.requires_grad_() for each in tensors_of(5, 6)]
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            out = projected_shift_conv(*leaves, backend=backend)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        out.sum().backward()
        results.append([out.float(), *[each.grad for each in leaves]])
    for expected, actual in zip(*results):
        assert actual.dtype == torch.float32
        assert relative_error(actual, expected) < 0.05


@pytest.mark.parametrize(('channels', 'heads', 'cheapest'), [
    (64, 4, 'composed'), (96, 3, 'composed'), (192, 6, 'grouped'), (384, 12, 'grouped'),
    (768, 24, 'grouped')])
def test_operation_counts(channels, heads, cheapest):
    """ACmixConv2d with 64 channels, and the stages of Swin-T."""
    counts = operations(channels, channels // heads, heads, 3 * heads, 3, 1)
    assert min(counts, key=counts.get) == cheapest


def test_projections_are_shared_on_a_cpu():
    assert not composition(torch.zeros(1), 64, 16, 4, 12, 3)
    with use_backend('grouped'):
        assert composition(torch.zeros(1), 64, 16, 4, 12, 3)


@needs_export
def test_exports_read_the_input():
    layer = randomised(WindowACmix(8, 2, 4, mix='conv')).eval()
    x = torch.randn(1, 6, 7, 8)
    program = torch.export.export(layer, (x,))
    assert torch.ops.aten.linear.default not in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)


LAYERS = {
    'window': (lambda **options: WindowACmix(8, 2, 4, shift_size=2, **options), (2, 9, 7, 8)),
    # As on GPUs; also along an axis shorter than the shift, and without biases.
    'window in place': (lambda **options: WindowACmix(8, 2, 4, shift_size=2, **options),
                        (2, 9, 7, 8)),
    'narrow window in place': (
        lambda **options: WindowACmix(8, 2, 4, shift_size=3, qkv_bias=False, **options),
        (2, 1, 9, 8)),
    'sliding': (lambda **options: ACmixConv2d(6, 8, num_heads=2, stride=2, **options),
                (2, 6, 9, 7)),
}


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('backend', ['composed', 'grouped'])
@pytest.mark.parametrize('options', [
    {}, dict(mix='conv'), dict(shift_groups=1), dict(shift='fixed'), dict(shift='tensor'),
    dict(combine='convex')], ids=str)
def test_layers(name, backend, options, monkeypatch):
    """Outputs and the gradients of all parameters, rates included."""
    if name.endswith('in place'):
        for method in ('pads_input', 'rolls_input'):
            monkeypatch.setattr(WindowACmix, method, lambda layer, x: False)
    build, shape = LAYERS[name]
    layer = randomised(build(**options)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    results = []
    for each in ('reference', backend):
        with use_backend(each):
            out = layer(x)
        gradients = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
        results.append([out, *gradients])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_invalid_arguments():
    x, weight, bias, fc_weight, shift_weight, _ = tensors_of(3, 3)
    with pytest.raises(ValueError, match='takes x of shape'):
        projected_shift_conv(x, weight[:, 1:], bias, fc_weight, shift_weight)
    with pytest.raises(ValueError, match='rows'):
        projected_shift_conv(x, weight[1:], bias, fc_weight, shift_weight)
    with pytest.raises(ValueError, match='shifts of the fc'):
        projected_shift_conv(x, weight, bias, fc_weight[1:], shift_weight)
