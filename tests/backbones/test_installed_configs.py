"""Every backbone of MMDetection's and MMSegmentation's configs, with nothing but its type changed.

On the meta device, where nothing is computed, and as small networks.
"""

import importlib
import json
import math
from collections import Counter
from copy import deepcopy

import pytest
import torch
from helpers import ROOT
from helpers.hosts import assert_equal_features, assert_equal_networks, build_on_meta
from helpers.installed_configs import HOSTS, InstalledBackbone, installed_backbones
from helpers.stack import needs_pinned
from mmengine.config import Config
from mmengine.registry import MODELS

from acmix_mm import backbones
from acmix_mm.utils.markdown import table

DCN = 'dcn and ACmix both replace the 3×3 convolutions'
EPS = 'This version of torch rejects eps=0 of norm_cfg (batch_norm eps must be positive, but got 0)'
# Why a config is rejected, as the documentation says it.
REASONS = {DCN: '`dcn` in stages with ACmix',
           EPS: 'batch norm with `eps=0`, which torch rejects in the plain backbone as well'}
# In evaluation mode.
NO_EFFECT = ('frozen_stages', 'norm_eval', 'with_cp', 'zero_init_residual',
             'drop_rate', 'attn_drop_rate', 'drop_path_rate', 'convert_weights')
SHAPES = {}


@pytest.fixture(scope='module')
def installed():
    return installed_backbones()


@pytest.fixture(scope='module')
def outcomes(installed):
    """The shapes of the outputs with ACmix, or the message of the error."""
    return [outcome(ours(backbone), backbone.arguments) for backbone in installed]


def plain(backbone):
    return getattr(importlib.import_module(f'{backbone.library}.models.backbones'), backbone.type)


def ours(backbone):
    return MODELS.get(f'ACmix{backbone.type}')


def outcome(network, arguments):
    """Build a backbone, and run it unless only options without effect on the shapes are new."""
    key = network, json.dumps({name: value for name, value in arguments.items()
                               if name not in NO_EFFECT}, sort_keys=True)
    image = torch.empty(1, arguments.get('in_channels', 3), 64, 96, device='meta')
    try:
        model = build_on_meta(network, arguments)
        if key not in SHAPES:
            with torch.no_grad():
                SHAPES[key] = [tuple(out.shape) for out in model(image)]
    except ValueError as error:
        return str(error)
    return SHAPES[key]


def test_finds_the_backbones_that_mmengine_finds(installed):
    assert {backbone.type for backbone in installed} == set(HOSTS) - {'ResNetV1d'}
    assert len(installed) > 100
    for backbone in installed[::8]:
        config = Config.fromfile(backbone.files[-1])
        assert has_backbone(config.model.to_dict(), backbone), backbone.files[-1]


def has_backbone(config, backbone):
    if isinstance(config, (list, tuple)):
        return any(has_backbone(each, backbone) for each in config)
    if not isinstance(config, dict):
        return False
    own = {name: value for name, value in config.items() if name not in ('init_cfg', 'pretrained')}
    theirs = dict(backbone.arguments, type=backbone.type)
    return json.loads(json.dumps(own, default=str)) == theirs or has_backbone(
        list(config.values()), backbone)


def test_shapes_equal_the_hosts(installed, outcomes):
    for backbone, actual in zip(installed, outcomes):
        if backbone.arguments.get('dcn'):
            assert actual.startswith(DCN), backbone
            continue
        expected = outcome(plain(backbone), backbone.arguments)
        if isinstance(expected, str):
            # The plain backbone fails as well, but not before its first image.
            assert actual == f'{EPS}; drop eps, or set a positive number.', backbone
            assert expected in EPS, backbone
        else:
            assert actual == expected, backbone


def rejects_zero_eps():
    """Whether torch rejects eps=0 in evaluation as well; 2.10 does, 2.15 in training only."""
    try:
        torch.nn.BatchNorm2d(1, eps=0).eval()(torch.zeros(1, 1, 1, 1))
    except ValueError:
        return True
    return False


