"""What a backbone makes of the weights of its plain host, whoever saved them and however."""

import re

import mmdet.models.backbones.resnet as mmdet_resnet
import mmdet.models.backbones.swin as mmdet_swin
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from helpers import relative_error
from helpers.checkpoints import PVT, SWIN, randomised
from mmengine.logging import HistoryBuffer

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.checkpoints.convolution import (
    NEIGHBOUR_CORRELATION,
    approximate_convolution,
    relu_statistics,
)
from acmix_mm.checkpoints.recognition import read_pretrained
from acmix_mm.layers import ACmixConv2d
from acmix_mm.utils.errors import CheckpointError

RESNET = dict(depth=26, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1),
              out_indices=(0, 1), zero_init_residual=False)
SAN = dict(depth=10, base_channels=32)


def start(network, path, **arguments):
    model = network(**arguments, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    model.eval()
    return model


@torch.no_grad()
def test_timm_swin(tmp_path, said):
    plain = randomised(timm.create_model(
        'swin_tiny_patch4_window7_224', img_size=112, embed_dim=12, depths=(2, 2),
        num_heads=(3, 6), num_classes=3))
    torch.save(plain.state_dict(), tmp_path / 'swin.pth')
    model = start(ACmixSwinTransformer, tmp_path / 'swin.pth', **SWIN)
    x = torch.randn(2, 3, 112, 112)
    maps = plain.forward_intermediates(x, intermediates_only=True, norm=False)
    for expected, actual in zip(maps, model(x)):
        # The output norms, which start as the plain layer norm, are this network's own.
        normed = F.layer_norm(expected.movedim(1, 3), expected.shape[1:2]).movedim(3, 1)
        assert relative_error(actual, normed) < 1e-5
    assert "recognised as plain Swin, timm's naming" in said()
    dropped = said().split('dropped: ')[1].split('\n')[0]
    assert dropped == 'norm.weight, norm.bias, head.fc.weight, head.fc.bias'


def plain_resnet(kind):
    """A small ResNet of another project, and the arguments that make ACmix-ResNet its twin."""
    if kind == 'torchvision':
        plain = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 4, 1])
        return plain, dict(depth=26)
    if kind == 'timm, deep stem':
        plain = timm.create_model('resnet26d', layers=(1, 2, 4, 1))
        return plain, dict(depth=26, deep_stem=True, avg_down=True)
    return mmdet_resnet.ResNet(50, base_channels=8), dict(depth=50, base_channels=8)


def stages(plain, x):
    """The outputs of the four stages, by the names that all these projects share."""
    maps = []
    hooks = [getattr(plain, f'layer{stage}').register_forward_hook(
        lambda module, inputs, out: maps.append(out)) for stage in range(1, 5)]
    plain(x)
    for hook in hooks:
        hook.remove()
    return maps


