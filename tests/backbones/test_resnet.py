"""ACmix-ResNet against the published code and MMDetection's ResNet."""

import inspect
import re
from copy import deepcopy

import mmdet.models.backbones.resnet as mmdet_resnet
import mmseg.models.backbones.resnet as mmseg_resnet
import pytest
import torch
import torchvision
from helpers import relative_error
from helpers.checkpoints import load_pretrained, stage_outputs
from helpers.hosts import assert_equal_networks
from helpers.weights import randomised
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmcv.ops import ModulatedDeformConv2d, RoIAlign
from mmengine.registry import MODELS
from mmseg.models.backbones import ICNet
from torch import nn

from acmix_mm.backbones import ACmixResNet
from acmix_mm.backbones.base import BACKBONES
from acmix_mm.backbones.resnet import ACmixBottleneck, ResidualBlock
from acmix_mm.checkpoints.convolution import approximate_convolution
from acmix_mm.checkpoints.recognition import read_pretrained
from acmix_mm.checkpoints.resnet import STAGE_BLOCKS
from acmix_mm.engine.convert import infer_arguments
from acmix_mm.layers import ACmixConv2d, Involution2d
from acmix_mm.utils.errors import CheckpointError

SMALL = dict(depth=26, base_channels=8, stage_blocks=(1, 2, 1, 1))


def test_network_equals_published_code(golden, tmp_path):
    fixture = golden('acmix_resnet_1111')
    meta = fixture.meta
    torch.save(fixture.state_dict(), tmp_path / 'acmix_resnet.pth')
    model = ACmixResNet(50, stage_blocks=meta['layers'], num_heads=meta['head'], init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'acmix_resnet.pth')))
    model.init_weights()
    model.eval()
    with torch.no_grad():
        outs = model(fixture.array('x', meta['image']))
    for index, out in enumerate(outs):
        expected = fixture[f'stage{index}']
        if out.shape != expected.shape:
            out = out[:, ::4, ::2, ::2]
        assert relative_error(out, expected) < 1e-5


def test_parameter_counts_equal_published_code():
    """With a classifier of 1000 classes; the field notes, section 4, have the published code's."""
    head = 2048 * 1000 + 1000
    for depth, published in ((26, 10.49), (38, 14.41), (50, 18.33)):
        count = sum(parameter.numel() for parameter in ACmixResNet(depth).parameters()) + head
        assert round(count / 1e6, 2) == published


@pytest.mark.parametrize('acmix_stages', [(0, 1, 2, 3), (1,)], ids=str)
def test_outputs_are_contiguous_for_readers_that_ignore_strides(acmix_stages):
    """As mmcv's RoIAlign does, which would misread a map in another memory format."""
    model = ACmixResNet(**SMALL, acmix_stages=acmix_stages).eval()
    rois = torch.tensor([[0, 3., 5., 40., 33.]])
    for out in model(torch.randn(1, 3, 64, 80)):
        align = RoIAlign(output_size=2, spatial_scale=out.shape[2] / 64)
        coordinate_major = out.contiguous(memory_format=torch.channels_last)
        expected = torch.stack([align(channel[None, None].contiguous(), rois)[0, 0]
                                for channel in coordinate_major[0]])
        torch.testing.assert_close(align(out, rois)[0], expected)


def test_has_the_arguments_of_plain_resnet():
    # Where their defaults differ, ours are those of MMDetection.
    theirs = {**inspect.signature(mmseg_resnet.ResNet.__init__).parameters,
              **inspect.signature(mmdet_resnet.ResNet.__init__).parameters}
    own = inspect.signature(ACmixResNet.__init__).parameters
    for name in theirs:
        assert own[name].default == theirs[name].default, name


