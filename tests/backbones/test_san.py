"""ACmix-SAN against patch-wise self-attention written out, and by the published counts."""

import copy
import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, relative_error
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import acmix_mm.layers.base as conv_path
import acmix_mm.layers.patchwise_acmix as patchwise_module
from acmix_mm.backbones import ACmixSAN
from acmix_mm.backbones.san import ACmixSANBlock
from acmix_mm.layers import PatchwiseACmix
from acmix_mm.ops.reflection import reflection_pad
from acmix_mm.utils.errors import CheckpointError

TINY = dict(depth=10, base_channels=32)


def randomised(model, scale=0.2):
    """Give every parameter and statistic a value that matters, norms and rates near one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = scale * torch.randn(tensor.shape, generator=generator)
            if name.endswith(('rate1', 'rate2', 'running_var')) or (
                    tensor.dim() == 1 and name.endswith('weight')):
                noise = 1 + noise.clamp(-0.5, 0.5)
            elif tensor.dim() == 4 and 'dep_conv' not in name:
                noise = noise / scale / tensor[0].numel()**0.5
            tensor.copy_(noise)
    return model


def calibrated(model, size=(64, 96)):
    """Randomised, and in evaluation mode with the statistics of one batch.

    Weights of attention are linear in their input: without fitting statistics maps would overflow.
    """
    model = randomised(model).train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(2, 3, *size))
    return model.eval()


def attend_plainly(sam, x):
    """Patch-wise self-attention with every neighbourhood copied, as its paper has it."""
    q, k, v = sam.conv1(x), sam.conv2(x), sam.conv3(x)
    area = sam.kernel_size**2

    def copies(maps):
        return F.unfold(reflection_pad(maps, sam.kernel_size // 2), sam.kernel_size)

    around = torch.cat([q.flatten(2), copies(k)], 1)
    weights = sam.conv_w(around.unsqueeze(2)).squeeze(2).unflatten(1, (1, -1, area))
    values = copies(v).unflatten(1, (-1, weights.shape[2], area))
    return (weights * values).sum(3).flatten(1, 2).view_as(v)


def run_plainly(model, x):
    """The plain SAN on the weights of ``model``, whose ``mix`` is 'attn'."""
    x = model.bn_in(model.conv_in(x)).relu()
    outs = []
    for stage in range(5):
        conv, layer, norm = model.parts(stage)
        x = conv(F.max_pool2d(x, 2))
        for block in layer:
            out = attend_plainly(block.sam, block.bn1(x).relu())
            x = x + block.conv(block.bn2(out).relu())
        x = norm(x).relu()
        outs.append(x)
    return outs[1:]


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('size', [(9, 8), (3, 12), (1, 2)], ids=str)
@pytest.mark.parametrize('kernel_size', [3, 7])
def test_attention_alone_equals_plain_layer(training, size, kernel_size):
    """Output, gradients and running statistics, in float64."""
    ours = randomised(PatchwiseACmix(32, 2, 8, kernel_size, mix='attn')).double().train(training)
    plain = copy.deepcopy(ours)
    x = torch.randn(2, 32, *size, dtype=torch.float64)
    results = []
    for layer, run in ((ours, ours), (plain, functools.partial(attend_plainly, plain))):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.sin().sum().backward()
        results.append([out, leaf.grad, *(each.grad for each in layer.parameters()),
                        *layer.buffers()])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_statistics_hold_far_from_zero():
    """In float32, of keys whose mean is a thousand times their deviation."""
    norm = nn.BatchNorm2d(2 * 50)
    q, k = 1000 + torch.randn(2, 2, 2, 30, 40)
    copies = F.unfold(reflection_pad(k.double(), 3), 7).unsqueeze(2)
    around = torch.cat([q.double().flatten(2).unsqueeze(2), copies], 1)
    expected = around.var((0, 2, 3), correction=0)
    scale, _ = patchwise_module.norm_of_neighbourhoods(norm, q, k, 7)
    assert relative_error(scale.double(), (expected + norm.eps).rsqrt()) < 1e-4


def test_synchronised_statistics_are_those_of_all_processes(tmp_path):
    """Two processes with pictures of different sizes, against one norm over what both copied."""
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
    # Each process has a loss of its own.
    (3 * (scale.sin() + (mean * scale).square())).sum().backward()
    for rank in (0, 1):
        results = torch.load(tmp_path / f'{rank}.pt')
        running_var = 0.9 + 0.1 * positions.var(0)
        gradients = [leaf.grad for leaf in leaves[2 * rank:2 * rank + 2]]
        for actual, expected in zip(results, [scale, *gradients, running_var]):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_attention_alone_equals_plain_san(training):
    model = calibrated(ACmixSAN(**TINY, mix='attn')).double().train(training)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for expected, actual in zip(run_plainly(copy.deepcopy(model), x), model(x)):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('mix', ['acmix', 'attn', 'conv'])
def test_any_size(mix):
    model = randomised(ACmixSAN(**TINY, mix=mix)).train()
    for height, width in ((1, 1), (1, 40), (3, 5), (33, 47)):
        with torch.no_grad():
            outs = model(torch.randn(2, 3, height, width))
        for index, out in enumerate(outs):
            stride = 4 * 2**index
            assert out.shape == (2, 128 * 2**index, -(-height // stride), -(-width // stride))
            assert out.isfinite().all()


@pytest.mark.parametrize('size', [(8, 8), (9, 5), (1, 3)], ids=str)
def test_layer_equals_reference_forms(size, monkeypatch):
    """The module as it runs against the same module on the reference form of each operator."""
    layer = randomised(PatchwiseACmix(32, 2, 8, 7)).double().eval()
    x = torch.randn(2, 32, *size, dtype=torch.float64, requires_grad=True)
    fast = layer(x)
    gradient, = torch.autograd.grad(fast.sin().sum(), x)
    for module, name in ((conv_path, 'shift_conv'), (patchwise_module, 'patch_features'),
                         (patchwise_module, 'patch_aggregation')):
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, functools.partial(operator, backend='reference'))
    slow = layer(x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradient, torch.autograd.grad(slow.sin().sum(), x)[0])


def test_pieces_of_equal_width_go_into_the_fc():
    """q is one map of two channels, k one and v four; the output's channels go (channel, head)."""
    layer = PatchwiseACmix(32, 2, 8, 7, mix='conv')
    x = torch.randn(1, 32, 1, 1)
    pieces = torch.cat([conv(x) for conv in (layer.conv1, layer.conv2, layer.conv3)], 1).view(6, 2)
    # On a map of one position only the middle shift stays inside.
    mixed = layer.fc.matrix[4] @ pieces
    torch.testing.assert_close(layer(x).view(2, 4), mixed[:, None].expand(2, 4))


