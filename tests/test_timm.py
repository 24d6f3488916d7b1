"""The timm models: timm's interface, and equality with the OpenMMLab backbones.

timm's own tests can be run on them from the folder of its source distribution, with this repository
in PYTHONPATH: ``TORCH_BACKEND=acmix_mm.timm pytest tests/test_models.py -k acmix``. All pass but
TorchScript's, which MMEngine's and MMCV's modules do not support.
"""

import argparse
import copy
import logging
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from helpers import ROOT
from mmengine.registry import MODELS
from timm.data import resolve_data_config
from timm.models import create_feature_extractor, group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, freeze, unfreeze
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import acmix_mm.timm  # noqa: F401
from acmix_mm.analysis.flops import count, total
from acmix_mm.analysis.published import NETWORKS, count_network
from acmix_mm.layers.shift_path import Shifts

SWIN = 'acmix_swin_tiny_patch4_window7_224'
# In the order of the zoo.
NAMES = ['acmix_resnet26', 'acmix_resnet38', 'acmix_resnet50', 'acmix_san10', 'acmix_san15',
         'acmix_san19', 'acmix_pvt_tiny', 'acmix_pvt_small', SWIN,
         'acmix_swin_small_patch4_window7_224']

# Arguments of a small model for each host, and the type of its backbone.
TINY = {
    SWIN: dict(embed_dims=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6)),
    'acmix_resnet26': dict(base_channels=8),
    'acmix_pvt_tiny': dict(embed_dims=4),
    'acmix_san10': dict(base_channels=32),
}
BACKBONE = {
    SWIN: dict(type='ACmixSwinTransformer'),
    'acmix_resnet26': dict(type='ACmixResNet', depth=26),
    'acmix_pvt_tiny': dict(type='ACmixPyramidVisionTransformer', num_layers=(2, 2, 2, 2)),
    'acmix_san10': dict(type='ACmixSAN', depth=10),
}
each_host = pytest.mark.parametrize('name', TINY)


def tiny(name, **arguments):
    return timm.create_model(name, **{**TINY[name], 'num_classes': 5, **arguments})


def backbone(name, **arguments):
    return MODELS.build({**BACKBONE[name], **TINY[name], **arguments})


