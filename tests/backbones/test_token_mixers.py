"""Every token mixer in ResNet and Swin: configs, checkpoints and training."""

from copy import deepcopy

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn
from torch.nn import functional as F

from acmix_mm.analysis.complexity import complexity_report
from acmix_mm.backbones.swin import ACmixSwinBlock, ConvolutionMixer
from acmix_mm.backbones.token_mixers import MIXERS, mixer_options, with_mixer
from acmix_mm.engine.config import load_config
from acmix_mm.layers import (
    ACmixConv2d,
    Involution2d,
    PatternACmix,
    PatternACmixConv2d,
    WindowACmix,
)
from acmix_mm.layers.attention_pattern import BlockedPattern
from acmix_mm.ops import BlockPattern
from acmix_mm.utils.errors import CheckpointError, UsageError

SMALL = {
    'ACmixResNet': dict(depth=26, base_channels=16, stage_blocks=(2, 1, 1, 1), norm_eval=False,
                        zero_init_residual=False),
    'ACmixSwinTransformer': dict(embed_dims=16, depths=(2, 2), num_heads=(2, 4), strides=(4, 2),
                                 out_indices=(0, 1), drop_path_rate=0.),
}
BOTH = pytest.mark.parametrize('backbone', SMALL)
EACH = pytest.mark.parametrize('mixer', MIXERS)


def build(backbone, mixer='acmix', **others):
    """Build a backbone with a mixer that is given by name or as a config."""
    options = mixer_options(backbone, mixer) if isinstance(mixer, str) else dict(mixer=mixer)
    return MODELS.build(dict(SMALL[backbone], type=backbone, **{**options, **others}))


def mixers_of(model):
    """The mixers of all blocks, without the layers that follow them."""
    return [getattr(module, 'conv2', None) or getattr(module.attn, 'w_msa', None) or
            module.attn.conv for module in model.modules()
            if type(module).__name__ in ('ACmixBottleneck', 'ACmixSwinBlock')]


EXPECTED = {
    ('ACmixResNet', 'conv'): (nn.Conv2d, dict(kernel_size=(3, 3), bias=None)),
    ('ACmixResNet', 'attn'): (ACmixConv2d, dict(mix='attn')),
    ('ACmixResNet', 'acmix'): (ACmixConv2d, dict(mix='acmix')),
    ('ACmixResNet', 'conv7'): (nn.Conv2d, dict(kernel_size=(7, 7), padding=(3, 3), bias=None)),
    ('ACmixResNet', 'acmix-conv'): (ACmixConv2d, dict(mix='conv')),
    ('ACmixResNet', 'involution'): (Involution2d, dict(kernel_size=(7, 7), group_channels=16)),
    ('ACmixSwinTransformer', 'conv'): (nn.Conv2d, dict(kernel_size=(3, 3), padding=(1, 1))),
    ('ACmixSwinTransformer', 'attn'): (WindowACmix, dict(mix='attn', window_size=7)),
    ('ACmixSwinTransformer', 'acmix'): (WindowACmix, dict(mix='acmix')),
    ('ACmixSwinTransformer', 'conv7'): (nn.Conv2d, dict(kernel_size=(7, 7), padding=(3, 3))),
    ('ACmixSwinTransformer', 'acmix-conv'): (WindowACmix, dict(mix='conv')),
    ('ACmixSwinTransformer', 'involution'): (Involution2d, dict(kernel_size=(7, 7))),
    **{(backbone, mixer): (kind, dict(mix='attn')) for mixer in ('global', 'random', 'bigbird')
       for backbone, kind in (('ACmixResNet', PatternACmixConv2d),
                              ('ACmixSwinTransformer', PatternACmix))},
}
# The mixers whose last block of a stage differs: (mix of all, local layer, global layer).
LAST_GLOBAL = {
    (backbone, mixer): (mix, *kinds)
    for mixer, mix in (('attn-global', 'attn'), ('acmix-global', 'acmix'))
    for backbone, kinds in (('ACmixResNet', (ACmixConv2d, PatternACmixConv2d)),
                            ('ACmixSwinTransformer', (WindowACmix, PatternACmix)))}


