"""The involution operator: its backends against its equation, its memory and its custom ops."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers.operators import TOLERANCE, compare, involution_loop, involution_tensors
from helpers.stack import needs_custom_ops
from torch.nn.functional import conv2d

from acmix_mm.ops import involution
from acmix_mm.ops.involution import chunked


@pytest.mark.parametrize('backend', ['reference', 'chunked'])
@pytest.mark.parametrize(('height', 'width', 'kernel_size', 'stride', 'dilation'), [
    (1, 1, 3, 1, 1), (2, 1, 5, 2, 1), (4, 5, 3, 1, 1), (5, 4, 3, 2, 1), (4, 3, 3, 1, 2),
    (5, 7, 3, 2, 3), (3, 4, 1, 3, 1)])
def test_equals_the_equation(backend, height, width, kernel_size, stride, dilation):
    tensors = [each.double() for each in
               involution_tensors(2, 2, 2, height, width, kernel_size, stride)]
    results = []
    for run in (involution_loop, functools.partial(involution, backend=backend)):
        leaves = [each.clone().requires_grad_() for each in tensors]
        out = run(*leaves, stride=stride, dilation=dilation)
        cotangent = torch.arange(out.numel()).view_as(out).double().sin()
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize(('batch', 'groups', 'per_group', 'height', 'width', 'kernel_size'), [
    (1, 1, 1, 1, 1, 7), (2, 2, 8, 1, 12, 7), (1, 4, 4, 3, 2, 7), (2, 1, 16, 9, 8, 5),
    (2, 2, 4, 33, 30, 3)])
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_chunked_equals_reference(dtype, batch, groups, per_group, height, width, kernel_size,
                                  stride, dilation, monkeypatch):
    # The largest map is processed five rows at a time.
    monkeypatch.setattr(chunked, 'CPU_CHUNK', 2 * 8 * 30 * 5)
    tensors = involution_tensors(batch, groups, per_group, height, width, kernel_size, stride)
    run = functools.partial(involution, stride=stride, dilation=dilation)
    compare(run, tensors, 'chunked', dtype)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(chunked, 'CPU_CHUNK', 1)
    for stride, dilation in ((1, 1), (2, 2)):
        leaves = [each.double().requires_grad_() for each in
                  involution_tensors(2, 2, 2, 4, 3, 3, stride)]
        assert torch.autograd.gradcheck(
            functools.partial(involution, stride=stride, dilation=dilation), leaves)


def test_same_kernel_everywhere_equals_a_convolution():
    x, kernels = torch.randn(2, 6, 7, 5), torch.randn(2, 3, 3)
    out = involution(x, kernels[None, ..., None, None].expand(2, -1, -1, -1, 7, 5))
    depthwise = kernels.repeat_interleave(3, 0).unsqueeze(1)
    torch.testing.assert_close(out, conv2d(x, depthwise, padding=1, groups=6))


def test_empty_batch():
    leaves = [each.requires_grad_() for each in involution_tensors(0, 2, 2, 4, 3, 3)]
    out = involution(*leaves)
    assert out.shape == (0, 4, 4, 3)
    out.sum().backward()


def test_memory():
    """Peak memory of forward and backward at 64 channels, 100×168, in a subprocess.

    One copy of the map per neighbour would take 201 MiB. The kernels take 13 MiB, as do their
    gradients.
    """
    done = subprocess.run([sys.executable, '-c', '''
import re
import torch
from acmix_mm.ops import involution
from acmix_mm.ops.involution import chunked

def mebibytes(entry):
    with open('/proc/self/status') as status:
        return int(re.search(entry + r':\\s+(\\d+) kB', status.read()).group(1)) / 1024

def run(backend, *size):
    x = torch.randn(1, 64, *size, requires_grad=True)
    kernels = torch.randn(1, 4, 7, 7, *size, requires_grad=True)
    with open('/proc/self/clear_refs', 'w') as peak:
        peak.write('5')
    idle = mebibytes('VmRSS')
    involution(x, kernels, backend=backend).sum().backward()
    return mebibytes('VmHWM') - idle

run('chunked', 16, 16)
print(run('chunked', 100, 168), run('reference', 100, 168))
'''], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                          check=True)
    chunked, reference = map(float, done.stdout.split())
    assert 20 < chunked < 60
    assert reference > 400


@pytest.mark.parametrize(('change', 'message'), [
    (dict(backend='cuda'), 'has no backend .cuda.; it has chunked, reference'),
    (dict(x=torch.zeros(4, 5, 6)), 'takes x of shape'),
    (dict(kernels=torch.zeros(1, 18, 5, 6)), r'needs kernels of shape \(1, groups, k, k, 5, 6\)'),
    (dict(kernels=torch.zeros(1, 3, 3, 3, 5, 6)), 'groups dividing 4'),
    (dict(kernels=torch.zeros(1, 0, 3, 3, 5, 6)), 'groups dividing 4'),
    (dict(stride=2), r'\(1, groups, k, k, 3, 3\)'),
    (dict(kernels=torch.zeros(1, 2, 4, 4, 5, 6)), 'takes odd kernels, got one of 4'),
])
def test_invalid_arguments(change, message):
    given = dict(zip(('x', 'kernels'), involution_tensors(1, 2, 2, 5, 6, 3)))
    with pytest.raises(ValueError, match=message):
        involution(**{**given, **change})


@needs_custom_ops
def test_custom_op_registration():
    operators, opcheck = torch.ops.acmix_mm, torch.library.opcheck
    for stride in (1, 2):
        x, kernels = involution_tensors(2, 2, 2, 5, 4, 3, stride)
        grad = torch.randn(x[:, :, ::stride, ::stride].shape)
        for each in (x, x.contiguous(memory_format=torch.channels_last)):
            opcheck(operators.involve_chunked.default, (each, kernels, stride, 1))
            opcheck(operators.involve_chunked_backward.default, (grad, each, kernels, stride, 1))