def test_rejected_configs_build_as_the_error_says(installed, outcomes):
    rejected = [(backbone, message) for backbone, message in zip(installed, outcomes)
                if isinstance(message, str)]
    kinds = {True, False} if rejects_zero_eps() else {True}
    assert {message.startswith(DCN) for _, message in rejected} == kinds
    for backbone, message in rejected:
        arguments = deepcopy(backbone.arguments)
        with torch.device('meta'):
            if message.startswith(DCN):
                assert message.endswith(
                    'drop dcn and stage_with_dcn, or set acmix_stages=(0,).')
                ours(backbone)(**arguments, acmix_stages=(0,))
                del arguments['dcn'], arguments['stage_with_dcn']
            else:
                del arguments['norm_cfg']['eps']
            ours(backbone)(**arguments)


def small(arguments):
    """A small version of a ResNet, without what has no effect on its features."""
    arguments = {name: value for name, value in arguments.items()
                 if name not in ('frozen_stages', 'norm_eval', 'with_cp', 'zero_init_residual')}
    if 'stem_channels' in arguments:
        arguments['stem_channels'] //= 8
    norm = arguments.pop('norm_cfg', dict(type='BN'))
    norm = dict(type='GN', num_groups=4) if norm['type'] == 'GN' else dict(type='BN')
    return {**dict(base_channels=8, stem_channels=8, norm_eval=False, norm_cfg=norm), **arguments}


def test_features_of_resnets_without_acmix_equal_the_hosts(installed):
    distinct = {json.dumps((backbone.library, backbone.type, small(backbone.arguments)))
                for backbone in installed if backbone.type.startswith('ResNet')}
    assert len(distinct) > 20
    for library, host, arguments in map(json.loads, sorted(distinct)):
        backbone = InstalledBackbone(library, host, arguments, [])
        # mmcv's deformable convolution rejects maps that are smaller than its kernel.
        size = (97, 72) if 'dcn' in arguments else (65, 50)
        assert_equal_networks(plain(backbone)(**deepcopy(arguments)),
                              ours(backbone)(**arguments, acmix_stages=()), size)


def test_features_of_swins_and_pvts_without_acmix_equal_the_hosts(installed):
    """At full size, each network once that differs in more than defaults and training options."""
    distinct = {}
    for backbone in installed:
        if backbone.type.startswith('ResNet'):
            continue
        arguments = ours(backbone).arguments(backbone.arguments)
        if not arguments['use_abs_pos_embed']:
            del arguments['pretrain_img_size']
        arguments['norm_cfg'] = {**arguments['norm_cfg'], 'requires_grad': True}
        effective = {name: value for name, value in arguments.items()
                     if name not in NO_EFFECT}
        distinct[backbone.library, backbone.type, json.dumps(effective)] = backbone
    assert len(distinct) > 20
    for backbone in distinct.values():
        network, size = ours(backbone), (33, 70)
        if backbone.type == 'SwinTransformer':
            # All maps are larger than one window: smaller ones, MMDetection pads and shifts.
            arguments = network.arguments(backbone.arguments)
            size = (9, arguments['window_size'] * math.prod(arguments['strides']) + 1)
        assert_equal_features(plain(backbone), network, backbone.arguments, size)


@needs_pinned
def test_table_in_the_documentation(installed, outcomes):
    rows = [['plain backbone', 'config files', 'accepted', 'rejected']]
    for host in sorted({backbone.type for backbone in installed}, key=HOSTS.index):
        accepted, rejected = 0, Counter()
        for backbone, result in zip(installed, outcomes):
            if backbone.type != host:
                continue
            if isinstance(result, str):
                reason = next(each for start, each in REASONS.items() if result.startswith(start))
                rejected[reason] += len(backbone.files)
            else:
                accepted += len(backbone.files)
        reasons = '; '.join(f'{count}: {reason}' for reason, count in rejected.items())
        files = accepted + sum(rejected.values())
        rows.append([f'`{host}`', str(files), str(accepted), reasons or '–'])
    assert table(rows) in (ROOT / 'docs' / 'backbones-and-layers.md').read_text()


def test_every_host_has_an_acmix_backbone():
    for host in HOSTS:
        assert MODELS.get(f'ACmix{host}') is getattr(backbones, f'ACmix{host}')