@pytest.mark.parametrize(('backbone', 'mixer'), EXPECTED)
def test_only_the_mixer_of_each_block_changes(backbone, mixer):
    kind, attributes = EXPECTED[backbone, mixer]
    model, usual = build(backbone, mixer), build(backbone)
    mixers = mixers_of(model)
    assert len(mixers) == (5 if backbone == 'ACmixResNet' else 4)
    for each in mixers:
        assert type(each) is kind
        assert {name: getattr(each, name) for name in attributes} == attributes
    inside = ('.conv2.', '.attn.')
    rest, expected = ({name: value.shape for name, value in each.state_dict().items()
                       if not any(part in name for part in inside)} for each in (model, usual))
    assert rest == expected


@pytest.mark.parametrize(('backbone', 'mixer'), LAST_GLOBAL)
def test_the_last_block_of_each_stage_is_global(backbone, mixer):
    mix, local, whole = LAST_GLOBAL[backbone, mixer]
    mixers = mixers_of(build(backbone, mixer))
    last = (1, 2, 3, 4) if backbone == 'ACmixResNet' else (1, 3)
    assert [type(each) for each in mixers] == [
        whole if index in last else local for index in range(len(mixers))]
    assert {each.mix for each in mixers} == {mix}
    assert {repr(mixers[index].pattern) for index in last} == {'GlobalPattern()'}


@BOTH
def test_patterns_have_the_options_of_the_attention_that_they_replace(backbone):
    """Heads, biases, and the options of acmix_cfg; those of the mixer go first."""
    options = dict(num_heads=8) if backbone == 'ACmixResNet' else dict(qkv_bias=False)
    local, whole = mixers_of(build(backbone, 'acmix-global', acmix_cfg=dict(combine='convex'),
                                   **options))[:2]
    assert whole.num_heads == local.num_heads
    same = {name: value.shape for name, value in local.state_dict().items()
            if 'position' not in name}
    assert same == {name: value.shape for name, value in whole.state_dict().items()
                    if backbone == 'ACmixResNet' or name != 'conv_p.weight'}
    assert 'rate1' in same
    assert 'rate2' not in same
    mixer = dict(type='RandomAttention', num_heads=1, block_size=8, random_blocks=2, seed=7)
    patterns = [(each.num_heads, each.mix, *each.pattern.blocks)
                for each in mixers_of(build(backbone, mixer))]
    # Each block draws its own blocks.
    assert patterns == [(1, 'attn', 8, 2, 0, 7 + number, False)
                        for number in range(len(patterns))]


def test_only_the_pattern_differs_from_local_attention():
    """A window of 3×3 blocks of one position is a neighbourhood of 3×3."""
    pattern = BlockedPattern(BlockPattern(1, 0, has_window=True))
    for mix in ('attn', 'acmix'):
        local = ACmixConv2d(6, 8, num_heads=2, attn_kernel_size=3, mix=mix).double()
        layer = PatternACmixConv2d(6, 8, num_heads=2, mix=mix, pattern=pattern).double()
        layer.load_state_dict(local.state_dict())
        x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
        # Reflection padding repeats neighbours at the border.
        torch.testing.assert_close(layer(x)[..., 1:-1, 1:-1], local(x)[..., 1:-1, 1:-1])


def test_only_the_attention_differs_from_windows():
    options = dict(num_heads=2, mix='conv')
    local, layer = WindowACmix(8, window_size=4, **options), PatternACmix(
        8, pattern=BlockedPattern(BlockPattern(4, 1)), **options)
    layer.load_state_dict(local.state_dict())
    x = torch.randn(2, 7, 6, 8)
    torch.testing.assert_close(layer(x), local(x))


def test_mixers():
    assert MIXERS == ('conv', 'attn', 'acmix', 'acmix-conv', 'conv7', 'involution', 'global',
                      'random', 'bigbird', 'attn-global', 'acmix-global')
    assert {*EXPECTED, *LAST_GLOBAL} == {
        (backbone, mixer) for backbone in SMALL for mixer in MIXERS}


def test_options_are_copies():
    mixer_options('ACmixSwinTransformer', 'involution')['mixer']['kernel_size'] = 3
    assert mixer_options('ACmixSwinTransformer', 'involution')['mixer']['kernel_size'] == 7


