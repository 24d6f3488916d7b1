"""shift_sum, which moves maps, against convolutions with one-hot kernels."""

import pytest
import torch
from torch.nn import functional as F

from acmix_mm.ops import shift_conv, shift_sum


@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize('size', [(7, 10), (1, 1), (2, 5)], ids=str)
def test_equals_convolution_with_one_hot_kernels(size, stride, dilation):
    maps = torch.randn(2, 6, 4, *size, dtype=torch.double)
    matrix, bias = torch.randn(9, 6, dtype=torch.double), torch.randn(9, dtype=torch.double)
    shifts = torch.eye(9, dtype=torch.double).view(9, 3, 3).expand(4, -1, -1, -1)
    for each in (bias, None):
        moved = shift_sum(maps, matrix, each, stride=stride, dilation=dilation)
        mixed = torch.einsum('jm,bmdhw->bdjhw', matrix, maps)
        if each is not None:
            mixed = mixed + bias[:, None, None]
        convolved = F.conv2d(mixed.flatten(1, 2), shifts, groups=4, stride=stride,
                             padding=dilation, dilation=dilation)
        torch.testing.assert_close(moved, convolved)
        torch.testing.assert_close(moved, shift_conv(maps, matrix, shifts, each, stride=stride,
                                                     dilation=dilation, backend='reference'))
