"""WindowACmix: its two paths, and the windows."""

import pytest
import torch
from helpers.operators import DEVICE
from helpers.stack import needs_custom_ops, needs_triton
from helpers.weights import randomised

from acmix_mm.layers import WindowACmix
from acmix_mm.ops import use_backend


def results(layer, x):
    """Output, and gradients of the input and all parameters."""
    out = layer(x)
    return [out, *torch.autograd.grad(out.sin().sum(), (x, *layer.parameters()))]


@pytest.mark.parametrize('size', [(14, 21), (7, 7), (10, 9), (5, 6), (2, 20), (7, 13), (1, 1)])
@pytest.mark.parametrize('shift_size', [0, 3])
def test_equals_the_reference_backends(size, shift_size):
    """Output and gradient do not depend on the backends of the operators."""
    layer = randomised(WindowACmix(12, 3, 7, shift_size)).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    fast = layer(x)
    gradient, = torch.autograd.grad(fast.sin().sum(), x)
    with use_backend('reference'):
        slow = layer(x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradient, torch.autograd.grad(slow.sin().sum(), x)[0])


@needs_triton
@pytest.mark.parametrize(('size', 'convolution', 'options'), [
    # The convolution path reads the input or the projections.
    ((5, 9), 'composed', dict(shift_size=1)),
    ((5, 4), 'folded', dict(shift_size=2)),
    ((8, 4), 'folded', dict(shift_size=2, mix='attn')),
    ((5, 6), 'composed', dict(shift_size=0, qkv_bias=False)),
    ((3, 4), 'folded', dict(shift_size=1)),
])
def test_attention_that_pads_in_place(size, convolution, options):
    """The Triton kernels read the original map; the gradients include those of padding."""
    layer = randomised(WindowACmix(8, 2, 4, **options)).to(DEVICE)
    x = torch.randn(1, *size, 8, device=DEVICE, requires_grad=True)
    with use_backend('reference'):
        expecteds = results(layer, x)
    with use_backend('triton'), use_backend(convolution):
        assert not layer.rolls_input(x)
        actuals = results(layer, x)
    for actual, expected in zip(actuals, expecteds):
        torch.testing.assert_close(actual, expected, rtol=1e-4,
                                   atol=2e-5 * expected.abs().max().item())


@needs_triton
@needs_custom_ops
@pytest.mark.usefixtures('_fake_gpu')
@pytest.mark.parametrize('size', [(5, 9), (3, 4)])
def test_attention_copies_no_map_on_gpus(size, monkeypatch):
    """Nothing but the kernel pads and rolls."""
    # It reads values in torch 2.15, which fake tensors do not have.
    monkeypatch.setattr(torch.nn.init, 'trunc_normal_', lambda tensor, std: tensor)
    targets = set()

    def record(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.device('cuda'):
        layer, x = WindowACmix(8, 2, 4, shift_size=2, mix='attn'), torch.randn(1, *size, 8)
    torch._dynamo.reset()
    torch.compile(layer, backend=record, fullgraph=True, dynamic=True)(x)
    assert 'acmix_mm.attend_windows_triton.default' in targets
    copies = ('roll', 'pad', 'cat', 'clone', 'contiguous')
    assert not [target for target in targets if any(word in target for word in copies)]


def test_dropout_pads_before_the_projections():
    """The kernels have none."""
    layer = WindowACmix(8, 2, 4, attn_drop_rate=0.5)
    x = torch.randn(1, 5, 5, 8)
    assert layer.train().pads_input(x)
    assert layer.rolls_input(x)
    assert not layer.eval().pads_input(x)
    layer.train()
    assert torch.isfinite(layer(x)).all()


def test_paths_add_up():
    """'acmix' is rate1 · 'attn' + rate2 · 'conv', with the same weights."""
    both = randomised(WindowACmix(12, 3, 7, 3))
    x = torch.randn(2, 15, 16, 12)
    parts = []
    for mix in ('attn', 'conv'):
        part = WindowACmix(12, 3, 7, 3, mix=mix).eval()
        result = part.load_state_dict(both.state_dict(), strict=False)
        assert not result.missing_keys
        assert not [name for name, _ in part.named_parameters() if 'rate' in name]
        parts.append(part(x))
    torch.testing.assert_close(both(x), both.rate1 * parts[0] + both.rate2 * parts[1])


def test_omitted_path_has_no_parameters():
    names = {mix: {name for name, _ in WindowACmix(12, 3, 7, mix=mix).named_parameters()}
             for mix in ('acmix', 'attn', 'conv')}
    attending = {'relative_position_bias_table', 'proj.weight', 'proj.bias'}
    mixing = {'fc.weight', 'fc.bias', 'dep_conv.weight'}
    shared = {'qkv.weight', 'qkv.bias'}
    assert names['attn'] == shared | attending
    assert names['conv'] == shared | mixing
    assert names['acmix'] == shared | attending | mixing | {'rate1', 'rate2'}


def test_convolution_wraps_around_only_in_shifted_blocks():
    """Opposite edges of the map are adjacent in a shifted block, regardless of the padding."""
    for size in ((14, 14), (16, 9)):
        reach = {}
        for shift_size in (0, 3):
            layer = randomised(WindowACmix(12, 3, 7, shift_size, mix='conv'))
            x = torch.randn(1, *size, 12, requires_grad=True)
            layer(x)[0, 0, 0].sum().backward()
            touched = x.grad[0].abs().sum(-1).nonzero()
            reach[shift_size] = {tuple(position) for position in touched.tolist()}
        assert reach[0] == {(0, 0), (0, 1), (1, 0), (1, 1)}
        rows, columns = (0, 1, size[0] - 1), (0, 1, size[1] - 1)
        assert reach[3] == {(row, column) for row in rows for column in columns}


def test_shift_of_a_whole_window_raises():
    with pytest.raises(ValueError, match='shift_size must lie in'):
        WindowACmix(12, 3, 7, 7)
