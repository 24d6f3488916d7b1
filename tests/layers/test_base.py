"""What all layers report about themselves, and the two paths of the ACmix layers.

Also what holds for every layer: second derivatives and empty batches.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers.weights import randomised
from torch import nn

from acmix_mm.layers import (
    ACmixConv2d,
    Involution2d,
    PatchwiseACmix,
    PatternACmix,
    PatternACmixConv2d,
    ReducedACmix,
    WindowACmix,
)
from acmix_mm.layers.attention_pattern import GlobalPattern, bigbird_pattern
from acmix_mm.layers.base import (
    ATTENTION,
    COMBINATIONS,
    CONVOLUTION,
    MIXES,
    OPERATOR_CLASSES,
    PROJECTIONS,
    REST,
    OperatorLayer,
    PointAttention,
    TwoPathLayer,
)
from acmix_mm.ops import use_backend

TWO_PATHS = {
    'window': (lambda **options: WindowACmix(8, 2, 4, shift_size=2, **options), (1, 9, 14, 8)),
    'one window': (lambda **options: WindowACmix(8, 2, 7, shift_size=3, **options), (1, 5, 6, 8)),
    'sliding': (lambda **options: ACmixConv2d(6, 8, num_heads=2, **options), (1, 6, 9, 14)),
    'strided': (lambda **options: ACmixConv2d(6, 8, num_heads=2, stride=2, **options),
                (1, 6, 9, 14)),
    'reduced': (lambda **options: ReducedACmix(8, 2, sr_ratio=4, **options), (1, 9, 14, 8)),
    'patch-wise': (lambda **options: PatchwiseACmix(32, 2, 16, 7, **options), (1, 32, 9, 14)),
    'global': (lambda **options: PatternACmix(8, 2, GlobalPattern(), **options), (1, 9, 14, 8)),
    'bigbird': (lambda **options: PatternACmixConv2d(
        6, 8, num_heads=2, stride=2, pattern=bigbird_pattern(2), **options), (1, 6, 9, 14)),
}
LAYERS = {**TWO_PATHS, 'involution': (lambda: Involution2d(16, 16, stride=2), (1, 16, 9, 14))}
MIN_DYNAMIC_SIZES = {'window': 5, 'one window': 8, 'sliding': 2, 'strided': 2, 'reduced': 8,
                     'patch-wise': 2, 'global': 2, 'bigbird': 2, 'involution': 2}


@pytest.mark.parametrize('name', TWO_PATHS)
@pytest.mark.parametrize('combine', COMBINATIONS)
@torch.no_grad()
def test_path_outputs_sum_to_the_output(name, combine):
    build, shape = TWO_PATHS[name]
    layer, x = build(combine=combine).eval(), torch.randn(shape)
    for rate, value in (('rate1', 0.75), ('rate2', -1.5)):
        if hasattr(layer, rate):
            getattr(layer, rate).fill_(value)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    attention, convolution = layer.path_outputs(x)
    out = layer(x)
    assert attention.shape == convolution.shape == out.shape
    torch.testing.assert_close(attention + convolution, out)
    assert attention.abs().max() > 0
    assert convolution.abs().max() > 0
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize('name', TWO_PATHS)
@torch.no_grad()
def test_path_outputs_equal_single_path_layers(name):
    build, shape = TWO_PATHS[name]
    layer, x = build(combine='sum').eval(), torch.randn(shape)
    for mix, path in zip(('attn', 'conv'), layer.path_outputs(x)):
        alone = build(mix=mix).eval()
        alone.load_state_dict({key: layer.state_dict()[key] for key in alone.state_dict()})
        torch.testing.assert_close(path, alone(x))


@pytest.mark.parametrize('name', TWO_PATHS)
def test_mix_is_never_mutated(name, monkeypatch):
    build, shape = TWO_PATHS[name]
    layer, x = build().eval(), torch.randn(shape)

    def refuse(self, attribute, value):
        raise AssertionError(f'{attribute} is set after construction')

    monkeypatch.setattr(type(layer), '__setattr__', refuse)
    layer(x)
    layer.path_outputs(x)
    layer.attention_of_point(x, 2, 1)
    assert layer.mix == 'acmix'


@pytest.mark.parametrize('name', TWO_PATHS)
@pytest.mark.parametrize('mix', MIXES)
def test_which_paths_there_are(name, mix):
    build, shape = TWO_PATHS[name]
    layer, x = build(mix=mix).eval(), torch.randn(shape)
    assert isinstance(layer, TwoPathLayer)
    assert (layer.attends, layer.convolves) == (mix != 'conv', mix != 'attn')
    assert hasattr(layer, 'rate1') == (mix == 'acmix')
    reported = layer.multiply_adds(x, layer(x))
    assert set(reported) == {PROJECTIONS, *[ATTENTION] * layer.attends,
                             *[CONVOLUTION] * layer.convolves}
    if mix != 'acmix':
        with pytest.raises(ValueError, match=f"mix='{mix}' has one path only"):
            layer.path_outputs(x)
    if mix == 'conv':
        with pytest.raises(ValueError, match="mix='conv' does not attend"):
            layer.attention_of_point(x, 0, 0)
    else:
        attention = layer.attention_of_point(x, 1, 2)
        assert isinstance(attention, PointAttention)
        assert attention.weights.dim() == 3


@pytest.mark.parametrize('name', LAYERS)
def test_what_layers_report(name):
    build, shape = LAYERS[name]
    layer, x = build().eval(), torch.randn(shape)
    assert isinstance(layer, OperatorLayer)
    assert layer.channels_last == isinstance(
        layer, (WindowACmix, ReducedACmix, PatternACmix))
    assert layer.map_size(x) == (shape[1:3] if layer.channels_last else shape[2:])
    assert layer.min_dynamic_size == MIN_DYNAMIC_SIZES[name]

    out = layer(x)
    reported = layer.multiply_adds(x, out)
    assert set(reported) <= set(OPERATOR_CLASSES)
    assert all(isinstance(number, int) and number > 0 for number in reported.values())
    # Shapes are enough.
    assert layer.multiply_adds(x.to('meta'), out.to('meta')) == reported
    elementwise = layer.elementwise_operations(x, out)
    assert (elementwise > 0) == isinstance(layer, (ACmixConv2d, PatchwiseACmix))


@pytest.mark.parametrize('name', LAYERS)
def test_parameter_classes(name):
    """All entries name a parameter, and in ACmix layers only the rates belong to the rest."""
    layer = LAYERS[name][0]()
    names = {key.split('.')[0] for key, _ in layer.named_parameters()}
    assert set(layer.parameter_classes) <= names
    assert set(layer.parameter_classes.values()) <= set(OPERATOR_CLASSES) - {REST}
    rest = names - set(layer.parameter_classes)
    assert rest == ({'reduce', 'span'} if name == 'involution' else {'rate1', 'rate2'})


def test_elementwise_operations():
    """One for each bias of q, k and v; in PatchwiseACmix three for each norm as well."""
    x = torch.empty(2, 6, 4, 5, device='meta')
    layer = ACmixConv2d(6, 8, stride=2).to('meta')
    assert layer.elementwise_operations(x, layer(x)) == 3 * 8 * 2 * 20
    layer = PatchwiseACmix(6, 2, 8, 3).eval()
    x = torch.zeros(2, 6, 4, 5)
    # Norms of 2 · (1 + 9) and 1 channels; biases of q, k, v and of the last linear layer.
    expected = 2 * 20 * (3 * (20 + 1) + 2 + 2 + 8 + 9)
    assert layer.elementwise_operations(x, layer(x)) == expected


def penalty_gradients(layer, x):
    """Gradients of a penalty on the gradient with respect to the input."""
    leaf = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True)
    tensors = [leaf, *layer.parameters()]
    # A bias does not change the gradient with respect to the input.
    grads = torch.autograd.grad(gradient.square().sum(), tensors, allow_unused=True)
    return [torch.zeros_like(each) if grad is None else grad for each, grad in zip(tensors, grads)]


@pytest.mark.parametrize('name', LAYERS)
def test_gradient_penalty(name):
    """In training, where some arguments of an operator are computed from others."""
    build, shape = LAYERS[name]
    layer, x = randomised(build()).double(), torch.randn(2, *shape[1:], dtype=torch.float64)
    context = nullcontext()
    if name in ('reduced', 'global', 'bigbird'):
        # Torch's fused attention refuses second derivatives; its composite one computes them.
        with pytest.raises(RuntimeError, match=r'attention.* is not implemented'):
            penalty_gradients(layer, x)
        attention = pytest.importorskip('torch.nn.attention', reason='torch has it since 2.3')
        context = attention.sdpa_kernel(attention.SDPBackend.MATH)
    with context:
        actual = penalty_gradients(layer, x)
        with use_backend('reference'):
            expected = penalty_gradients(layer, x)
    assert expected[0].abs().max() > 0
    for fast, slow in zip(actual, expected):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_empty_batch(name, training):
    """As in nn.Conv2d and nn.BatchNorm2d: gradients are zero, statistics stay as they are."""
    build, shape = LAYERS[name]
    layer = build().train(training)
    before = {key: value.clone() for key, value in layer.named_buffers()}
    x = torch.zeros(0, *shape[1:], requires_grad=True)
    out = layer(x)
    assert out.shape == (0, *build()(torch.zeros(shape)).shape[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    for key, value in layer.named_buffers():
        if not key.endswith('num_batches_tracked'):
            assert torch.equal(value, before[key])


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(mix='both'), "mix must be one of acmix, attn, conv, got 'both'"),
    (dict(combine='mean'), 'combine must be one of rates, convex, sum'),
    (dict(shift='roll'), 'shift must be one of learned, random, fixed, tensor'),
    (dict(shift_groups=3), 'shift_groups must be 1, or None for one group for each of the 2 heads'),
])
@pytest.mark.parametrize('name', ['window', 'sliding', 'reduced'])
def test_invalid_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        TWO_PATHS[name][0](**arguments)


@pytest.mark.parametrize(('build', 'message'), [
    (lambda: ACmixConv2d(6, 8, num_heads=3), 'num_heads must divide out_channels, got 3 heads'),
    (lambda: WindowACmix(8, 3, 4), 'num_heads must divide embed_dims, got 3 heads for 8 channels'),
    (lambda: ReducedACmix(8, 3), 'num_heads must divide embed_dims, got 3 heads for 8 channels'),
    (lambda: ACmixConv2d(6, 8, kernel_size=4), 'kernel_size must be odd, got 4'),
    (lambda: ACmixConv2d(6, 8, attn_kernel_size=4), 'attn_kernel_size must be odd, got 4'),
    (lambda: PatchwiseACmix(6, 2, 8, 4), 'kernel_size must be odd, got 4'),
    (lambda: Involution2d(16, 16, 4), 'kernel_size must be odd, got 4'),
])
def test_invalid_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_new_layer_needs_no_registration():
    """A subclass of OperatorLayer is counted from its own report."""
    from acmix_mm.analysis.flops import Count, count

    class Doubling(OperatorLayer):
        parameter_classes = {'scale': ATTENTION}  # noqa: RUF012

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return 2 * x

        def multiply_adds(self, x, out):
            return {ATTENTION: out.numel()}

    layer = Doubling()
    counts = count(layer, lambda: layer(torch.zeros(1, 3, 4, 5)))
    assert counts[ATTENTION] == Count(3, 60)
    assert counts[REST] == Count(0, 0)
