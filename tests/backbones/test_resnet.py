"""ACmixConv2d and ACmix-ResNet against the published code and against what they replace."""

import inspect
import os
import subprocess
import sys

import mmdet.models.backbones.resnet as mmdet_resnet
import pytest
import torch
from helpers import ROOT, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.ops import RoIAlign
from mmengine.model import kaiming_init
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from acmix_mm.backbones import ACmixResNet
from acmix_mm.backbones.resnet import ACmixBottleneck
from acmix_mm.engine.config import load_config
from acmix_mm.layers import ACmixConv2d
from acmix_mm.layers.acmix_conv import coordinates
from acmix_mm.utils.errors import CheckpointError

SMALL = dict(depth=26, base_channels=8, stage_blocks=(1, 2, 1, 1))


@pytest.mark.parametrize('name', ['acmix_conv_s1', 'acmix_conv_s2', 'acmix_conv_k5'])
def test_layer_equals_published_code(golden, name):
    fixture = golden(name)
    meta = fixture.meta
    layer = ACmixConv2d(meta['in_channels'], meta['out_channels'], meta['kernel_conv'],
                        meta['stride'], num_heads=meta['head'],
                        attn_kernel_size=meta['kernel_att'])
    layer.load_state_dict(fixture.state_dict())
    x = fixture.array('x', meta['input']).requires_grad_()
    out = layer(x)
    assert relative_error(out, fixture['output']) < 1e-5
    out.backward(fixture.array('grad', out.shape))
    assert relative_error(x.grad, fixture['grad_input']) < 1e-5
    parameters = dict(layer.named_parameters())
    assert {f'grad.{key}' for key in parameters} <= set(fixture)
    for key, parameter in parameters.items():
        expected = fixture[f'grad.{key}']
        # Softmax cancels the bias of the position encoding: both gradients are rounding alone.
        # That of a rate is one sum over the map, of terms that nearly cancel.
        slack = 1e-4 * fixture['grad_input'].abs().max() if key == 'conv_p.bias' else 0
        bound = 1e-3 if key.startswith('rate') else 1e-4
        assert (parameter.grad - expected).abs().max() <= bound * expected.abs().max() + slack, key


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
    """Counted on the published code with a 1000-class head (field notes, section 4)."""
    head = 2048 * 1000 + 1000
    for depth, published in ((26, 10.49), (38, 14.41), (50, 18.33)):
        count = sum(parameter.numel() for parameter in ACmixResNet(depth).parameters()) + head
        assert round(count / 1e6, 2) == published


@settings(max_examples=60, deadline=None)
@given(size=st.tuples(st.integers(1, 24), st.integers(1, 24)), kernel=st.sampled_from([3, 5]),
       stride=st.integers(1, 3), dilation=st.integers(1, 3),
       mix=st.sampled_from(['acmix', 'attn', 'conv']), batch=st.integers(1, 2))
def test_has_the_output_size_of_the_convolution(size, kernel, stride, dilation, mix, batch):
    padding = dilation * (kernel // 2)
    arguments = (4, 8, kernel, stride, padding, dilation)
    x = torch.randn(batch, 4, *size)
    out = ACmixConv2d(*arguments, num_heads=2, attn_kernel_size=5, mix=mix)(x)
    assert out.shape == nn.Conv2d(*arguments)(x).shape
    assert out.isfinite().all()


def solve_for(layer, conv):
    """Give a three-head ``mix='conv'`` layer the weights that make it equal to ``conv``.

    For each head channel d, the taps of its outputs, stacked to (heads · 9, in_channels), must
    factor through the 3 · heads maps of that channel: rank at most nine.
    """
    heads, head_dims = layer.num_heads, conv.out_channels // layer.num_heads
    with torch.no_grad():
        layer.fc.weight.copy_(torch.eye(9)[:, :, None, None])
        for channel in range(head_dims):
            outputs = slice(channel * heads, (channel + 1) * heads)
            stacked = conv.weight[outputs].permute(0, 2, 3, 1).reshape(heads * 9, -1)
            left, values, right = torch.linalg.svd(stacked, full_matrices=False)
            assert values[9:].abs().max() < 1e-10
            projected = right[:9].unflatten(0, (3, heads))
            for projection, rows in zip((layer.conv1, layer.conv2, layer.conv3), projected):
                projection.weight[channel::head_dims] = rows[:, :, None, None]
            taps = (left * values)[:, :9].view(heads, 3, 3, 9).permute(0, 3, 1, 2)
            layer.dep_conv.weight[outputs] = taps


@pytest.mark.parametrize('kernel', ['three taps', 'low rank'])
def test_convolution_path_expresses_a_convolution_within_its_reach(kernel):
    conv = nn.Conv2d(11, 12, 3, padding=1, bias=False).double()
    layer = ACmixConv2d(11, 12, 3, num_heads=3, bias=False, mix='conv').double()
    with torch.no_grad():
        if kernel == 'three taps':
            taps = torch.zeros(3, 3)
            taps[0, 2] = taps[1, 0] = taps[2, 2] = 1
            conv.weight.mul_(taps)
        else:
            conv.weight[:, :2] = conv.weight[:, 2:4]
    solve_for(layer, conv)
    x = torch.randn(2, 11, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_half_precision(dtype, stride, dilation):
    layer = ACmixConv2d(8, 16, stride=stride, dilation=dilation)
    x = torch.randn(2, 8, 13, 17)
    expected = layer(x)
    out = layer.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) < 0.03
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_autocast():
    layer = ACmixConv2d(8, 16)
    x = torch.randn(2, 8, 13, 17)
    expected = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        out = layer(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), expected) < 0.03
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize('mix', ['acmix', 'attn', 'conv'])
@pytest.mark.parametrize('stride', [1, 2])
def test_keeps_the_memory_format_as_a_convolution_does(stride, mix):
    layer = ACmixConv2d(8, 16, stride=stride, mix=mix).double()
    x = torch.randn(2, 8, 13, 17, dtype=torch.float64)
    expected, actual = layer(x), layer(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)
    assert expected.is_contiguous()
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('acmix_stages', [(0, 1, 2, 3), (1,)], ids=str)
def test_outputs_can_be_read_without_a_look_at_strides(acmix_stages):
    """As mmcv's RoIAlign reads them, which would take a map in another format for noise."""
    model = ACmixResNet(**SMALL, acmix_stages=acmix_stages).eval()
    rois = torch.tensor([[0, 3., 5., 40., 33.]])
    for out in model(torch.randn(1, 3, 64, 80)):
        align = RoIAlign(output_size=2, spatial_scale=out.shape[2] / 64)
        coordinate_major = out.contiguous(memory_format=torch.channels_last)
        expected = torch.stack([align(channel[None, None].contiguous(), rois)[0, 0]
                                for channel in coordinate_major[0]])
        torch.testing.assert_close(align(out, rois)[0], expected)


