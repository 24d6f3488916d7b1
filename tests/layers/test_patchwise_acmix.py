"""PatchwiseACmix against patch-wise self-attention with explicit copies."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, relative_error
from helpers.stack import HALF_DTYPES
from helpers.weights import patchwise_attention, randomised
from torch import nn

from acmix_mm.layers import PatchwiseACmix
from acmix_mm.layers import patchwise_acmix as patchwise_module
from acmix_mm.ops import use_backend
from acmix_mm.ops.reflection import reflection_pad


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('size', [(9, 8), (3, 12), (1, 2)], ids=str)
@pytest.mark.parametrize('kernel_size', [3, 7])
def test_attention_equals_plain_layer(training, size, kernel_size):
    """Outputs, gradients and running statistics, in float64."""
    ours = randomised(PatchwiseACmix(32, 2, 8, kernel_size, mix='attn'))
    ours = ours.double().train(training)
    plain = copy.deepcopy(ours)
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    results = []
    for layer, run in ((ours, ours), (plain, functools.partial(patchwise_attention, plain))):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.sin().sum().backward()
        results.append([out, leaf.grad, *(each.grad for each in layer.parameters()),
                        *layer.buffers()])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_statistics_are_accurate_far_from_zero():
    """In float32, for keys whose mean is a thousand times their standard deviation."""
    norm = nn.BatchNorm2d(2 * 50)
    q, k = 1000 + torch.randn(2, 2, 2, 30, 40)
    copies = F.unfold(reflection_pad(k.double(), 3), 7).unsqueeze(2)
    around = torch.cat([q.double().flatten(2).unsqueeze(2), copies], 1)
    expected = around.var((0, 2, 3), correction=0)
    scale, _ = patchwise_module.norm_of_neighbourhoods(norm, q, k, 7)
    assert relative_error(scale.double(), (expected + norm.eps).rsqrt()) < 1e-4


def test_synchronised_statistics_cover_all_processes(tmp_path):
    """Two processes with images of different sizes, against one norm over the copies of both."""
    maps = [torch.randn(2, 2, 2, *size, dtype=torch.float64) for size in ((6, 5), (9, 8))]
    torch.save(maps, tmp_path / 'maps.pt')
    script = """