def with_other_norms(model):
    """Change the norms from their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def test_are_registered():
    assert sorted(timm.list_models('acmix_*')) == sorted(NAMES)
    assert timm.list_models('acmix_*', module='timm') == timm.list_models('acmix_*')


@pytest.mark.parametrize(('backbone', 'network'), NETWORKS,
                         ids=[network.name for _, network in NETWORKS])
def test_counts_are_those_of_the_paper_networks(backbone, network):
    model = timm.create_model(network.timm_name, device='meta').eval()
    image = torch.empty(1, 3, 224, 224, device='meta')
    assert total(count(model, partial(model, image))) == count_network(backbone, network).count
    assert all(tensor.is_meta for tensor in model.state_dict().values())


@each_host
def test_is_the_backbone_with_a_classifier(name):
    model, plain = tiny(name), backbone(name)
    assert isinstance(model, type(plain))
    own, theirs = model.state_dict(), plain.state_dict()
    extra = {'head.fc.weight', 'head.fc.bias'}
    if name == 'acmix_pvt_tiny':
        extra |= {'norm.weight', 'norm.bias'}
    lacking = {f'norm{stage}.{end}' for stage in range(3) for end in ('weight', 'bias')}
    assert set(own) - set(theirs) == extra
    assert set(theirs) - set(own) == (lacking if name == SWIN else set())
    assert all(own[key].shape == theirs[key].shape for key in set(own) & set(theirs))


@each_host
@pytest.mark.parametrize('size', [(64, 96), (70, 51)], ids=str)
def test_features_are_the_backbones_outputs(name, size):
    extractor = tiny(name, features_only=True).eval()
    with_other_norms(extractor)
    plain = backbone(name).eval()
    missing, unexpected = plain.load_state_dict(extractor.model.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith('norm') for key in missing)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, actual = plain(x), extractor(x)
        if name == SWIN:
            # timm's maps are those before the output norms, which are initially one and zero.
            actual = [nn.functional.layer_norm(out.permute(0, 2, 3, 1), out.shape[1:2]).permute(
                0, 3, 1, 2) for out in actual]
    assert len(actual) == len(expected) == 4
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert extractor.feature_info.reduction() == [4, 8, 16, 32]
    assert extractor.feature_info.channels() == [out.shape[1] for out in expected]


@each_host
def test_intermediates(name):
    model = with_other_norms(tiny(name)).eval()
    x = torch.randn(1, 3, 64, 64)
    stages = len(model.feature_info)
    with torch.no_grad():
        features, maps = model.forward_intermediates(x)
        assert len(maps) == stages
        torch.testing.assert_close(features, model.forward_features(x))
        assert torch.equal(model.forward_head(features), model(x))
        normed = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
        assert torch.equal(normed[0], features)
        early, second = model.forward_intermediates(x, indices=[1], stop_early=True)
        assert torch.equal(early, maps[1]) and torch.equal(second[0], maps[1])
        last, = model.forward_intermediates(x, indices=[-1], intermediates_only=True)
        assert torch.equal(last, maps[-1])
        assert torch.equal(last, features) == (name in ('acmix_resnet26', 'acmix_san10'))
    for info, out in zip(model.feature_info, maps):
        assert out.shape == (1, info['num_chs'], 64 // info['reduction'], 64 // info['reduction'])
    with pytest.raises(ValueError, match='channels first'):
        model.forward_intermediates(x, output_fmt='NHWC')


@each_host
def test_pruned_models_keep_only_what_their_maps_need(name):
    model = tiny(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
    for stage, expected in enumerate(maps):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([stage], prune_norm=True) == [stage]
        torch.testing.assert_close(pruned.forward_features(x), expected)
        pruned.train().forward_features(x).sum().backward()
        assert all(parameter.grad is not None for parameter in pruned.parameters())
        pruned.reset_classifier(2, 'avg')
        assert pruned.eval()(x).shape == (2, 2)


@each_host
def test_classifier(name):
    model = tiny(name, in_chans=1, drop_rate=0.2).eval()
    x = torch.randn(2, 1, 64, 64)
    width = model.num_features
    assert model.head.drop.p == 0.2
    assert model(x).shape == (2, 5)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, width)
    model.reset_classifier(3, 'catavgmax')
    assert (model.num_classes, model.head_hidden_size) == (3, 2 * width)
    assert model(x).shape == (2, 3)
    assert model.get_classifier().weight.shape == (3, 2 * width)
    model.double().reset_classifier(0)
    assert model(x.double()).shape == (2, 2 * width)
    model.reset_classifier(0, '')
    assert model(x.double()).shape == (2, width, 2, 2)
    assert not any(module.training for module in model.modules())
    model.reset_classifier(4, 'max')
    assert (model.head.fc.weight.dtype, model.head.drop.p) == (torch.float64, 0.2)
    assert tiny(name, num_classes=0)(x.expand(-1, 3, -1, -1)).shape == (2, width)
    assert tiny(name, dtype=torch.bfloat16).head.fc.weight.dtype == torch.bfloat16


@each_host
def test_default_cfg_and_errors(name):
    model = tiny(name)
    cfg = model.default_cfg
    weights = model.state_dict()
    assert weights[f'{cfg["first_conv"]}.weight'].shape[1] == 3
    assert f'{cfg["classifier"]}.weight' in weights
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 5)
    assert model.forward_features(torch.randn(1, 3, 224, 224)).shape[2:] == cfg['pool_size']
    assert resolve_data_config({}, model=model)['input_size'] == (3, 224, 224)
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        tiny(name, pretrained=True)
    with pytest.raises(TypeError, match='not_an_argument'):
        tiny(name, not_an_argument=1)
    # timm loads checkpoints through checkpoint_path or pretrained_cfg instead.
    with pytest.raises(TypeError, match='init_cfg'):
        tiny(name, init_cfg=dict(type='Pretrained', checkpoint='file.pth'))
    with pytest.raises(ValueError, match="feature_cls must be 'getter'"):
        tiny(name, features_only=True, feature_cls='hook')


def test_position_tables_have_the_image_size():
    model = tiny('acmix_pvt_tiny', img_size=96)
    assert model.layers[0][1][0].pos_embed.shape == (1, 24 * 24, 4)
    model = tiny(SWIN, img_size=(64, 96), use_abs_pos_embed=True)
    assert model.absolute_pos_embed.shape == (1, 16 * 24, 12)
    with pytest.raises(TypeError, match='img_size'):
        tiny('acmix_resnet26', img_size=96)


@each_host
def test_recomputation_does_not_change_gradients(name):
    x = torch.randn(2, 3, 64, 64)
    results, calls = [], []
    for enable in (False, True):
        torch.manual_seed(0)
        model = tiny(name, drop_path_rate=0.3).train()
        model.set_grad_checkpointing(enable)
        for module in model.modules():
            if hasattr(module, 'with_cp'):
                first = next(module.children())
                first.register_forward_hook(lambda *_, enable=enable: calls.append(enable))
        torch.manual_seed(1)
        out = model(x)
        out.square().sum().backward()
        results.append([out, *(parameter.grad for parameter in model.parameters())])
    for plain, other in zip(*results):
        torch.testing.assert_close(plain, other, rtol=1e-4, atol=1e-5)
    assert calls.count(True) == 2 * calls.count(False) > 0


@each_host
def test_initial_values(name, caplog):
    with caplog.at_level(logging.INFO):
        model = tiny(name)
    assert not caplog.records
    for key, parameter in model.named_parameters():
        if key.rpartition('.')[2] in ('rate1', 'rate2'):
            assert parameter.item() == 0.5, key
    for module in model.modules():
        if isinstance(module, Shifts):
            assert torch.equal(module.weight[0].flatten(1), torch.eye(9))
    if name == 'acmix_resnet26':
        assert all(block.last_norm.weight.abs().max() == 0 for block in model.layer2)
        assert model.layer2[0].bn1.weight.min() == 1
    if name in (SWIN, 'acmix_pvt_tiny'):
        assert 0.01 < model.head.fc.weight.std() < 0.03
        assert model.head.fc.bias.abs().max() == 0


@each_host
def test_learns_statistics_unless_frozen(name):
    model = tiny(name).train()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert all(module.training for module in norms)
    model(torch.randn(4, 3, 64, 64))
    assert all(norm.running_mean.abs().max() > 0 for norm in norms)
    freeze(model)
    unfreeze(model, 'head')
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {'head.fc.weight', 'head.fc.bias'}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# For each host, pairs of parameters that belong to the same group.
TOGETHER = {
    SWIN: [('patch_embed.norm.weight', 'patch_embed.projection.weight'),
           ('stages.1.downsample.reduction.weight', 'stages.1.blocks.1.norm1.weight'),
           ('norm3.weight', 'stages.3.blocks.1.norm1.weight')],
    'acmix_resnet26': [('bn1.weight', 'conv1.weight'),
                       ('layer2.0.downsample.0.weight', 'layer2.0.conv1.weight')],
    'acmix_pvt_tiny': [('layers.0.1.0.pos_embed', 'layers.0.0.projection.weight'),
                       ('layers.2.1.0.pos_embed', 'layers.2.0.projection.weight'),
                       ('norm.weight', 'layers.3.1.2.norm1.weight')],
    'acmix_san10': [('bn_in.weight', 'conv_in.weight'), ('conv2.weight', 'layer2.0.bn1.weight'),
                    ('bn2.weight', 'layer2.1.bn1.weight')],
}


@each_host
def test_groups_follow_depth(name):
    model = tiny(name)
    fine = group_parameters(model, model.group_matcher(), reverse=True)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    for grouping in (fine, coarse):
        assert set(grouping) == {key for key, _ in model.named_parameters()}
        assert grouping['head.fc.weight'] == max(grouping.values())
        assert grouping[model.default_cfg['first_conv'] + '.weight'] == 0
        assert set(grouping.values()) == set(range(max(grouping.values()) + 1))
    for one, other in TOGETHER[name]:
        assert fine[one] == fine[other] < fine['head.fc.weight'], one
    # Only groups up to the second last stage contribute to its map.
    _, maps = model.forward_intermediates(torch.randn(2, 3, 64, 64))
    maps[-2].sum().backward()
    later = [fine[key] for key, parameter in model.named_parameters() if parameter.grad is None]
    earlier = [fine[key] for key, parameter in model.named_parameters()
              if parameter.grad is not None]
    assert max(earlier) <= min(later)


@each_host
def test_layer_decay_and_parameters_without_weight_decay(name):
    model = tiny(name)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1., weight_decay=0.1, layer_decay=0.5)
    groups = {id(parameter): group for group in optimizer.param_groups
              for parameter in group['params']}
    assert len(groups) == len(list(model.parameters()))
    exempt = model.no_weight_decay()
    tables = [key for key in exempt if not key.endswith(('.rate1', '.rate2'))]
    assert len(exempt) - len(tables) == 2 * len([
        module for module in model.modules() if isinstance(module, Shifts)])
    assert bool(tables) == (name in (SWIN, 'acmix_pvt_tiny'))
    for key, parameter in model.named_parameters():
        decays = groups[id(parameter)]['weight_decay'] > 0
        assert decays == (parameter.dim() > 1 and key not in exempt), key
    assert groups[id(model.head.fc.weight)]['lr_scale'] == 1
    first = model.get_submodule(model.default_cfg['first_conv']).weight
    assert groups[id(first)]['lr_scale'] == min(group['lr_scale'] for group in groups.values())


@each_host
def test_checkpoint_of_timm_loads_into_a_backbone(name, tmp_path):
    """A checkpoint of timm's train.py, which includes the arguments of the script."""
    model = tiny(name)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1e-3)
    average = ModelEmaV3(model, decay=0.5)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    average.update(model)
    saver = CheckpointSaver(model, optimizer, argparse.Namespace(model=name, lr=1e-3),
                            model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=50.)
    plain = backbone(name, init_cfg=dict(type='Pretrained',
                                         checkpoint=str(tmp_path / 'model_best.pth.tar')))
    plain.init_weights()
    trained, averaged = model.state_dict(), average.module.state_dict()
    loaded = {key: value for key, value in plain.state_dict().items() if key in trained}
    assert len(loaded) == len(trained) - (4 if name == 'acmix_pvt_tiny' else 2)
    assert any(all(torch.equal(value, source[key]) for key, value in loaded.items())
               for source in (trained, averaged))