def test_paths_add_up():
    both = randomised(PatchwiseACmix(32, 2, 8, 7)).eval()
    x = torch.randn(2, 32, 6, 5)
    parts = []
    for mix in ('attn', 'conv'):
        part = PatchwiseACmix(32, 2, 8, 7, mix=mix).eval()
        assert not part.load_state_dict(both.state_dict(), strict=False).missing_keys
        assert not [name for name, _ in part.named_parameters() if 'rate' in name]
        parts.append(part(x))
    torch.testing.assert_close(both(x), both.rate1 * parts[0] + both.rate2 * parts[1])


# Published: plain 11.8M, 16.2M, 20.5M; ACmix 12.1M, 16.6M, 21.2M and 1.9G, 2.7G, 3.4G.
COUNTS = [
    (10, 'attn', 11.84, 1.865), (15, 'attn', 16.18, 2.583), (19, 'attn', 20.52, 3.259),
    (10, 'acmix', 11.99, 1.922), (15, 'acmix', 16.41, 2.671), (19, 'acmix', 20.83, 3.368),
]


@pytest.mark.parametrize(('depth', 'mix', 'parameters', 'multiply_adds'), COUNTS)
def test_counts_with_a_head_of_1000_classes(depth, mix, parameters, multiply_adds):
    """At 224×224, with what the tool of SAN's authors counts beside matrix products."""
    with torch.device('meta'):
        model = ACmixSAN(depth, mix=mix).eval()
        image = torch.empty(1, 3, 224, 224)
    beside = []

    def count(module, inputs, out):
        if isinstance(module, PatchwiseACmix):
            positions = out[0, 0].numel()
            norm, *_, mixing, last = (each for each in module.conv_w if list(each.parameters()))
            area = module.kernel_size**2
            # One for the aggregation, three for a norm and the ReLU behind it, one for a bias.
            beside.append(positions * (
                area * out.shape[1] + 3 * (norm.num_features + mixing.num_features) +
                last.out_channels + 2 * module.rel_channels + out.shape[1]))
        elif isinstance(module, nn.BatchNorm2d):
            beside.append(3 * out[0].numel())
        elif isinstance(module, nn.MaxPool2d):
            beside.append(inputs[0].numel())
        elif isinstance(module, ACmixSANBlock):
            beside.append(out[0].numel())

    for name, module in model.named_modules():
        if 'conv_w' not in name:
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counted = sum(parameter.numel() for parameter in model.parameters()) + 2048 * 1000 + 1000
    assert counted / 1e6 == pytest.approx(parameters, abs=0.006)
    counted = counter.get_total_flops() / 2 + sum(beside) + 2048 * 1000
    assert counted / 1e9 == pytest.approx(multiply_adds, abs=0.003)


