"""Composed weights of both paths: the formulas of their gradients, autocast, argument checks."""

import pytest
import torch
from helpers.operators import DEVICE, weights_tensors
from helpers.stack import needs_triton

from acmix_mm.gpu_check import checks, subjects
from acmix_mm.layers import ACmixConv2d, WindowACmix
from acmix_mm.ops import compose_paths, use_backend
from acmix_mm.ops.backend import raising_kernel_errors
from acmix_mm.ops.path_weights.gradients import compose_paths_gradients
from acmix_mm.ops.path_weights.reference import compose_paths_reference


@pytest.mark.parametrize('is_grouped', [False, True])
@pytest.mark.parametrize('exists', [False, True])
def test_gradients(is_grouped, exists):
    """Those by which torch stands in for failed kernels equal those of autograd."""
    tensors = [None if each is None else each.double().requires_grad_()
               for each in weights_tensors(5, 2, 4, 3, *[exists] * 4)]
    outs = compose_paths_reference(*tensors, torch.float64, is_grouped)
    grads = [torch.randn_like(each) for each in outs]
    expected = torch.autograd.grad(outs, [each for each in tensors if each is not None], grads)
    given = [None if each is None else each.detach() for each in tensors]
    found = compose_paths_gradients([each if each.numel() else None for each in grads], given,
                                    is_grouped)
    actual = [each for each in found if each is not None]
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@needs_triton
@pytest.mark.parametrize(('composition', 'build', 'shape'), [
    ('composed', lambda: WindowACmix(4, 2, 3, shift_size=1), (1, 4, 5, 4)),
    ('grouped', lambda: ACmixConv2d(4, 4, num_heads=1, attn_kernel_size=3), (1, 4, 3, 4)),
])
def test_kernels_of_layers_under_autocast(composition, build, shape):
    """Weights in float32, maps in half precision."""
    subject = subjects.layer('', '', build, shape)

    def run(*leaves):
        with use_backend('triton'), use_backend(composition), raising_kernel_errors():
            return subject.run(*leaves)

    def reference(*leaves):
        with use_backend('reference'):
            return subject.run(*leaves)

    tensors = [each.to(DEVICE) for each in subject.tensors()]
    error = checks.relative_error(run, reference, tensors, torch.float16, checks.AUTOCAST)
    assert error < checks.LAYER_FACTOR * checks.TOLERANCE[torch.float16]


def test_invalid_arguments():
    weight, _, fc_weight, shift_weight, *_ = weights_tensors(5, 2, 4, 3, *[False] * 4)
    others = [None] * 4
    with pytest.raises(ValueError, match='takes a weight of 3 · channels rows'):
        compose_paths(weight[1:], None, fc_weight, shift_weight, *others, torch.float32)
    with pytest.raises(ValueError, match='shifts of the fc'):
        compose_paths(weight, None, fc_weight[1:], shift_weight, *others, torch.float32)
