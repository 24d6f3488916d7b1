"""ACmix-ResNet against the published code and MMDetection's ResNet."""

import inspect

import mmdet.models.backbones.resnet as mmdet_resnet
import mmseg.models.backbones.resnet as mmseg_resnet
import pytest
import torch
from helpers import relative_error
from mmcv.ops import RoIAlign
from torch import nn

from acmix_mm.backbones import ACmixResNet
from acmix_mm.backbones.resnet import ACmixBottleneck
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
    # Where the defaults differ, ours are those of MMDetection.
    theirs = {**inspect.signature(mmseg_resnet.ResNet.__init__).parameters,
              **inspect.signature(mmdet_resnet.ResNet.__init__).parameters}
    own = inspect.signature(ACmixResNet.__init__).parameters
    for name in set(theirs) - {'conv_cfg', 'dcn', 'stage_with_dcn', 'plugins'}:
        assert own[name].default == theirs[name].default, name


PLAIN = [
    dict(),
    dict(style='caffe', out_indices=(1, 3)),
    dict(deep_stem=True, avg_down=True, stem_channels=16),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,)),
    dict(norm_cfg=dict(type='GN', num_groups=2)),
    dict(with_cp=True, frozen_stages=1),
]


# Arguments that only MMSegmentation's ResNet has.
PLAIN_MMSEG = [
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True,
         multi_grid=(1, 2, 4)),
    dict(strides=(1, 2, 1), dilations=(1, 1, 2), num_stages=3, out_indices=(0, 2),
         multi_grid=(3, 2, 1, 2, 3, 1)),
]
HOSTS = {'MMDetection': mmdet_resnet.ResNet, 'MMSegmentation': mmseg_resnet.ResNet}


@pytest.mark.parametrize(('library', 'arguments'), [
    *[(library, arguments) for arguments in PLAIN for library in HOSTS],
    *[('MMSegmentation', arguments) for arguments in PLAIN_MMSEG],
], ids=str)
def test_without_acmix_stages_equals_the_libraries_resnet(library, arguments):
    arguments = {**dict(depth=50, base_channels=8, stem_channels=8, norm_eval=False), **arguments}
    assert_equal_networks(HOSTS[library](**arguments), ACmixResNet(**arguments, acmix_stages=()))


def assert_equal_networks(plain, ours):
    """Check the features, and which parameters and statistics are frozen in training."""
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    ours.load_state_dict(plain.state_dict())
    plain.train()
    ours.train()
    x = torch.randn(2, 3, 65, 50)
    for expected, actual in zip(plain(x), ours(x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for (name, own), (_, theirs) in zip(ours.named_parameters(), plain.named_parameters()):
        assert own.requires_grad == theirs.requires_grad, name
    theirs = dict(plain.named_modules())
    for name, own in ours.named_modules():
        if isinstance(own, nn.BatchNorm2d):
            assert own.training == theirs[name].training, name


@pytest.mark.parametrize('arguments', [
    dict(), dict(mix='attn'), dict(mix='conv'), dict(acmix_stages=(2, 3)),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)), dict(style='caffe'),
    dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True, multi_grid=(2,)),
], ids=str)
def test_trains_at_odd_sizes(arguments):
    model = ACmixResNet(**SMALL, norm_eval=False, **arguments)
    model.init_weights()
    for height, width in ((1, 1), (33, 70), (75, 9)):
        outs = model(torch.randn(2, 3, height, width))
        strides = [4]
        for stride in arguments.get('strides', (1, 2, 2, 2))[1:]:
            strides.append(strides[-1] * stride)
        for index, (out, stride) in enumerate(zip(outs, strides)):
            assert out.shape == (2, 32 * 2**index, -(-height // stride), -(-width // stride))
    sum(out.square().sum() for out in outs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


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
    (dict(depth=101), 'depth must be one of 26, 38, 50, got 101'),
    (dict(depth=50, num_stages=3), 'need one number for each'),
    (dict(depth=50, out_indices=(4,)), 'out_indices must lie below num_stages=4'),
    (dict(depth=50, style='tensorflow'), "style must be 'pytorch' or 'caffe'"),
    (dict(depth=50, multi_grid=(1, 2)), 'multi_grid needs one dilation for each of the 3 blocks'),
    (dict(depth=50, base_channels=6), 'num_heads must divide out_channels'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixResNet(**arguments)
