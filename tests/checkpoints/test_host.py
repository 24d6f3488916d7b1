"""What hosts declare about their checkpoints."""

import re

import pytest
import torch

from acmix_mm.backbones.base import BACKBONES
from acmix_mm.checkpoints import HOSTS, HostCheckpoints
from acmix_mm.checkpoints.host import stage_of_layer


@pytest.mark.parametrize(('layer', 'host', 'stage'), [
    ('stages.1.blocks.0.attn.w_msa', 'Swin', 'stage 1'),
    ('layers.1.blocks.0.attn', 'Swin', 'stage 1'),
    ('layers.2.1.10.attn', 'PVT', 'stage 2'),
    ('layer0.0.sam', 'SAN', 'stage 0'),
    ('layer1.0.sam', 'SAN', 'stage 1'),
    ('layer1.0.conv2', 'ResNet', 'stage 0'),
    ('layer4.12.conv2', 'ResNet', 'stage 3'),
])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_stage_of_layer(layer, host, stage, prefix):
    assert stage_of_layer(prefix + layer) == stage
    assert [name for name, checkpoints in HOSTS.items()
            if checkpoints.acmix_layer.search(prefix + layer)] == [host]


@pytest.mark.parametrize('layer', ['neck.fpn_convs.10.conv', 'decode_head.convs.0.conv', 'conv2',
                                   'roi_head.shared_head.layer4.0.conv2'])
def test_layers_outside_of_stages(layer):
    assert stage_of_layer(layer) is None


@pytest.mark.parametrize(('keys', 'host'), [
    ('patch_embed.projection.weight stages.0.blocks.0.norm1.weight', 'Swin'),
    ('patch_embed.proj.weight layers.0.blocks.0.norm1.weight', 'Swin'),
    ('layers.0.0.projection.weight', 'PVT'),
    ('patch_embed1.proj.weight block1.0.attn.q.weight block1.0.attn.kv.weight', 'PVT'),
    ('conv1.weight layer1.0.conv1.weight', 'ResNet'),
    ('stem.0.weight layer1.0.conv1.weight', 'ResNet'),
    ('conv1.0.weight layer1.0.conv1.weight', 'ResNet'),
    ('conv_in.weight layer0.0.sam.conv1.weight', 'SAN'),
    ('conv1.weight bn1.weight', None),
])
def test_one_host_recognises_a_checkpoint(keys, host):
    state_dict = {key: torch.zeros(1) for key in keys.split()}
    assert [name for name, checkpoints in HOSTS.items()
            if checkpoints.to_backbone_keys(state_dict)] == ([host] if host else [])


def test_every_backbone_has_checkpoints():
    assert {host: backbone.checkpoints for host, backbone in BACKBONES.items()} == HOSTS


def test_subclass_registers_itself():
    class NewCheckpoints(HostCheckpoints):
        host = 'New'
        acmix_layer = re.compile(r'blocks(?P<stage>\d+)\.mixer\b')
        first_stage = 2

        def to_backbone_keys(self, state_dict):
            return None

        def backbone_arguments(self, state_dict):
            return {}

    try:
        assert isinstance(HOSTS['New'], NewCheckpoints)
        assert stage_of_layer('blocks2.mixer') == 'stage 0'
        assert HOSTS['New'].is_acmix({'blocks2.mixer.fc.weight': torch.zeros(1)})
        assert not HOSTS['New'].is_acmix({'blocks2.fc.weight': torch.zeros(1)})
    finally:
        del HOSTS['New']
