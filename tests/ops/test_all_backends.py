"""What holds for every backend of every operator: second derivatives and empty batches."""

import functools

import pytest
import torch
from helpers.operators import (
    DEVICE,
    aggregation_tensors,
    attend_padded,
    attend_projections,
    conv_tensors,
    encoding_tensors,
    features_tensors,
    involution_tensors,
    padded_window_tensors,
    projected_window_tensors,
    sliding_tensors,
    sum_tensors,
    weights_tensors,
    window_tensors,
)
from helpers.stack import needs_custom_ops
from torch.autograd import grad, gradgradcheck

from acmix_mm.gpu_check import subjects
from acmix_mm.ops import (
    BlockPattern,
    add_paths,
    available_backends,
    block_attention,
    global_attention,
    involution,
    patch_aggregation,
    patch_features,
    shift_conv,
    sliding_window_attention,
    window_attention,
)
from acmix_mm.ops.involution import chunked as involution_chunked
from acmix_mm.ops.patchwise_attention import chunked as patchwise_chunked
from acmix_mm.ops.sliding_attention import tiles
from acmix_mm.ops.window_attention import chunked as window_chunked

# Functions of tensors, and functions of the batch size that return small tensors. A name ends in
# that of the operator.
OPERATORS = {
    'sliding_window_attention': (
        functools.partial(sliding_window_attention, kernel_size=3),
        lambda batch: sliding_tensors(batch, 1, 2, 3, 9)),
    'global_attention': (
        functools.partial(global_attention, stride=2),
        lambda batch: sliding_tensors(batch, 1, 2, 3, 4)),
    'block_attention': (
        functools.partial(block_attention, pattern=BlockPattern(2, 1, 1, has_window=True)),
        lambda batch: sliding_tensors(batch, 1, 2, 3, 7)),
    'window_attention': (
        functools.partial(window_attention, window_size=(2, 3), shift_size=1),
        lambda batch: window_tensors(batch, (2, 2), (2, 3), 2, 2)),
    'padded window_attention': (
        attend_padded((2, 3), 1),
        lambda batch: padded_window_tensors(batch, (3, 5), (2, 3), 2, 2)),
    'projected window_attention': (attend_projections, projected_window_tensors),
    'shift_conv': (
        functools.partial(shift_conv, stride=2),
        lambda batch: conv_tensors(batch, 2, 2, 3, 4, 3, True, True)),
    'patch_features': (
        functools.partial(patch_features, kernel_size=3),
        lambda batch: features_tensors(batch, 2, 3, 2, 3)),
    'patch_aggregation': (
        functools.partial(patch_aggregation, kernel_size=3),
        lambda batch: aggregation_tensors(batch, 4, 3, 2, 3)),
    'involution': (
        functools.partial(involution, stride=2),
        lambda batch: involution_tensors(batch, 2, 2, 4, 3, 3, 2)),
    'add_paths': (
        functools.partial(add_paths, size=(2, 3), shift_size=1),
        lambda batch: sum_tensors(batch, 2, 3, 2, 3)),
    'roll_map': (
        functools.partial(subjects.rolled, shift_size=1),
        lambda batch: [torch.randn(batch, 2, 3, 2)]),
}
# Those of weights, without a batch.
OF_WEIGHTS = {
    'compose_paths': (
        functools.partial(subjects.composed_weights, is_grouped=False),
        lambda _: weights_tensors(3, 1, 2, 3, True, True, True, True)),
    'grouped compose_paths': (
        functools.partial(subjects.composed_weights, is_grouped=True),
        lambda _: weights_tensors(3, 1, 2, 3, True, True, True, True)),
    'position_bias': (
        functools.partial(subjects.biases, side=3, window_size=(2, 3)),
        lambda _: [torch.randn(25, 2)]),
    'position_encoding': (
        functools.partial(subjects.encoding, height=2, width=3), lambda _: encoding_tensors(2)),
}


def backends_of(name):
    return available_backends(name.split()[-1])


def cases(operators):
    return [(operator, backend) for operator in operators for backend in backends_of(operator)]


# These backends run torch's fused attention; see test_fused_attention.
FUSED = [('sliding_window_attention', 'dense'), ('global_attention', 'sdpa'),
         ('block_attention', 'sdpa')]