def test_position_maps_are_made_once_for_a_size():
    layer = ACmixConv2d(8, 16)
    # One that was made under inference mode serves in training, too.
    with torch.inference_mode():
        layer(torch.randn(1, 8, 9, 7))
    layer(torch.randn(1, 8, 9, 7)).sum().backward()
    device = torch.device('cpu')
    made = coordinates(9, 7, torch.float32, device)
    assert coordinates(9, 7, torch.float32, device) is made
    assert coordinates(9, 7, torch.float64, device).dtype == torch.float64
    grid = coordinates(3, 5, torch.float32, torch.device('cpu'))
    assert grid[0, 0].tolist() == [-1, -1]
    assert grid[2, 4].tolist() == [1, 1]
    assert grid[0, 4].tolist() == [1, -1]


def test_state_dict_round_trip_and_names():
    layer = ACmixConv2d(8, 16)
    names = {f'conv{index}.{kind}' for index in (1, 2, 3) for kind in ('weight', 'bias')}
    names |= {'conv_p.weight', 'conv_p.bias', 'fc.weight', 'dep_conv.weight', 'rate1', 'rate2'}
    assert set(layer.state_dict()) == names
    other = ACmixConv2d(8, 16)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(1, 8, 6, 7)
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(groups=2), 'no groups, got groups=2; allowed is 1'),
    (dict(num_heads=3), 'num_heads must divide out_channels, got 3 heads for 16 channels'),
    (dict(kernel_size=4), 'kernel_size must be odd, got 4'),
    (dict(attn_kernel_size=6), 'attn_kernel_size must be odd, got 6'),
    (dict(padding=0), 'kernel_size=3 with dilation=1 allows padding=1, got 0'),
    (dict(padding=1, dilation=2), 'dilation=2 allows padding=2, got 1'),
    (dict(kernel_size=(3, 5)), 'kernel_size must be the same along both axes'),
    (dict(stride=(1, 2)), 'stride must be the same along both axes'),
    (dict(mix='all'), 'mix must be one of'),
])
def test_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixConv2d(**{**dict(in_channels=8, out_channels=16), **arguments})


def test_conv_cfg_builds_acmix_and_plain_pointwise_convolutions():
    conv_cfg = dict(type='ACmix', num_heads=2, attn_kernel_size=5, mix='acmix')
    assert type(build_conv_layer(conv_cfg, 8, 16, 1, bias=False)) is nn.Conv2d
    assert type(build_conv_layer(conv_cfg, 8, 16, kernel_size=(1, 1), stride=2)) is nn.Conv2d
    layer = build_conv_layer(conv_cfg, 8, 16, 3, stride=2, padding=1, bias=False)
    assert isinstance(layer, ACmixConv2d)
    assert (layer.num_heads, layer.attn_kernel_size, layer.conv1.bias) == (2, 5, None)
    module = ConvModule(8, 16, 3, padding=2, dilation=2, conv_cfg=conv_cfg,
                        norm_cfg=dict(type='BN'))
    assert module(torch.randn(2, 8, 9, 5)).shape == (2, 16, 9, 5)
    assert (module.kernel_size, module.padding, module.dilation) == ((3, 3), 2, (2, 2))
    assert_at_start(module.conv)


def assert_at_start(layer):
    one_hot = torch.eye(9).view(9, 3, 3)
    assert all(torch.equal(kernels, one_hot) for kernels in layer.dep_conv.weight)
    assert layer.rate1.item() == layer.rate2.item() == 0.5