@each_host
def test_fine_tuning_with_other_classes_and_channels(name, tmp_path):
    model = with_other_norms(tiny(name))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    source = dict(file=str(tmp_path / 'weights.pth'), num_classes=5)
    other = tiny(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=3, in_chans=1)
    first = model.default_cfg['first_conv']
    torch.testing.assert_close(other.get_submodule(first).weight,
                               model.get_submodule(first).weight.sum(1, keepdim=True))
    kept = other.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith(('head.', first)):
            assert torch.equal(kept[key], value), key


@each_host
def test_torch_fx(name):
    model = tiny(name, drop_path_rate=0.1).eval()
    x = torch.randn(1, 3, 64, 64)
    traced = create_feature_extractor(model, ['head.fc'])
    torch.testing.assert_close(traced(x)['head.fc'], model(x))


def test_works_with_mmcv_lite():
    """mmcv-lite has no operators."""
    done = subprocess.run([sys.executable, '-c', """
import sys
for name in ('mmcv.ops', 'mmcv._ext', 'mmdet', 'mmseg'):
    sys.modules[name] = None
import timm, torch, acmix_mm.timm
print(timm.create_model('acmix_resnet26', num_classes=3)(torch.randn(2, 3, 64, 64)).shape[1])
"""], cwd=ROOT, text=True, capture_output=True, check=False, env={'PYTHONPATH': str(ROOT),
                                                                   'PATH': ''})
    assert done.stdout == '3\n', done.stderr
