"""Reflection padding of any width."""

import torch

from acmix_mm.ops.reflection import reflected_range, reflection_pad


def test_narrow_axes_are_reflected_repeatedly():
    assert reflected_range(-4, 8, 4, 'cpu').tolist() == [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert reflected_range(-3, 4, 2, 'cpu').tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert reflected_range(-3, 4, 1, 'cpu').tolist() == [0] * 7


def test_padding_is_that_of_torch():
    maps = torch.randn(2, 3, 5, 7)
    expected = torch.nn.functional.pad(maps, (3, 3, 3, 3), mode='reflect')
    torch.testing.assert_close(reflection_pad(maps, 3), expected, rtol=0, atol=0)