import os, sys
import torch
import torch.distributed as dist
from acmix_mm.layers.patchwise_acmix import norm_of_neighbourhoods
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
q, k = (each.clone().requires_grad_() for each in torch.load(f'{folder}/maps.pt')[rank])
norm = torch.nn.SyncBatchNorm(2 * 10).double()
scale, shift = norm_of_neighbourhoods(norm, q, k, 3)
((rank + 1) * (scale.sin() + shift.square())).sum().backward()
torch.save([scale.detach(), q.grad, k.grad, norm.running_var], f'{folder}/{rank}.pt')
dist.barrier()
os._exit(0)
"""
    running = [subprocess.Popen([sys.executable, '-c', script, str(tmp_path), str(rank)], env={
        **os.environ, 'PYTHONPATH': str(ROOT)}) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]

    leaves = [maps[rank][part].clone().requires_grad_() for rank in (0, 1) for part in (0, 1)]
    around = [torch.cat([q.flatten(2), F.unfold(reflection_pad(k, 1), 3)], 1)
              for q, k in (leaves[:2], leaves[2:])]
    positions = torch.cat([each.transpose(1, 2).flatten(0, 1) for each in around])
    variance, mean = torch.var_mean(positions, 0, correction=0)
    scale = (variance + 1e-5).rsqrt()
    # Each process has its own loss.
    (3 * (scale.sin() + (mean * scale).square())).sum().backward()
    for rank in (0, 1):
        results = torch.load(tmp_path / f'{rank}.pt')
        running_var = 0.9 + 0.1 * positions.var(0)
        gradients = [leaf.grad for leaf in leaves[2 * rank:2 * rank + 2]]
        for actual, expected in zip(results, [scale, *gradients, running_var]):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('size', [(8, 8), (9, 5), (1, 3)], ids=str)
def test_equals_the_reference_backends(size):
    """Output and gradient do not depend on the backends of the operators."""
    layer = randomised(PatchwiseACmix(32, 2, 8, 7)).double().eval()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    fast = layer(x)
    gradient, = torch.autograd.grad(fast.sin().sum(), x)
    with use_backend('reference'):
        slow = layer(x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradient, torch.autograd.grad(slow.sin().sum(), x)[0])


def test_fc_mixes_pieces_of_equal_width():
    """q and k are one map of two channels each, v is four; output channels are (channel, head)."""
    layer = PatchwiseACmix(32, 2, 8, 7, mix='conv')
    x = torch.randn(1, 32, 1, 1)
    pieces = torch.cat([conv(x) for conv in (layer.conv1, layer.conv2, layer.conv3)], 1).view(6, 2)
    # On a map of one position, only the middle shift stays inside.
    mixed = layer.fc.matrix[4] @ pieces
    torch.testing.assert_close(layer(x).view(2, 4), mixed[:, None].expand(2, 4))


def test_paths_add_up():
    both = randomised(PatchwiseACmix(32, 2, 8, 7))
    x = torch.randn(2, 32, 6, 5)
    parts = []
    for mix in ('attn', 'conv'):
        part = PatchwiseACmix(32, 2, 8, 7, mix=mix).eval()
        assert not part.load_state_dict(both.state_dict(), strict=False).missing_keys
        assert not [name for name, _ in part.named_parameters() if 'rate' in name]
        parts.append(part(x))
    torch.testing.assert_close(both(x), both.rate1 * parts[0] + both.rate2 * parts[1])


@pytest.mark.parametrize(('arguments', 'message'), [
    ((32, 3, 8, 7), 'rel_channels and 8 must divide out_channels, got 3 for 8'),
    ((32, 2, 12, 7), 'rel_channels and 8 must divide out_channels'),
    ((32, 2, 8, 4), 'kernel_size must be odd, got 4'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchwiseACmix(*arguments)


def test_saves_no_copies_for_the_backward_pass():
    """No saved tensor is larger than the input; the copied keys would be three times as large."""
    layer = PatchwiseACmix(64, 4, 16, 7)
    x = torch.randn(1, 64, 20, 30, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.numel()) or each,
                                                  lambda each: each):
        layer(x)
    assert len(saved) > 10
    assert max(saved) <= x.numel()


def test_half_precision_and_autocast():
    layer = randomised(PatchwiseACmix(32, 2, 8, 7))
    x = torch.randn(1, 32, 9, 13)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(layer(x).float(), expected) < 0.05
    for dtype in HALF_DTYPES:
        out = layer.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert relative_error(out.float(), expected) < 0.05


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_as_accurate_as_in_a_plain_layer(dtype):
    """For queries and keys whose mean is five times their standard deviation.

    Like torch's batch norm, the layer applies scale and shift in float32.
    """
    layer = PatchwiseACmix(64, 4, 16, 7, mix='attn')
    for conv in (layer.conv1, layer.conv2):
        nn.init.normal_(conv.bias, std=5 * (1 / 3)**0.5)
    x = torch.randn(2, 64, 20, 24)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast('cpu', dtype):
            ours, plain = layer(x), patchwise_attention(layer, x)
    errors = [(out.float() - exact).square().mean().sqrt() for out in (ours, plain)]
    assert 0 < errors[0] < 1.1 * errors[1]


@pytest.mark.skipif(torch.float16 not in HALF_DTYPES,
                    reason='this torch has no float16 on CPUs')
def test_no_overflow_under_float16_autocast():
    """The shift of a norm exceeds the range of float16 if the keys are large and vary little."""
    layer = PatchwiseACmix(32, 2, 8, 3, mix='attn')
    x = 300 * torch.randn(32, 1, 1).expand(2, 32, 5, 6)
    expected = layer(x)
    with torch.autocast('cpu', torch.float16):
        out = layer(x)
    assert relative_error(out.float(), expected) < 0.01
