"""ReducedACmix against its equation."""

import pytest
import torch
from helpers.weights import randomised

from acmix_mm.layers import ReducedACmix
from acmix_mm.layers.reduced_acmix import repeat_cells
from acmix_mm.ops import shift_conv


def test_positions_share_the_keys_and_values_of_their_cell():
    reduced = torch.arange(6.).view(1, 2, 3, 1)
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 1])  # the seventh row is in no whole cell
    columns = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    expected = (3. * rows[:, None] + columns)[None, ..., None]
    assert torch.equal(repeat_cells(reduced, (7, 9), 3), expected)


@pytest.mark.parametrize('sr_ratio', [1, 2, 4])
@pytest.mark.parametrize('size', [(8, 8), (9, 5), (1, 3)], ids=str)
def test_equals_its_equation(sr_ratio, size):
    """Against explicit softmax attention and the reference backend of the convolution path."""
    layer = randomised(ReducedACmix(12, 3, sr_ratio)).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    reduced = layer.reduce(x)
    weight, bias = layer.attn.in_proj_weight, layer.attn.in_proj_bias
    q = x @ weight[:12].T + bias[:12]
    k, v = (reduced @ weight[12:].T + bias[12:]).chunk(2, 3)
    heads = [each.flatten(1, 2).unflatten(2, (3, 4)).transpose(1, 2) for each in (q, k, v)]
    weights = (heads[0] @ heads[1].transpose(2, 3) / 2).softmax(3)
    attention = layer.attn.out_proj((weights @ heads[2]).transpose(1, 2).reshape(x.shape))
    full = [q, repeat_cells(k, size, sr_ratio), repeat_cells(v, size, sr_ratio)]
    maps = torch.cat([each.unflatten(3, (3, 4)) for each in full], 3).permute(0, 3, 4, 1, 2)
    convolution = shift_conv(maps, layer.fc.matrix, layer.dep_conv.weight, layer.fc.bias,
                             backend='reference').permute(0, 2, 3, 1)
    expected = layer.rate1 * attention + layer.rate2 * convolution
    torch.testing.assert_close(layer(x), expected)


def test_paths_add_up():
    both = randomised(ReducedACmix(12, 3, 2))
    x = torch.randn(2, 7, 6, 12)
    parts = []
    for mix in ('attn', 'conv'):
        part = ReducedACmix(12, 3, 2, mix=mix).eval()
        assert not part.load_state_dict(both.state_dict(), strict=False).missing_keys
        assert not [name for name, _ in part.named_parameters() if 'rate' in name]
        parts.append(part(x))
    torch.testing.assert_close(both(x), both.rate1 * parts[0] + both.rate2 * parts[1])


def test_heads_that_do_not_divide_raise():
    with pytest.raises(ValueError, match='num_heads must divide embed_dims, got 5 heads for 12'):
        ReducedACmix(12, 5)