PLAIN = [
    dict(),
    dict(style='caffe', out_indices=(1, 3)),
    dict(deep_stem=True, avg_down=True, stem_channels=16),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
    dict(norm_cfg=dict(type='GN', num_groups=2)),
    dict(with_cp=True, frozen_stages=1),
    dict(depth=101),
    dict(depth=152, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 2)),
    dict(depth=18, with_cp=True),
    dict(depth=18, deep_stem=True, avg_down=True, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(depth=34, stem_channels=16, norm_cfg=dict(type='GN', num_groups=2)),
    dict(conv_cfg=dict(type='ConvWS'), deep_stem=True),
    dict(depth=18, conv_cfg=dict(type='ConvWS')),
    dict(dcn=dict(type='DCN', deform_groups=1, fallback_on_stride=False),
         stage_with_dcn=(False, True, True, False)),
    dict(dcn=dict(type='DCNv2', deform_groups=2, fallback_on_stride=True), style='caffe',
         stage_with_dcn=(False, True, True, False)),
    dict(plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4), position='after_conv1'),
                  dict(cfg=dict(type='ContextBlock', ratio=1 / 16, postfix=2),
                       position='after_conv3', stages=(False, True, False, True))]),
    dict(base_channels=16, plugins=[dict(
        cfg=dict(type='GeneralizedAttention', num_heads=8, attention_type='1111', kv_stride=2),
        position='after_conv2', stages=(False, False, True, True))]),
]
# In MMSegmentation, only the last one of several plugins of a position has an effect.
PLAIN_MMDET = [
    dict(plugins=[dict(cfg=dict(type='ContextBlock', ratio=1 / 4, postfix=1),
                       position='after_conv2'),
                  dict(cfg=dict(type='NonLocal2d', postfix=2), position='after_conv2')]),
]


# Arguments that only MMSegmentation's ResNet has.
PLAIN_MMSEG = [
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True),
    dict(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True,
         multi_grid=(1, 2, 4)),
    dict(strides=(1, 2, 1), dilations=(1, 1, 2), num_stages=3, out_indices=(0, 2),
         multi_grid=(3, 2, 1, 2, 3, 1)),
]
HOSTS = {'MMDetection': mmdet_resnet.ResNet, 'MMSegmentation': mmseg_resnet.ResNet}


@pytest.mark.parametrize(('library', 'arguments'), [
    *[(library, arguments) for arguments in PLAIN for library in HOSTS],
    *[('MMDetection', arguments) for arguments in PLAIN_MMDET],
    *[('MMSegmentation', arguments) for arguments in PLAIN_MMSEG],
], ids=str)
def test_without_acmix_stages_equals_the_libraries_resnet(library, arguments):
    arguments = {**dict(depth=50, base_channels=8, stem_channels=8, norm_eval=False), **arguments}
    # The libraries change dcn.
    plain = HOSTS[library](**deepcopy(arguments))
    assert_equal_networks(plain, ACmixResNet(**arguments, acmix_stages=()))


@pytest.mark.parametrize(('host', 'ours'), [
    (mmseg_resnet.ResNetV1c, 'ACmixResNetV1c'), (mmseg_resnet.ResNetV1d, 'ACmixResNetV1d'),
    (mmdet_resnet.ResNetV1d, 'ACmixResNetV1d'),
], ids=str)
@pytest.mark.parametrize('depth', [18, 50])
def test_variants_equal_the_libraries(host, ours, depth, tmp_path):
    small = dict(depth=depth, base_channels=8, stem_channels=16, norm_eval=False)
    plain = host(**small)
    model = MODELS.build(dict(type=ours, **small, acmix_stages=()))
    assert type(model) is not BACKBONES['ResNet'] and isinstance(model, BACKBONES['ResNet'])
    assert_equal_networks(plain, model)
    # The checkpoint also loads where the stages use ACmix, and determines the architecture.
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    checkpoint = dict(type='Pretrained', checkpoint=str(tmp_path / 'plain.pth'))
    model = MODELS.build(dict(type=ours, **small, acmix_stages=(1,), init_cfg=checkpoint))
    model.init_weights()
    assert torch.equal(model.stem[6].weight, plain.stem[6].weight.float())
    inferred = infer_arguments(read_pretrained(checkpoint['checkpoint']))
    assert inferred == dict(base_channels=8, stem_channels=16, deep_stem=True, depth=depth,
                            **(dict(avg_down=True) if ours.endswith('d') else {}))


