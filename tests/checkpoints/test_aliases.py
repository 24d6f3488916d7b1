"""Checkpoints by the names that the configs of OpenMMLab use, as MMEngine resolves them."""

import re
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
import torchvision
from helpers.checkpoints import load_pretrained
from mmengine.runner.checkpoint import (
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from mmseg.models.backbones import ResNetV1c, ResNetV1d

from acmix_mm.backbones import ACmixResNet, ACmixResNetV1c, ACmixResNetV1d
from acmix_mm.checkpoints import read_checkpoint
from acmix_mm.utils.errors import CheckpointError

URLS = {'torchvision': get_torchvision_models, 'open-mmlab': get_external_models,
        'mmcls': get_mmcls_models}


@pytest.fixture
def download(tmp_path, monkeypatch):
    """A function that puts a checkpoint where torch.hub keeps the download of an alias."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)

    def write(alias, checkpoint):
        scheme, name = alias.split('://')
        torch.save(checkpoint, folder / Path(urlparse(URLS[scheme]()[name]).path).name)

    return write


def narrow_weights(network):
    """Random weights of a network on the meta device, with an eighth of its channels."""
    state_dict = {}
    for key, value in network.state_dict().items():
        shape = [side // 8 if side in (32, 64) or side % 128 == 0 else side for side in value.shape]
        state_dict[key] = torch.rand(shape).to(value.dtype)
    return state_dict


def meta(network, **arguments):
    with torch.device('meta'):
        return network(**arguments)


def check_loaded(network, alias, expected, log_text, **arguments):
    """Load an alias where the last stage has ACmix; compare all weights outside of that stage."""
    model = load_pretrained(network, alias, base_channels=8, acmix_stages=(3,), **arguments)
    own = model.state_dict()
    kept = [key for key in own if not key.startswith('layer4')]
    assert {key for key in expected if not key.startswith('layer4')} >= set(kept)
    for key in kept:
        assert torch.equal(own[key], expected[key]), key
    last = max(key for key in own if re.fullmatch(r'layer4\.\d\.conv1\.weight', key))
    assert torch.equal(own[last], expected[last])
    return log_text()


@pytest.mark.parametrize('depth', [18, 34, 50, 101, 152])
def test_torchvision_resnets(depth, download, log_text):
    name = f'resnet{depth}'
    weights = narrow_weights(meta(getattr(torchvision.models, name)))
    download(f'torchvision://{name}', weights)
    log = check_loaded(ACmixResNet, f'torchvision://{name}', weights, log_text, depth=depth)
    assert "recognised as plain ResNet, torchvision's naming" in log
    assert 'layer4.0 ' in log and 'dropped: fc.weight, fc.bias' in log


@pytest.mark.parametrize('depth', [18, 50, 101])
def test_v1c_of_openmmlab(depth, download, log_text):
    alias = f'open-mmlab://resnet{depth}_v1c'
    weights = narrow_weights(meta(ResNetV1c, depth=depth))
    head = {'fc.weight': torch.zeros(10, 256), 'fc.bias': torch.zeros(10)}
    download(alias, dict(state_dict={**weights, **head}, meta=dict(epoch=100)))
    log = check_loaded(ACmixResNetV1c, alias, weights, log_text, depth=depth)
    assert 'dropped: fc.weight, fc.bias' in log


def test_v1d_of_mmpretrain(download, log_text):
    """Its stem has modules of a convolution and a norm."""
    alias = 'mmcls://resnet50_v1d'
    weights = narrow_weights(meta(ResNetV1d, depth=50))
    renamed = {}
    for key, value in weights.items():
        if match := re.fullmatch(r'stem\.(\d)\.(.*)', key):
            module, layer = divmod(int(match[1]), 3)
            key = f'stem.{module}.{("conv", "bn")[layer]}.{match[2]}'
        renamed[f'backbone.{key}'] = value
    download(alias, dict(state_dict={**renamed, 'head.fc.weight': torch.zeros(10, 256)}))
    log = check_loaded(ACmixResNetV1d, alias, weights, log_text, depth=50)
    assert "MMPretrain's naming" in log


@pytest.mark.parametrize(('alias', 'biases'), [
    ('open-mmlab://detectron2/resnet50_caffe', r'conv1'),
    ('open-mmlab://detectron/resnet50_caffe', r'(.*\.)?(conv\d|downsample\.0)'),
])
def test_biases_of_caffe_are_dropped(alias, biases, download, log_text):
    """As by MMDetection's ResNet, which has none."""
    weights = narrow_weights(meta(torchvision.models.resnet50))
    weights.update({f'{key.removesuffix(".weight")}.bias': torch.zeros(len(value))
                    for key, value in list(weights.items())
                    if re.fullmatch(rf'{biases}\.weight', key)})
    download(alias, weights)
    log = check_loaded(ACmixResNet, alias, weights, log_text, depth=50, style='caffe')
    assert re.search(r'dropped: fc\.weight, fc\.bias, conv1\.bias', log)


@pytest.mark.parametrize(('missing', 'expected', 'message'), [
    ('timm', CheckpointError, r'loaded through timm, which cannot be imported .* pip install timm'),
    ('acmix_mm.timm', ImportError, r'acmix_mm\.timm'),
])
def test_only_a_missing_timm_is_reported_as_such(missing, expected, message, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(expected, match=message):
        read_checkpoint('timm://resnet18')