@torch.no_grad()
@pytest.mark.parametrize('kind', ['torchvision', 'timm, deep stem', 'MMDetection'])
def test_plain_resnets(kind, tmp_path, said):
    """Where nothing is replaced, the start is the host itself."""
    plain, arguments = plain_resnet(kind)
    randomised(plain)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = start(ACmixResNet, tmp_path / 'resnet.pth', **arguments, acmix_stages=())
    x = torch.randn(1, 3, 64, 80)
    for expected, actual in zip(stages(plain, x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    naming = "timm's" if kind == 'timm, deep stem' else "torchvision's"
    assert f'recognised as plain ResNet, {naming} naming' in said()


def within_reach(kernel, num_heads):
    """The kernel nearest to a random one that the convolution path has exactly."""
    return approximate_convolution(kernel, num_heads).kernel


@torch.no_grad()
@pytest.mark.parametrize('mix', ['acmix', 'conv'])
def test_resnet_is_exact_where_kernels_are_within_reach(mix, tmp_path, said):
    plain = randomised(torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 4, 1]))
    for name, parameter in plain.named_parameters():
        if re.search(r'layer.*conv2\.weight$', name):
            parameter.copy_(within_reach(parameter, 4))
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = start(ACmixResNet, tmp_path / 'resnet.pth', depth=26, mix=mix)
    x = torch.randn(1, 3, 70, 64)
    for expected, actual in zip(stages(plain, x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    assert 'layer3.3 0%' in said()


def correlated(*shape, factor):
    """Unit normal maps whose neighbours along either axis have a correlation of ``factor``."""
    maps = torch.randn(shape)
    for axis in (2, 3):
        columns = list(maps.unbind(axis))
        for index in range(1, len(columns)):
            columns[index] = factor * columns[index - 1] + (1 - factor**2)**0.5 * columns[index]
        maps = torch.stack(columns, axis)
    return maps


@torch.no_grad()
def test_what_resnet_loses_is_what_the_log_says(tmp_path, said):
    """Measured on inputs that vary as the norm before, and the assumed correlation, have it."""
    plain = randomised(torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 2, 4, 1]), std=0.3)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = start(ACmixResNet, tmp_path / 'resnet.pth', depth=26)
    theirs, ours = plain.layer3[1], model.layer3[1]
    mean, deviation = relu_statistics(theirs.bn1.weight, theirs.bn1.bias)
    x = correlated(4, 256, 48, 48, factor=NEIGHBOUR_CORRELATION)
    x = x * deviation[:, None, None] + mean[:, None, None]
    expected = theirs.bn2(theirs.conv2(x))[..., 1:-1, 1:-1]
    difference = ours.bn2(ours.conv2(x))[..., 1:-1, 1:-1] - expected
    told = float(re.search(r'layer3\.1 (\d+)%', said())[1]) / 100
    variance = expected.var((0, 2, 3)).sum()
    assert abs((difference.var((0, 2, 3)).sum() / variance).sqrt() - told) < 0.02
    # The running mean of the norm behind has taken up what would shift the outputs.
    assert difference.mean((0, 2, 3)).square().sum() < 2e-3 * variance


def test_nearest_expression_is_stationary():
    """No parameter of the path can lessen the weighted error any further."""
    kernel = torch.randn(12, 20, 3, 3, dtype=torch.double)
    scales = torch.rand(20, dtype=torch.double) + 0.1, torch.rand(12, dtype=torch.double) + 0.1
    approximation = approximate_convolution(kernel, 4, *scales)
    layer = ACmixConv2d(20, 12, num_heads=4, mix='conv', bias=False).double()
    layer.load_state_dict(approximation.parameters)
    # The response to an impulse in each input channel is the kernel, mirrored.
    impulses = torch.zeros(20, 20, 5, 5, dtype=torch.double)
    impulses[range(20), range(20), 2, 2] = scales[0]
    made = layer(impulses)
    wanted = F.conv2d(impulses, kernel, padding=1)
    error = ((made - wanted) * scales[1][:, None, None]).square().sum()
    whole = (wanted * scales[1][:, None, None]).square().sum()
    assert approximation.error == pytest.approx((error / whole).sqrt().item())
    assert 0.1 < approximation.error < 0.9
    error.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() < 1e-9 * whole, name


@pytest.mark.parametrize('num_heads', [1, 2, 4])
def test_few_channels_are_expressed_exactly(num_heads):
    kernel = torch.randn(8, 3, 3, 3)
    approximation = approximate_convolution(kernel, num_heads)
    assert approximation.error < 1e-6
    layer = ACmixConv2d(3, 8, num_heads=num_heads, mix='conv', bias=False)
    layer.load_state_dict(approximation.parameters)
    x = torch.randn(2, 3, 6, 7)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, padding=1))


def test_pruned_kernels():
    approximation = approximate_convolution(torch.zeros(8, 16, 3, 3), 4)
    assert approximation.error == 0
    assert all(value.isfinite().all() for value in approximation.parameters.values())


def test_statistics_behind_a_relu():
    weight, bias = torch.tensor([0.5, 2., -1., 0.]), torch.tensor([0.3, -1., 0., 0.7])
    mean, deviation = relu_statistics(weight, bias)
    drawn = (torch.randn(1_000_000, 4) * weight + bias).relu()
    torch.testing.assert_close(mean, drawn.mean(0), rtol=0.01, atol=0.003)
    torch.testing.assert_close(deviation, drawn.std(0), rtol=0.01, atol=0.003)


PATHS = {
    'Swin': (ACmixSwinTransformer, SWIN, 'rate2', r'\.(fc|dep_conv)\.'),
    'PVT': (ACmixPyramidVisionTransformer, PVT, 'rate2', r'\.attn\.(fc|dep_conv)\.'),
    'SAN': (ACmixSAN, SAN, 'rate2', r'\.sam\.(fc|dep_conv)\.'),
    # There it is attention that sleeps at first.
    'ResNet': (ACmixResNet, RESNET, 'rate1', r'\.conv_p\.weight'),
}