@pytest.mark.parametrize('arguments', [
    dict(), dict(mix='attn'), dict(mix='conv'), dict(acmix_stages=(2, 3)),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)), dict(style='caffe'),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True, multi_grid=(2,)),
    dict(depth=18), dict(depth=18, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
], ids=str)
def test_trains_at_odd_sizes(arguments):
    arguments = {**SMALL, **arguments}
    model = ACmixResNet(norm_eval=False, **arguments)
    model.init_weights()
    channels = 8 if arguments['depth'] == 18 else 32
    for height, width in ((1, 1), (33, 70), (75, 9)):
        outs = model(torch.randn(2, 3, height, width))
        strides = [4]
        for stride in arguments.get('strides', (1, 2, 2, 2))[1:]:
            strides.append(strides[-1] * stride)
        for index, (out, stride) in enumerate(zip(outs, strides)):
            assert out.shape == (2, channels * 2**index, -(-height // stride), -(-width // stride))
    sum(out.square().sum() for out in outs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize('options', [{}, dict(mixer=dict(type='Involution', kernel_size=3))],
                         ids=['ACmix', 'Involution'])
def test_a_basic_block_mixes_in_its_second_convolution(options):
    model = ACmixResNet(34, base_channels=16, dilations=(1, 1, 2, 4), acmix_stages=(1, 3),
                        **options)
    assert {name: len(getattr(model, name)) for name in model.layers} == dict(
        layer1=3, layer2=4, layer3=6, layer4=3)
    mixes = Involution2d if options else ACmixConv2d
    for stage, (name, stride, dilation) in enumerate(zip(model.layers, (1, 2, 2, 2), (1, 1, 2, 4))):
        for index, block in enumerate(getattr(model, name)):
            assert type(block.conv1) is nn.Conv2d
            assert block.conv1.stride[0] == (stride if index == 0 else 1)
            assert block.conv1.dilation[0] == dilation
            assert type(block.conv2) is (mixes if stage in (1, 3) else nn.Conv2d)
            assert block.conv2.stride[0] == block.conv2.dilation[0] == 1
    model.init_weights()
    blocks = [block for block in model.modules() if isinstance(block, ResidualBlock)]
    assert all(block.bn2.weight.eq(0).all() for block in blocks)


def test_icnet_runs_the_stages_of_its_backbone():
    """Its backbone is in ``backbone_cfg``; it does not call the backbone as a whole."""
    x = torch.randn(2, 3, 128, 160)
    expected, actual = (
        ICNet(backbone_cfg=dict(type=backbone, depth=18, base_channels=8, stem_channels=8),
              layer_channels=(16, 64), psp_out_channels=8, out_channels=(8, 16, 16))(x)
        for backbone in ('mmseg.ResNetV1c', 'ACmixResNetV1c'))
    assert [out.shape for out in actual] == [out.shape for out in expected]
    sum(out.square().sum() for out in actual).backward()


@torch.no_grad()
@pytest.mark.parametrize(('depth', 'arguments'), [
    (18, {}), (18, dict(acmix_stages=(2, 3))), (34, {})], ids=str)
def test_plain_torchvision_resnets_with_basic_blocks_load(depth, arguments, tmp_path, log_text):
    """Exactly, if ACmix can represent the convolutions that it replaces."""
    plain = randomised(torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, STAGE_BLOCKS[depth]))
    for name, parameter in plain.named_parameters():
        if re.search(r'layer.*conv2\.weight$', name):
            parameter.copy_(approximate_convolution(parameter, 4).kernel)
    torch.save(plain.state_dict(), tmp_path / 'resnet.pth')
    model = load_pretrained(ACmixResNet, tmp_path / 'resnet.pth', depth=depth, **arguments)
    x = torch.randn(1, 3, 33, 64)
    for expected, actual in zip(stage_outputs(plain, x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    assert 'layer3.1 0%' in log_text()
    assert ('layer1.0 0%' in log_text()) == (not arguments)
    assert 'dropped: fc.weight, fc.bias' in log_text()


def test_conv_cfg_builds_the_convolutions_that_acmix_does_not_replace():
    model = ACmixResNet(**SMALL, conv_cfg=dict(type='ConvWS'), deep_stem=True, acmix_stages=(0, 1))
    for name, module in model.named_modules():
        replaced = re.search(r'layer[12]\.\d\.conv2', name)
        if isinstance(module, nn.Conv2d) and not replaced:
            assert isinstance(module, ConvWS2d), name
    for block in (*model.layer1, *model.layer2):
        assert type(block.conv2) is ACmixConv2d
    basic = ACmixResNet(18, base_channels=8, conv_cfg=dict(type='ConvWS')).layer2[0]
    assert [type(layer) for layer in (basic.conv1, basic.conv2, basic.downsample[0])] == [
        ConvWS2d, ACmixConv2d, ConvWS2d]


@torch.no_grad()
@pytest.mark.parametrize('depth', [50, 18])
def test_standardised_kernels_of_a_plain_checkpoint_are_approximated(depth, tmp_path, log_text):
    """What ConvWS convolves with, not its parameter; exactly, for 8 channels."""
    arguments = dict(depth=depth, base_channels=8, conv_cfg=dict(type='ConvWS'),
                     norm_cfg=dict(type='GN', num_groups=2))
    plain = randomised(mmdet_resnet.ResNet(**arguments), scale=0.3)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = load_pretrained(ACmixResNet, tmp_path / 'plain.pth', **arguments, acmix_stages=(0,))
    x = torch.randn(1, 3, 65, 64)
    for expected, actual in zip(plain(x), model(x)):
        assert relative_error(actual, expected) < 2e-5
    assert 'layer1.0 0%' in log_text()


DCN_LATE = dict(dcn=dict(type='DCNv2', deform_groups=1), stage_with_dcn=(False, False, True, True))
PLUGINS = [dict(cfg=dict(type='ContextBlock', ratio=1 / 4), position='after_conv2')]


@pytest.mark.parametrize('options', [{}, dict(mixer=dict(type='Involution', kernel_size=3))],
                         ids=['ACmix', 'Involution'])
def test_dcn_and_plugins_beside_acmix(options, tmp_path):
    arguments = dict(depth=50, base_channels=16, norm_eval=False)
    model = ACmixResNet(**arguments, **DCN_LATE, plugins=PLUGINS, acmix_stages=(0, 1), **options)
    model.init_weights()
    deformable = [module for module in model.modules() if isinstance(module, ModulatedDeformConv2d)]
    assert len(deformable) == 9
    assert all(module.conv_offset.weight.eq(0).all() for module in deformable)
    # These layers of mmcv do not check strides.
    inputs = []
    for module in (*deformable, *(block.context_block for block in model.layer1)):
        module.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    sum(out.square().sum() for out in model(torch.randn(2, 3, 64, 50))).backward()
    assert len(inputs) == 12 and all(each.is_contiguous() for each in inputs)
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused

    # What a plain checkpoint lacks keeps its initial value; everything else is loaded.
    plain = mmdet_resnet.ResNet(**arguments)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'plain.pth'))
    model.init_weights()
    own, theirs = model.state_dict(), plain.state_dict()
    for name in own:
        if re.search(r'conv_offset|context_block', name):
            assert torch.equal(own[name], before[name]), name
        elif not re.search(r'layer[12]\.\d\.(conv2|bn2)', name):
            assert torch.equal(own[name], theirs[name]), name


@torch.no_grad()
def test_deformable_convolution_starts_as_the_convolution_of_a_plain_checkpoint(tmp_path):
    plain = randomised(mmdet_resnet.ResNet(50, base_channels=8))
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    model = load_pretrained(ACmixResNet, tmp_path / 'plain.pth', depth=50, base_channels=8,
                            dcn=dict(type='DCN'), stage_with_dcn=(True, True, False, False),
                            acmix_stages=())
    x = torch.randn(1, 3, 33, 50)
    for expected, actual in zip(plain(x), model(x)):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(stage_with_dcn=(False, True, True, True)), r'dcn and ACmix both replace the 3×3 '
     r'convolutions of the stages 1, 2, 3; drop dcn and stage_with_dcn, or set acmix_stages=\(0,'),
    (dict(stage_with_dcn=(False, False, False, True), mixer=dict(type='Involution'),
          acmix_stages=[2, 3]), r'dcn and mixer both .* stages 3; .* acmix_stages=\(2,\)'),
    (dict(stage_with_dcn=(True,) * 4, acmix_stages=(), conv_cfg=dict(type='ConvWS')),
     'dcn and conv_cfg both replace the 3×3 convolutions of the stages 0, 1, 2, 3; drop one'),
    (dict(stage_with_dcn=(True,)), 'stage_with_dcn needs one bool for each of 4 stages, got 1'),
    (dict(stage_with_dcn=(True,) * 4, depth=34), 'dcn needs bottlenecks, which depth 34 does not'),
    (dict(plugins=PLUGINS, depth=18), 'plugins need bottlenecks, .* 18 and 34 do not have'),
    (dict(plugins=PLUGINS * 2), "have the name 'context_block'; give each a different postfix"),
    (dict(plugins=[dict(PLUGINS[0], position='after_conv4')]),
     "one of after_conv1, after_conv2, after_conv3, got 'after_conv4'"),
    (dict(plugins=[dict(PLUGINS[0], stages=(True,))]), 'one bool for each of 4 stages, got 1'),
])
def test_options_that_exclude_each_other(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixResNet(**{**dict(depth=50, base_channels=16, dcn=dict(type='DCNv2')), **arguments})


def test_dcn_without_stages_has_no_effect():
    model = ACmixResNet(**SMALL, dcn=dict(type='DCNv2'))
    assert all(type(block.conv2) is ACmixConv2d for block in model.layer4)


def test_dilations_of_acmix_layers():
    model = ACmixResNet(50, base_channels=8, stage_blocks=(1, 2, 3, 3), strides=(1, 2, 1, 1),
                        dilations=(1, 1, 2, 4), contract_dilation=True, multi_grid=(1, 2, 4))
    dilations = [[block.conv2.dilation[0] for block in getattr(model, name)]
                 for name in model.layers]
    assert dilations == [[1], [1, 1], [1, 2, 2], [1, 2, 4]]
    strides = [[block.conv2.stride[0] for block in getattr(model, name)] for name in model.layers]
    assert strides == [[1], [2, 1], [1, 1, 1], [1, 1, 1]]


def test_norm_eval_keeps_statistics():
    model = ACmixResNet(**SMALL)
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(2, 3, 64, 64))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_stochastic_depth_drops_whole_residuals_in_training():
    model = ACmixResNet(**SMALL, norm_eval=False, drop_path_rate=0.5)
    blocks = [module for module in model.modules() if isinstance(module, ACmixBottleneck)]
    rates = [block.drop.drop_prob for block in blocks]
    assert rates == torch.linspace(0, 0.5, len(blocks)).tolist()
    x = torch.randn(1, blocks[-1].conv1.in_channels, 6, 5).expand(32, -1, -1, -1)
    with torch.no_grad():
        actual = blocks[-1](x)
        shortcut = blocks[-1].downsample(x)
        blocks[-1].drop = nn.Identity()
        residual = blocks[-1].add_residual(x) - shortcut
    kept = [bool((each - shortcut[0].relu()).abs().max() > 1e-3) for each in actual]
    assert 4 < sum(kept) < 28
    for each, is_kept in zip(actual, kept):
        torch.testing.assert_close(each, (shortcut + 2 * is_kept * residual)[0].relu(),
                                   rtol=1e-4, atol=1e-4)