@pytest.mark.parametrize('mix', ['acmix', 'attn', 'conv'])
def test_every_parameter_gets_a_gradient(mix):
    model = ACmixSAN(**TINY, mix=mix)
    model.init_weights()
    sum(out.square().sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    still = [name for name, parameter in model.named_parameters()
             if parameter.grad is None or not parameter.grad.any()]
    assert not still


def test_starts_with_shift_kernels_and_rates_of_one_half():
    model = ACmixSAN(**TINY)
    model.init_weights()
    layers = [module for module in model.modules() if isinstance(module, PatchwiseACmix)]
    assert len(layers) == 10
    for layer in layers:
        assert layer.rate1.item() == layer.rate2.item() == 0.5
        one_hot = torch.eye(9).view(9, 3, 3)
        assert all(torch.equal(kernels, one_hot) for kernels in layer.dep_conv.weight)


def test_frozen_stages_stay_frozen():
    model = ACmixSAN(**TINY, frozen_stages=2)
    assert model.train() is model
    frozen = ('conv_in', 'bn_in', 'conv0', 'layer0', 'bn0', 'conv1', 'layer1', 'bn1')
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    assert not model.layer1.training
    assert model.layer2.training
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) == name.startswith(frozen), name


def test_norm_eval_keeps_statistics():
    model = ACmixSAN(**TINY, norm_eval=True).train()
    assert not [module for module in model.modules()
                if isinstance(module, _BatchNorm) and module.training]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(1, 3, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_checkpointing_changes_nothing_but_memory():
    x = torch.randn(1, 3, 40, 36, requires_grad=True)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = ACmixSAN(**TINY, with_cp=with_cp, norm_eval=True).train()
        gradients.append(torch.autograd.grad(sum(out.square().sum() for out in model(x)),
                                             [x, *model.parameters()]))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


def test_stochastic_depth_drops_whole_residuals_in_training():
    model = ACmixSAN(**TINY, drop_path_rate=0.5)
    blocks = [module for module in model.modules() if isinstance(module, ACmixSANBlock)]
    rates = [block.drop.drop_prob for block in blocks]
    assert rates == torch.linspace(0, 0.5, len(blocks)).tolist()
    x = torch.randn(1, blocks[-1].conv.out_channels, 6, 5).expand(32, -1, -1, -1)
    with torch.no_grad():
        actual = blocks[-1](x)
        blocks[-1].drop = nn.Identity()
        residual = blocks[-1](x) - x
    kept = [bool((each - x[0]).abs().max() > 1e-3) for each in actual]
    assert 4 < sum(kept) < 28
    for each, is_kept in zip(actual, kept):
        torch.testing.assert_close(each, (x + 2 * is_kept * residual)[0], rtol=1e-4, atol=1e-4)


def pretrained(path, **arguments):
    model = ACmixSAN(**{**TINY, **arguments},
                     init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model.eval()


@pytest.mark.parametrize('nest', [dict, lambda weights: dict(state_dict=weights)])
def test_plain_san_computes_the_same_at_first(nest, tmp_path):
    plain = calibrated(ACmixSAN(**TINY, mix='attn'))
    weights = {f'module.{key}': value for key, value in plain.state_dict().items()}
    weights['module.fc.weight'] = torch.zeros(10, 1024)
    torch.save(nest(weights), tmp_path / 'san.pth')
    model = pretrained(tmp_path / 'san.pth').double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for expected, actual in zip(run_plainly(plain.double(), x), model(x)):
            torch.testing.assert_close(actual, expected)
    for module in model.modules():
        if isinstance(module, PatchwiseACmix):
            assert (module.rate1.item(), module.rate2.item()) == (1, 0)


def test_own_checkpoint_round_trip(tmp_path):
    model = randomised(ACmixSAN(**TINY))
    torch.save(dict(state_dict={f'backbone.{key}': value
                                for key, value in model.state_dict().items()}),
               tmp_path / 'acmix.pth')
    loaded = pretrained(tmp_path / 'acmix.pth')
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_refuses_checkpoints_of_other_networks(tmp_path):
    torch.save({'conv1.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='of no known network'):
        pretrained(tmp_path / 'other.pth')
    torch.save(ACmixSAN(**TINY, mix='attn').state_dict(), tmp_path / 'shallow.pth')
    with pytest.raises(CheckpointError, match='missing'):
        pretrained(tmp_path / 'shallow.pth', depth=15)


def test_half_precision_and_autocast():
    layer = randomised(PatchwiseACmix(32, 2, 8, 7)).eval()
    x = torch.randn(1, 32, 9, 13)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert relative_error(layer(x).float(), expected) < 0.05
    for dtype in (torch.bfloat16, torch.float16):
        out = layer.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        assert relative_error(out.float(), expected) < 0.05
    model = ACmixSAN(**TINY).train()
    with torch.autocast('cpu', torch.bfloat16):
        sum(out.float().square().sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_stage_blocks_take_the_place_of_a_depth():
    blocks = (1, 2, 1, 3, 1)
    model = ACmixSAN(**{**TINY, 'stage_blocks': blocks})
    assert tuple(len(model.parts(stage)[1]) for stage in range(5)) == blocks


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(mix='both'), 'mix must be one of acmix, attn, conv'),
    (dict(depth=50), 'depth must be one of 10, 15, 19, got 50; other depths go by stage_blocks'),
    (dict(stage_blocks=(1, 2)), r'stage_blocks needs one number .* 5 stages, got \(1, 2\)'),
    (dict(base_channels=48), 'base_channels must be a multiple of 32, got 48'),
    (dict(out_indices=(1, 5)), r'out_indices must lie in \[0, 5\)'),
    (dict(norm_cfg=dict(type='GN', num_groups=1)), 'take a batch norm, got GroupNorm'),
    (dict(init_cfg=dict(type='Normal')), 'take init_cfg=dict'),
])
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixSAN(**{**TINY, **arguments})


@pytest.mark.parametrize(('arguments', 'message'), [
    ((32, 3, 8, 7), 'rel_channels and 8 must divide out_channels, got 3 for 8'),
    ((32, 2, 12, 7), 'rel_channels and 8 must divide out_channels'),
    ((32, 2, 8, 4), 'kernel_size must be odd, got 4'),
])
def test_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchwiseACmix(*arguments)


def test_layer_keeps_no_copies_for_the_backward_pass():
    """Nothing that is saved exceeds the input; the copied keys alone are three times as large."""
    layer = PatchwiseACmix(64, 4, 16, 7)
    x = torch.randn(1, 64, 20, 30, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each.numel()) or each,
                                                  lambda each: each):
        layer(x)
    assert len(saved) > 10
    assert max(saved) <= x.numel()
