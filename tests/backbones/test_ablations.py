"""The backbones with the paper's ablations: their options, and starting from other weights."""

import pytest
import torch

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.layers.base import COMBINATIONS

BACKBONES = {
    'Swin': (ACmixSwinTransformer, dict(embed_dims=12, depths=(2, 2), num_heads=(3, 6),
                                        strides=(4, 2), out_indices=(0, 1))),
    'ResNet': (ACmixResNet, dict(depth=26, base_channels=8, stage_blocks=(1, 1, 1, 1))),
    'PVT': (ACmixPyramidVisionTransformer, dict(embed_dims=4, num_layers=[1, 1, 1, 1])),
    'SAN': (ACmixSAN, dict(depth=10, base_channels=32)),
}


@pytest.mark.parametrize('host', BACKBONES)
def test_options(host, tmp_path):
    network, arguments = BACKBONES[host]
    options = dict(combine='convex', shift='fixed', shift_groups=1)
    model = network(**arguments, acmix_cfg=options)
    outs = model(torch.randn(2, 3, 64, 64))
    sum(out.square().mean() for out in outs).backward()
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith('.rate1') for name in names)
    assert not any(name.endswith(('.rate2', '.dep_conv.weight')) for name in names)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    loaded = network(**arguments, acmix_cfg=options,
                     init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')))
    loaded.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize('combine', COMBINATIONS)
@pytest.mark.parametrize('host', ['Swin', 'ResNet'])
def test_plain_weights(combine, host, tmp_path, log_text):
    """The model starts as the host if a rate can disable the new path, and warns otherwise."""
    network, arguments = BACKBONES[host]
    plain = network(**arguments, **(dict(acmix_stages=()) if host == 'ResNet' else
                                    dict(mix='attn')))
    if host == 'ResNet':
        # With few input channels, the convolution path represents the kernel exactly.
        torch.nn.init.zeros_(plain.layer1[0].conv2.weight[:, 2:].data)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = network(**arguments, acmix_cfg=dict(combine=combine), init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'plain.pth')))
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    expected, actual = plain.eval()(x)[0], model.eval()(x)[0]
    is_same = torch.allclose(actual, expected, rtol=1e-4, atol=1e-4)
    assert is_same == (combine != 'sum')
    if combine == 'sum':
        expected = 'There are no rates' if host == 'Swin' else 'dropped: layer1.0.conv2.weight'
        assert expected in log_text()


@pytest.mark.parametrize('mix', ['attn', 'conv'])
def test_single_path_from_weights_with_rates(mix, tmp_path):
    network, arguments = BACKBONES['Swin']
    saved = network(**arguments, acmix_cfg=dict(combine='convex')).eval()
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if name.endswith('.rate1'):
                parameter.fill_(1 if mix == 'attn' else 0)
    torch.save(saved.state_dict(), tmp_path / 'convex.pth')
    model = network(**arguments, mix=mix, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'convex.pth')))
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    for expected, actual in zip(saved(x), model.eval()(x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