def test_attention_loads_the_shared_weights_of_a_plain_resnet(tmp_path):
    plain = mmdet_resnet.ResNet(50, base_channels=8)
    torch.save(dict(plain.state_dict(), **{'fc.weight': torch.zeros(10, 256),
                                           'fc.bias': torch.zeros(10)}), tmp_path / 'r50.pth')
    model = ACmixResNet(50, base_channels=8, acmix_stages=(1, 2, 3), mix='attn', init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'r50.pth')))
    before = model.layer2[0].conv2.conv1.weight.clone()
    model.init_weights()
    own, theirs = model.state_dict(), plain.state_dict()
    assert torch.equal(own['layer1.0.conv2.weight'], theirs['layer1.0.conv2.weight'])
    assert torch.equal(own['layer3.5.conv3.weight'], theirs['layer3.5.conv3.weight'])
    assert torch.equal(own['layer2.0.conv2.conv1.weight'], before)


def test_checkpoint_of_another_depth_raises(tmp_path):
    torch.save(ACmixResNet(26, base_channels=8).state_dict(), tmp_path / 'r26.pth')
    model = ACmixResNet(38, base_channels=8, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'r26.pth')))
    with pytest.raises(CheckpointError, match=r'does not fit .* missing: layer1\.1\.conv1\.weight'):
        model.init_weights()


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(depth=20), 'depth must be one of 18, 26, 34, 38, 50, 101, 152, got 20'),
    (dict(depth=50, num_stages=3), 'strides needs one number for each'),
    (dict(depth=50, out_indices=(4,)), r'out_indices must lie in \[0, 4\)'),
    (dict(depth=50, style='tensorflow'), "style must be 'pytorch' or 'caffe'"),
    (dict(depth=50, multi_grid=(1, 2)), 'multi_grid needs one dilation for each of the 3 blocks'),
    (dict(depth=50, base_channels=6), 'num_heads must divide out_channels'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixResNet(**arguments)