DIFFERENTIABLE_TWICE = [case for case in cases([*OPERATORS, *OF_WEIGHTS]) if case not in FUSED]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks, even of the smallest maps."""
    for module, name in ((involution_chunked, 'CPU_CHUNK'), (patchwise_chunked, 'CHUNK'),
                         (tiles, 'BLOCK_LOGITS'), (window_chunked, 'STRIP_LOGITS')):
        monkeypatch.setattr(module, name, 1)


def prepare(operator, backend, batch, dtype):
    """The operator on a backend, and its inputs."""
    if backend == 'triton':
        pytest.importorskip('triton')
    run, tensors_of = {**OPERATORS, **OF_WEIGHTS}[operator]
    device = DEVICE if backend == 'triton' else 'cpu'
    tensors = [each.to(device, dtype).requires_grad_() for each in tensors_of(batch)]
    return functools.partial(run, backend=backend), tensors


def second_derivatives(run, tensors):
    """The gradients of a penalty on all gradients."""
    first = grad(run(*tensors).square().sum(), tensors, create_graph=True)
    return grad(sum(each.square().sum() for each in first), tensors)


@pytest.mark.parametrize(('operator', 'backend'), DIFFERENTIABLE_TWICE)
def test_second_derivatives(operator, backend):
    if backend != 'triton':
        assert gradgradcheck(*prepare(operator, backend, 1, torch.float64), fast_mode=True)
        return
    # The kernels compute in float32 at most.
    run, tensors = prepare(operator, backend, 1, torch.float32)
    reference = prepare(operator, 'reference', 1, torch.float64)[0]
    expected = second_derivatives(reference, [each.double() for each in tensors])
    for actual, exact in zip(second_derivatives(run, tensors), expected):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max())


@needs_custom_ops
@pytest.mark.parametrize(('operator', 'backend'), DIFFERENTIABLE_TWICE)
def test_second_derivatives_of_compiled_operators(operator, backend):
    """If torch.compile leaves the derivatives to autograd."""
    run, tensors = prepare(operator, backend, 1, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(run, backend='eager')
    for actual, expected in zip(second_derivatives(compiled, tensors),
                                second_derivatives(run, tensors)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize(('operator', 'backend'), FUSED)
def test_fused_attention(operator, backend):
    """Torch's fused attention refuses second derivatives; its composite one computes them."""
    attention = pytest.importorskip('torch.nn.attention', reason='torch has it since 2.3')
    run, tensors = prepare(operator, backend, 1, torch.float64)
    with pytest.raises(RuntimeError, match=r'attention.* is not implemented'):
        second_derivatives(run, tensors)
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        assert gradgradcheck(run, tensors, fast_mode=True)


def test_gradients_that_are_not_needed():
    """Second derivatives with respect to some of the tensors only."""
    for operator, backend in DIFFERENTIABLE_TWICE:
        # Unless the bias needs a gradient, 'sdpa' runs torch's fused attention, too.
        if backend == 'triton' or (operator, backend) == ('padded window_attention', 'sdpa'):
            continue
        run, tensors = prepare(operator, backend, 1, torch.float32)
        for tensor in tensors[:-1]:
            tensor.requires_grad_(False)
        first, = grad(run(*tensors).square().sum(), tensors[-1], create_graph=True)
        second, = grad(first.square().sum(), tensors[-1])
        assert second.abs().max() > 0


@needs_custom_ops
@pytest.mark.parametrize(('operator', 'backend'), [
    ('window_attention', 'chunked'), ('shift_conv', 'folded')])
def test_compiled_operators_refuse_second_derivatives(operator, backend):
    """Of AOTAutograd, which traces one backward pass."""
    run, tensors = prepare(operator, backend, 1, torch.float32)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match='does not currently support double backward'):
        second_derivatives(torch.compile(run, backend='aot_eager'), tensors)


@pytest.mark.parametrize('operator', [
    each for each in OPERATORS if each not in ('global_attention', 'block_attention')])
def test_functional_transforms_are_refused(operator):
    run, tensors = prepare(operator, next(
        name for name in ('tiled', 'chunked', 'folded', 'triton') if name in backends_of(operator)),
                           1, torch.float32)
    with pytest.raises(RuntimeError, match='must override the setup_context'):
        torch.func.grad(lambda first: run(first, *tensors[1:]).sum())(tensors[0])
    with pytest.raises(NotImplementedError, match='must implement the jvp function'), \
            torch.autograd.forward_ad.dual_level():
        run(torch.autograd.forward_ad.make_dual(tensors[0], tensors[0].detach()), *tensors[1:])


@pytest.mark.parametrize(('operator', 'backend'), cases(OPERATORS))
def test_empty_batch(operator, backend):
    run, tensors = prepare(operator, backend, 0, torch.float32)
    out = run(*tensors)
    shape = OPERATORS[operator][0](*OPERATORS[operator][1](1)).shape
    assert out.shape == (0, *shape[1:])
    out.sum().backward()
    for each in tensors:
        assert torch.equal(each.grad, torch.zeros_like(each))
