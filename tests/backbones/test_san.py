"""ACmix-SAN against plain SAN with explicit copies, and the published counts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import load_pretrained
from helpers.weights import patchwise_attention, randomised
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.backbones import ACmixSAN
from acmix_mm.backbones.san import ACmixSANBlock
from acmix_mm.layers import PatchwiseACmix

TINY = dict(depth=10, base_channels=32)


def calibrated(model, size=(64, 96)):
    """Set random weights, the statistics of one batch, and evaluation mode.

    Attention weights are linear in their input, so with other statistics the maps would overflow.
    """
    model = randomised(model).train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(2, 3, *size))
    return model.eval()


def plain_san(model, x):
    """Compute plain SAN with the weights of ``model``, whose ``mix`` is 'attn'."""
    x = model.bn_in(model.conv_in(x)).relu()
    outs = []
    for stage in range(5):
        conv, layer, norm = model.parts(stage)
        x = conv(F.max_pool2d(x, 2))
        for block in layer:
            out = patchwise_attention(block.sam, block.bn1(x).relu())
            x = x + block.conv(block.bn2(out).relu())
        x = norm(x).relu()
        outs.append(x)
    return outs[1:]


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_attention_equals_plain_san(training):
    model = calibrated(ACmixSAN(**TINY, mix='attn')).double().train(training)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for expected, actual in zip(plain_san(copy.deepcopy(model), x), model(x)):
            torch.testing.assert_close(actual, expected)


# Published: plain 11.8M, 16.2M, 20.5M; ACmix 12.1M, 16.6M, 21.2M and 1.9G, 2.7G, 3.4G.
COUNTS = [
    (10, 'attn', 11.84, 1.865), (15, 'attn', 16.18, 2.583), (19, 'attn', 20.52, 3.259),
    (10, 'acmix', 11.99, 1.922), (15, 'acmix', 16.41, 2.671), (19, 'acmix', 20.83, 3.368),
]


@pytest.mark.parametrize(('depth', 'mix', 'parameters', 'multiply_adds'), COUNTS)
def test_counts_with_a_classifier_of_1000_classes(depth, mix, parameters, multiply_adds):
    """At 224×224, including the elementwise operations that the tool of SAN's authors counts."""
    with torch.device('meta'):
        model = ACmixSAN(depth, mix=mix).eval()
        image = torch.empty(1, 3, 224, 224)
    elementwise = []

    def count(module, inputs, out):
        if isinstance(module, PatchwiseACmix):
            positions = out[0, 0].numel()
            norm, *_, mixing, last = (each for each in module.conv_w if list(each.parameters()))
            area = module.kernel_size**2
            # One for the aggregation, three for a norm and the following ReLU, one for a bias.
            elementwise.append(positions * (
                area * out.shape[1] + 3 * (norm.num_features + mixing.num_features) +
                last.out_channels + 2 * module.rel_channels + out.shape[1]))
        elif isinstance(module, nn.BatchNorm2d):
            elementwise.append(3 * out[0].numel())
        elif isinstance(module, nn.MaxPool2d):
            elementwise.append(inputs[0].numel())
        elif isinstance(module, ACmixSANBlock):
            elementwise.append(out[0].numel())

    for name, module in model.named_modules():
        if 'conv_w' not in name:
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counted = sum(parameter.numel() for parameter in model.parameters()) + 2048 * 1000 + 1000
    assert counted / 1e6 == pytest.approx(parameters, abs=0.006)
    counted = counter.get_total_flops() / 2 + sum(elementwise) + 2048 * 1000
    assert counted / 1e9 == pytest.approx(multiply_adds, abs=0.003)


def test_initial_shift_kernels_and_rates():
    model = ACmixSAN(**TINY)
    model.init_weights()
    layers = [module for module in model.modules() if isinstance(module, PatchwiseACmix)]
    assert len(layers) == 10
    for layer in layers:
        assert layer.rate1.item() == layer.rate2.item() == 0.5
        one_hot = torch.eye(9).view(9, 3, 3)
        assert all(torch.equal(kernels, one_hot) for kernels in layer.dep_conv.weight)


def test_norm_eval_keeps_statistics():
    model = ACmixSAN(**TINY, norm_eval=True).train()
    assert not [module for module in model.modules()
                if isinstance(module, _BatchNorm) and module.training]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(1, 3, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


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


@pytest.mark.parametrize('container', [dict, lambda weights: dict(state_dict=weights)])
def test_initial_outputs_equal_the_loaded_plain_san(container, tmp_path):
    plain = calibrated(ACmixSAN(**TINY, mix='attn'))
    weights = {f'module.{key}': value for key, value in plain.state_dict().items()}
    weights['module.fc.weight'] = torch.zeros(10, 1024)
    torch.save(container(weights), tmp_path / 'san.pth')
    model = load_pretrained(ACmixSAN, tmp_path / 'san.pth', **TINY).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        for expected, actual in zip(plain_san(plain.double(), x), model(x)):
            torch.testing.assert_close(actual, expected)
    for module in model.modules():
        if isinstance(module, PatchwiseACmix):
            assert (module.rate1.item(), module.rate2.item()) == (1, 0)


def test_autocast():
    model = ACmixSAN(**TINY).train()
    with torch.autocast('cpu', torch.bfloat16):
        sum(out.float().square().sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_stage_blocks_override_depth():
    blocks = (1, 2, 1, 3, 1)
    model = ACmixSAN(**{**TINY, 'stage_blocks': blocks})
    assert tuple(len(model.parts(stage)[1]) for stage in range(5)) == blocks


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(mix='both'), 'mix must be one of acmix, attn, conv'),
    (dict(depth=50), 'depth must be one of 10, 15, 19, got 50; for other depths set stage_blocks'),
    (dict(stage_blocks=(1, 2)), r'stage_blocks needs one number .* 5 stages, .*, got \(1, 2\)'),
    (dict(base_channels=48), 'base_channels must be a multiple of 32, got 48'),
    (dict(out_indices=(1, 5)), r'out_indices must lie in \[0, 5\)'),
    (dict(norm_cfg=dict(type='GN', num_groups=1)), 'take a batch norm, got GroupNorm'),
    (dict(init_cfg=dict(type='Normal')), 'take init_cfg=dict'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixSAN(**{**TINY, **arguments})