def test_initialisation_survives_a_whole_detector():
    cfg = load_config('configs/shapes/maskrcnn_acmix_r50.py')
    conv_cfg = dict(type='ACmix', num_heads=4)
    cfg.model.neck.conv_cfg = cfg.model.roi_head.mask_head.conv_cfg = conv_cfg
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            kaiming_init(module)
    layers = [module for module in detector.modules() if isinstance(module, ACmixConv2d)]
    assert len(layers) == 16 + 4 + 4
    for layer in layers:
        assert_at_start(layer)


def test_takes_the_arguments_of_plain_resnet():
    theirs = inspect.signature(mmdet_resnet.ResNet.__init__).parameters
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


@pytest.mark.parametrize('arguments', PLAIN, ids=str)
def test_without_acmix_stages_it_is_mmdetections_resnet(arguments):
    plain = mmdet_resnet.ResNet(50, base_channels=8, norm_eval=False, **arguments)
    ours = ACmixResNet(50, base_channels=8, norm_eval=False, acmix_stages=(), **arguments)
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


def test_attention_alone_takes_what_a_plain_resnet_has_in_common(tmp_path):
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


def test_checkpoint_of_another_depth_is_refused(tmp_path):
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
    (dict(depth=50, base_channels=6), 'num_heads must divide out_channels'),
])
def test_backbone_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixResNet(**arguments)


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor had which an operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 2)])
def test_no_tensor_is_many_times_the_map(stride, dilation):
    """The published form makes several of 49 times the map, forward and backward."""
    layer = ACmixConv2d(64, 64, stride=stride, dilation=dilation)
    x = torch.randn(1, 64, 96, 160, requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert x.numel() < largest.elements <= 10 * x.numel()


def test_memory_at_detection_size():
    """Forward and backward at 64 channels, 200×336, in a process of its own."""
    done = subprocess.run([sys.executable, '-c', '''
import re
import torch
from acmix_mm.layers import ACmixConv2d

def mebibytes(entry):
    with open('/proc/self/status') as status:
        return int(re.search(entry + r':\\s+(\\d+) kB', status.read()).group(1)) / 1024

torch.set_num_threads(2)
layer = ACmixConv2d(64, 64)
layer(torch.randn(1, 64, 16, 16, requires_grad=True)).sum().backward()
x = torch.randn(1, 64, 200, 336, requires_grad=True)
with open('/proc/self/clear_refs', 'w') as peak:
    peak.write('5')
idle = mebibytes('VmRSS')
layer(x).sum().backward()
print(mebibytes('VmHWM') - idle)
'''], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                          check=True)
    assert 50 < float(done.stdout) < 400


ACMIX = dict(type='ACmix', num_heads=2, attn_kernel_size=5)


@pytest.mark.parametrize(('cfg', 'inputs', 'layers'), [
    (dict(type='mmdet.ResNet', depth=50, base_channels=8), (1, 3, 40, 56), 17),
    (dict(type='mmdet.ResNet', depth=18, base_channels=8), (1, 3, 33, 47), 17),
    (dict(type='mmdet.FPN', in_channels=[8, 16], out_channels=8, num_outs=3),
     [(1, 8, 20, 13), (1, 16, 10, 7)], 2),
    (dict(type='mmdet.RetinaHead', num_classes=3, in_channels=8, feat_channels=8),
     [(1, 8, size, size) for size in (16, 8, 4, 2, 1)], 8),
    (dict(type='mmdet.FCNMaskHead', in_channels=8, conv_out_channels=8, num_classes=3),
     (5, 8, 14, 14), 4),
    (dict(type='mmdet.Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8,
          fc_out_channels=16, num_classes=3), (5, 8, 7, 7), 4),
    (dict(type='mmseg.UPerHead', in_channels=[8, 16], in_index=[0, 1], channels=8, num_classes=3,
          norm_cfg=dict(type='BN')), [(2, 8, 20, 13), (2, 16, 10, 7)], 3),
    (dict(type='mmseg.FCNHead', in_channels=8, channels=8, num_classes=3, in_index=0,
          dilation=2), [(2, 8, 9, 13)], 3),
], ids=lambda value: value['type'] if isinstance(value, dict) else None)
def test_serves_as_conv_cfg_across_openmmlab(cfg, inputs, layers):
    """Each module builds with ACmix, computes what its plain twin's shapes say, and trains."""
    x = ([torch.randn(size) for size in inputs] if isinstance(inputs, list) else
         torch.randn(inputs))
    plain, ours = MODELS.build(dict(cfg)), MODELS.build(dict(cfg, conv_cfg=ACMIX))
    assert len([module for module in ours.modules() if isinstance(module, ACmixConv2d)]) == layers
    ours.init_weights()
    expected, actual = (tree_leaves(module(x)) for module in (plain, ours))
    assert [each.shape for each in actual] == [each.shape for each in expected]
    sum(each.square().sum() for each in actual).backward()
    for module in ours.modules():
        if isinstance(module, ACmixConv2d):
            assert module.rate1.grad is not None
