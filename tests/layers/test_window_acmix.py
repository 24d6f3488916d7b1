"""WindowACmix: its two paths, and the windows."""

import pytest
import torch
from helpers.weights import randomised

from acmix_mm.layers import WindowACmix
from acmix_mm.ops import use_backend


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