@BOTH
@EACH
def test_trains_at_any_size(backbone, mixer):
    model = build(backbone, mixer)
    model.init_weights()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.clone() for parameter in mixers_of(model)[0].parameters()]
    for height, width in ((1, 1), (33, 70), (75, 9)):
        outs = model(torch.randn(2, 3, height, width))
        for index, out in enumerate(outs):
            stride = 4 * 2**index
            assert out.shape[2:] == (-(-height // stride), -(-width // stride))
            # Some readers of the outputs ignore strides.
            assert out.is_contiguous()
    sum(out.square().sum() for out in outs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    after = mixers_of(model)[0].parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after))


@BOTH
@EACH
def test_own_checkpoint_is_loaded_completely(backbone, mixer, tmp_path, log_text):
    trained = build(backbone, mixer)
    with torch.no_grad():
        for value in trained.state_dict().values():
            if value.is_floating_point():
                value.normal_().abs_()
    path = str(tmp_path / 'own.pth')
    torch.save(trained.state_dict(), path)
    model = build(backbone, mixer, init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    entries = trained.state_dict()
    assert f'loaded: {len(entries)} of {len(entries)} entries' in log_text()
    assert 'dropped: none' in log_text()
    for name, value in model.state_dict().items():
        assert torch.equal(value, entries[name]), name


@pytest.mark.parametrize(('source', 'wanted'), [
    *((source, 'involution') for source in ('conv', 'attn', 'acmix', 'acmix-conv')),
    *((source, dict(type='Conv2d')) for source in ('attn', 'acmix', 'involution'))], ids=str)
@BOTH
def test_checkpoint_of_another_mixer_loads_all_but_the_mixers(backbone, source, wanted, tmp_path,
                                                              log_text):
    path = str(tmp_path / 'other.pth')
    other = build(backbone, source)
    torch.save(other.state_dict(), path)
    model = build(backbone, wanted, init_cfg=dict(type='Pretrained', checkpoint=path))
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = other.state_dict()
    with torch.no_grad():
        for value in theirs.values():
            if value.is_floating_point():
                value.normal_()
    torch.save(theirs, path)
    model.init_weights()
    left = ('.conv2.', '.bn2.', '.attn.')
    for name, value in model.state_dict().items():
        start = fresh if any(part in name for part in left) else theirs
        assert torch.equal(value, start[name]), name
    assert 'the model starts as the plain' not in log_text()


@BOTH
def test_patterns_load_the_projections_of_local_attention(backbone, tmp_path, log_text):
    """From local attention, all but the position term of a Swin; from ACmix, in a Swin only."""
    path = str(tmp_path / 'local.pth')
    for source, wanted in (('attn', 'global'), ('attn', 'attn-global'), ('acmix', 'acmix-global'),
                           ('acmix', 'random')):
        local = build(backbone, source)
        with torch.no_grad():
            for value in local.state_dict().values():
                if value.is_floating_point():
                    value.normal_().abs_()
        torch.save(local.state_dict(), path)
        model = build(backbone, wanted, init_cfg=dict(type='Pretrained', checkpoint=path))
        fresh = {name: value.clone() for name, value in model.state_dict().items()}
        model.init_weights()
        theirs = local.state_dict()
        for name, value in model.state_dict().items():
            is_left = name not in theirs or (
                (backbone, source, wanted) == ('ACmixResNet', 'acmix', 'random')
                and ('.conv2.' in name or '.bn2.' in name))
            assert not is_left or name.endswith('conv_p.weight') or backbone == 'ACmixResNet'
            expected = fresh[name] if is_left else theirs[name]
            if '.proj.' in name and wanted == 'random':
                expected = expected * theirs[name.rpartition('.proj.')[0] + '.rate1']
            torch.testing.assert_close(value, expected, msg=name)


def test_plain_swin_starts_a_network_with_global_attention(tmp_path, log_text):
    """The convolution paths of global layers contribute nothing either."""
    path = str(tmp_path / 'plain.pth')
    torch.save(build('ACmixSwinTransformer', 'attn').state_dict(), path)
    init_cfg = dict(type='Pretrained', checkpoint=path)
    outs = []
    for mixer in ('attn-global', 'acmix-global'):
        model = build('ACmixSwinTransformer', mixer, init_cfg=init_cfg)
        model.init_weights()
        for layer in mixers_of(model):
            if isinstance(layer, PatternACmix):
                nn.init.ones_(layer.conv_p.weight)
        outs.append(model.eval()(torch.ones(1, 3, 40, 50)))
    for expected, actual in zip(*outs):
        torch.testing.assert_close(actual, expected)


@BOTH
@pytest.mark.parametrize(('given', 'wanted', 'message'), [
    ('involution', 'acmix', r'missing: .*; not in the model: .*(conv2|attn\.conv)\.reduce'),
    ('involution', 'acmix-conv', r'missing: .*; not in the model: .*(conv2|attn\.conv)\.reduce'),
    (dict(type='Conv2d', kernel_size=5), dict(type='Conv2d'),
     r'of another shape: .*\.conv2?\.weight \(16, 16, 5, 5\) instead of \(16, 16, 3, 3\)'),
], ids=str)
def test_mixer_that_does_not_fit_raises(backbone, given, wanted, message, tmp_path):
    path = str(tmp_path / 'other.pth')
    torch.save(build(backbone, given).state_dict(), path)
    model = build(backbone, wanted, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(CheckpointError, match=message):
        model.init_weights()


@BOTH
def test_recomputation_does_not_change_gradients(backbone):
    x = torch.randn(2, 3, 60, 40, requires_grad=True)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = build(backbone, 'involution', with_cp=with_cp)
        outs = model(x)
        gradients.append(torch.autograd.grad(sum(out.square().sum() for out in outs),
                                             [x, *model.parameters()]))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize('mixer', ['conv', 'involution'])
@BOTH
def test_frozen_stages_include_their_mixers(backbone, mixer):
    model = build(backbone, mixer, frozen_stages=1)
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sum(out.sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    first = ('layer1.', 'stages.0.blocks.')
    mixers = ('.conv2.', '.attn.')
    seen = set()
    for name, parameter in model.named_parameters():
        if any(part in name for part in mixers):
            frozen = name.startswith(first)
            seen.add(frozen)
            assert (parameter.grad is None) == frozen, name
    assert seen == {True, False}
    for name, buffer in model.named_buffers():
        if name.startswith(first):
            assert torch.equal(buffer, before[name]), name


def test_acmix_as_a_mixer_equals_the_default():
    """In ResNet; the same holds for the convolution of stages without a mixer."""
    for given, same in ((dict(type='ACmix', bias=True), dict()),
                        (dict(type='Conv2d'), dict(acmix_stages=())),
                        (dict(type='SlidingAttention', bias=True), dict(mix='attn')),
                        (dict(type='ACmixConvolution', bias=True), dict(mix='conv'))):
        outs = []
        for options in (dict(mixer=given), same):
            torch.manual_seed(0)
            model = MODELS.build(dict(SMALL['ACmixResNet'], type='ACmixResNet', **options))
            model.init_weights()
            outs.append([*model.eval()(torch.ones(1, 3, 40, 50)), *model.parameters()])
        assert len(outs[0]) == len(outs[1])
        for ours, theirs in zip(*outs):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_mixers_of_a_resnet_have_its_strides_and_dilations():
    model = build('ACmixResNet', dict(type='Involution', kernel_size=5, group_channels=8),
                  strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), acmix_stages=(1, 2, 3))
    kinds = [(type(each), each.stride[0], each.dilation[0], each.padding[0])
             for each in mixers_of(model)]
    assert kinds == [(nn.Conv2d, 1, 1, 1)] * 2 + [
        (Involution2d, 2, 1, 2), (Involution2d, 2, 1, 2), (Involution2d, 1, 2, 4)]
    caffe = build('ACmixResNet', 'involution', style='caffe')
    assert {each.stride for each in mixers_of(caffe)} == {(1, 1)}


def test_convolution_in_a_swin_is_not_shifted_and_a_linear_layer_follows():
    block = ACmixSwinBlock(
        8, 2, 16, 3, shift=True, qkv_bias=True, qk_scale=None, drop_rate=0., attn_drop_rate=0.,
        drop_path_rate=0., act_cfg=dict(type='GELU'), norm_cfg=dict(type='LN'), with_cp=False,
        acmix=dict(), mixer=dict(type='Conv2d', kernel_size=5, bias=True)).double()
    x = torch.randn(2, 7 * 6, 8, dtype=torch.float64)
    mixer = block.attn
    assert isinstance(mixer, ConvolutionMixer)
    image = F.layer_norm(x, (8,)).transpose(1, 2).unflatten(2, (7, 6))
    mixed = F.conv2d(image, mixer.conv.weight, mixer.conv.bias, padding=2)
    mixed = torch.einsum('oc,bcp->bpo', mixer.proj.weight, mixed.flatten(2)) + mixer.proj.bias
    hidden = x + mixed
    expected = hidden + block.ffn.layers(F.layer_norm(hidden, (8,)))
    torch.testing.assert_close(block(x, (7, 6)), expected)


@BOTH
@pytest.mark.parametrize(('options', 'message'), [
    (dict(mixer=dict(type='Involution'), mix='attn'),
     "cannot be combined with mix='attn' and acmix_cfg=None; give one"),
    (dict(mixer=dict(type='Conv2d', kernel_size=4)), 'kernel_size of a mixer must be odd.* got 4'),
    (dict(mixer=dict(type='Involution', group_channels=5)), 'group_channels must divide'),
    (dict(mixer=dict(type='ACmix', num_heads=5)), 'num_heads must divide'),
    (dict(mixer=dict(type='GlobalAttention', num_heads=5)), 'num_heads must divide'),
    (dict(mixer=dict(type='RandomAttention', random_blocks=0)), 'random_blocks must be an integer'),
    (dict(last_mixer=dict(type='BigBirdAttention', block_size=0)), 'block_size must be an integer'),
])
def test_invalid_arguments(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(SMALL[backbone], type=backbone, **options))


@pytest.mark.parametrize(('backbone', 'mixer', 'message'), [
    ('ACmixResNet', 'fft', "no mixer 'fft'; name one of conv, attn, acmix, acmix-conv, conv7"),
    ('ACmixSAN', 'conv',
     'ACmixSAN does not support the mixer conv; it supports attn, acmix, acmix-conv'),
    ('PVT', 'attn', 'PVT has no mixer to exchange; .* one that has: ACmixResNet, ACmixSAN, ACmix'),
])
def test_unknown_mixers_and_backbones_raise(backbone, mixer, message):
    with pytest.raises(UsageError, match=message):
        mixer_options(backbone, mixer)


@pytest.mark.parametrize('options', [dict(mixer='global'), dict(last_mixer='global'),
                                     dict(mixer=dict(kernel_size=7))], ids=str)
@pytest.mark.parametrize('backbone', [dict(type='ACmixResNet', depth=26),
                                      dict(type='ACmixSwinTransformer')], ids=str)
def test_mixers_that_are_no_configs_raise(backbone, options):
    with pytest.raises(ValueError, match=r'mixer must be the config of a layer, as in .*; got'):
        MODELS.build({**backbone, **options})


@pytest.mark.parametrize('config', [
    'maskrcnn_acmix_r50', 'upernet_acmix_swin', 'maskrcnn_acmix_pvt', 'maskrcnn_acmix_san'])
def test_configs_are_counted_with_every_mixer(config):
    own = load_config(f'configs/shapes/{config}.py')
    mixers = MODELS.get(own.model.backbone.type).mixers
    reports = {}
    for mixer in mixers:
        cfg = deepcopy(own)
        cfg.model.backbone = with_mixer(cfg.model.backbone, mixer)
        reports[mixer] = complexity_report(cfg, (256, 256))
    # 48 random keys cost as much as the 49 of a window, up to the digits that are printed.
    reports.pop('random', None)
    assert len(set(reports.values())) == len(reports)


@pytest.mark.parametrize('present', [
    dict(mixer=dict(type='Involution', kernel_size=5)), dict(mix='attn'),
    dict(last_mixer=dict(type='Conv2d')), dict(acmix_stages=[]),
    dict(acmix_cfg=dict(combine='sum')), dict()])
@EACH
def test_with_mixer_replaces_any_mixer(present, mixer):
    own = ConfigDict(SMALL['ACmixResNet'], type='ACmixResNet', **present)
    before = deepcopy(own)
    replaced = with_mixer(own, mixer)
    assert own == before
    usual = mixers_of(build('ACmixResNet', mixer))
    assert [repr(each) for each in mixers_of(MODELS.build(replaced))] == list(map(repr, usual))
    assert ('acmix_cfg' in replaced) == ('acmix_cfg' in present and 'mixer' not in replaced)
