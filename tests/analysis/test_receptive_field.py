"""Effective receptive fields match exact gradients."""

import re
from collections import Counter

import cv2
import pytest
import torch
import torch.nn.functional as F
from helpers.analysis import SMALL
from helpers.tools import DETECTION
from torch import nn

from acmix_mm.analysis.receptive_field import (
    ReceptiveField,
    config_receptive_fields,
    gradient_energies,
    mixer_variants,
    network_label,
    smallest_square,
    unique_names,
)
from acmix_mm.engine.config import load_config
from acmix_mm.utils.errors import CheckpointError, UsageError


class Stages(nn.Module):

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


def test_receptive_field_of_convolutions():
    first, second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=2, dilation=2)
    nn.init.constant_(first.weight, 1)
    nn.init.constant_(second.weight, 1)
    one, both = gradient_energies(Stages(first, second), (20, 21), samples=3)
    # Exactly nine pixels with equal energy, around the centre of the output.
    assert sorted(Counter((one / one.max()).round(decimals=6).flatten().tolist()).items()) == [
        (0, 20 * 21 - 9), (1, 9)]
    assert torch.equal(one.nonzero().aminmax(dim=0)[0], torch.tensor([9, 9]))
    assert smallest_square(one) == (9, 9, 3)
    # With the dilated kernel on top: 7×7 pixels.
    assert int((both > 0).sum()) == 49
    assert both.nonzero().aminmax(dim=0)[1].tolist() == [13, 13]
    assert ReceptiveField('both', 1, both.numpy(), *smallest_square(both)).extent == 7


def test_receptive_field_is_the_squared_gradient():
    layer = nn.Conv2d(3, 1, 5, stride=4, padding=2)
    field, = gradient_energies(Stages(layer), (16, 16), samples=2)
    expected = layer.weight[0].double().square().sum(0)
    around = field[6:11, 6:11]
    torch.testing.assert_close(around / around.sum(), expected / expected.sum())
    assert field.sum() == around.sum()


def test_receptive_field_behind_a_norm_is_not_zero():
    """The channels after a layer norm have a constant sum, whose gradient is zero."""
    class NormOfChannels(nn.Module):
        def forward(self, x):
            return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)

    field, = gradient_energies(Stages(nn.Sequential(nn.Conv2d(3, 8, 1), NormOfChannels())), (6, 6),
                              samples=2)
    assert field[3, 3] > 1e-4


def test_smallest_square():
    energy = torch.rand(9, 13, dtype=torch.float64)**6
    for share in (0.3, 0.6, 0.9, 1.0):
        top, left, side = smallest_square(energy, share)
        windows = {length: [energy[y:y + length, x:x + length].sum() / energy.sum()
                            for y in range(10 - min(length, 9)) for x in range(14 - length)]
                   for length in (side - 1, side)}
        assert max(windows[side]) >= share - 1e-6
        assert max(windows[side - 1]) < share
        held = energy[top:top + side, left:left + side].sum() / energy.sum()
        assert held == pytest.approx(max(windows[side]))


def test_receptive_field_tool(detector, run_tool, tmp_path):
    checkpoint, _ = detector
    done = run_tool('tools/receptive_field.py', DETECTION, '--mixers', 'acmix', 'conv',
                    '--checkpoints', checkpoint, '--shape', 96, 128, '--samples', 2,
                    '--out', tmp_path / 'fields.png', '--cfg-options', *SMALL[:3])
    assert done.returncode == 0, done.stderr
    sides = [re.findall(r'(\d+) \((\d+)\) in stage (\d), stride (\d+)', line)
             for line in done.stdout.splitlines() if line.startswith('maskrcnn_acmix_swin, ')]
    assert [[(stage, step) for *_, stage, step in line] for line in sides] == [
        [('0', '4'), ('1', '8'), ('2', '16'), ('3', '32')]] * 2
    for line in sides:
        assert 4 <= int(line[0][0]) < int(line[2][0]) <= 128
        assert all(int(side) <= int(extent) <= 128 for side, extent, *_ in line)
    assert cv2.imread(str(tmp_path / 'fields.png')).std() > 10


def test_invalid_receptive_fields_are_rejected(detector):
    checkpoint, cfg = detector
    plain = load_config(DETECTION, {'model.backbone.type': 'mmdet.SwinTransformer'})
    with pytest.raises(UsageError, match='backbone SwinTransformer has no mixer to exchange'):
        mixer_variants(plain, ['attn'])
    with pytest.raises(CheckpointError, match="does not match the config's model"):
        config_receptive_fields(plain, (64, 64), 1, str(checkpoint))
    with pytest.raises(CheckpointError, match='does not fit this ACmixSwinTransformer'):
        config_receptive_fields(load_config(DETECTION), (64, 64), 1, str(checkpoint))
    made = mixer_variants(cfg, ['attn', 'involution'])
    assert [(mixer, variant.model.backbone.get('mix')) for mixer, variant in made] == [
        ('attn', 'attn'), ('involution', None)]
    assert network_label('swin', 'attn', 'work_dirs/run/epoch_1.pth') == (
        'swin, attn, run/epoch_1.pth')
    assert not {'mix', 'mixer'} & set(cfg.model.backbone)


@pytest.mark.parametrize(('paths', 'names'), [
    (['configs/a.py', 'configs/b.py'], ['a', 'b']),
    (['a/config.py', 'b/config.py'], ['a/config', 'b/config']),
    (['a.py', 'a.py'], ['a', 'a']),
    (['config.py', 'b/config.py'], ['config', 'b/config']),
])
def test_unique_names(paths, names):
    assert unique_names(paths) == names