@pytest.mark.parametrize('host', PATHS)
def test_idle_path_wakes_up(host, tmp_path):
    """Its rate, 0 at first, gets a gradient at the first step and its parameters at the second."""
    network, arguments, rate, path = PATHS[host]
    plain = dict(acmix_stages=()) if host == 'ResNet' else dict(mix='attn')
    torch.save(network(**arguments, **plain).state_dict(), tmp_path / 'plain.pth')
    model = start(network, tmp_path / 'plain.pth', **arguments)
    rates = [value for name, value in model.named_parameters() if name.endswith(rate)]
    parameters = {name: value for name, value in model.named_parameters() if re.search(path, name)}
    assert rates
    assert len(parameters) >= len(rates)
    assert all(value.item() == 0 for value in rates)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(1, 3, 64, 64)
    for step in (1, 2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(x)).backward()
        assert all(value.grad.abs() > 0 for value in rates)
        for name, value in parameters.items():
            assert (value.grad.abs().max() > 0) == (step == 2), name
        optimizer.step()


def wrapped(kind, weights, other):
    """Weights as a training run keeps them, beside others that are not to be taken."""
    history = HistoryBuffer()
    history.update(0.5)
    return {
        'DDP and torch.compile': {f'module._orig_mod.{key}': value
                                  for key, value in weights.items()},
        'DeiT': dict(model=other, model_ema=weights, epoch=3),
        'timm': dict(state_dict=other, state_dict_ema={f'module.{key}': value
                                                       for key, value in weights.items()}),
        'MMEngine': dict(state_dict={f'backbone.{key}': value for key, value in weights.items()},
                         ema_state_dict={f'module.backbone.{key}': value
                                         for key, value in other.items()},
                         message_hub=dict(log_scalars={'train/loss': history})),
    }[kind]


@pytest.mark.parametrize(('kind', 'part'), [
    ('DDP and torch.compile', ''), ('DeiT', ', the averaged weights in model_ema'),
    ('timm', ', the averaged weights in state_dict_ema'), ('MMEngine', ', its backbone'),
])
def test_takes_the_right_weights_out_of_a_training_run(kind, part, tmp_path, said):
    plain, other = (randomised(mmdet_swin.SwinTransformer(**SWIN)).state_dict() for _ in range(2))
    torch.save(wrapped(kind, plain, other), tmp_path / 'run.pth')
    model = start(ACmixSwinTransformer, tmp_path / 'run.pth', **SWIN).state_dict()
    for key, value in plain.items():
        assert torch.equal(model[key], value), key
    assert f"recognised as plain Swin, MMDetection's naming{part}." in said()


@pytest.mark.parametrize('content', ['good', 'truncated', 'empty', 'text'])
def test_safetensors(content, tmp_path):
    from safetensors.torch import save_file
    plain = randomised(mmdet_swin.SwinTransformer(**SWIN))
    path = tmp_path / 'swin.safetensors'
    save_file(plain.state_dict(), path)
    if content == 'good':
        model = start(ACmixSwinTransformer, path, **SWIN)
        x = torch.randn(1, 3, 84, 68)
        for expected, actual in zip(plain(x), model(x)):
            assert relative_error(actual, expected) < 1e-5
        return
    path.write_bytes({'truncated': path.read_bytes()[:-2000], 'empty': b'',
                      'text': b'<html>404: not found</html>'}[content])
    with pytest.raises(CheckpointError, match=rf'{re.escape(str(path))} cannot be read .*damaged'):
        start(ACmixSwinTransformer, path, **SWIN)


def test_says_which_other_network_it_is(tmp_path):
    torch.save(randomised(ACmixPyramidVisionTransformer(**PVT)).state_dict(), tmp_path / 'pvt.pth')
    with pytest.raises(CheckpointError, match=r"another network \(ACmix-PVT, MMDetection's naming"
                                              r'\).* one of a Swin, plain or ACmix'):
        start(ACmixSwinTransformer, tmp_path / 'pvt.pth', **SWIN)
    assert read_pretrained(str(tmp_path / 'pvt.pth')).host == 'PVT'
