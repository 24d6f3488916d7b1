"""ACmix-Swin against the published code and MMDetection's plain Swin."""

import inspect

import mmdet.models.backbones.swin as mmdet_swin
import mmseg.models.backbones.swin as mmseg_swin
import pytest
import torch
from helpers import relative_error
from helpers.weights import randomised
from mmcv.cnn.bricks.transformer import PatchMerging
from mmengine.model import kaiming_init
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.backbones.swin import ACmixSwinBlock, ACmixSwinTransformer, SwinPatchMerging
from acmix_mm.engine.config import load_config
from acmix_mm.layers import WindowACmix

SMALL = dict(embed_dims=24, depths=(2, 2, 2, 2), num_heads=(3, 3, 6, 12))
TINY = dict(embed_dims=12, depths=(2, 2), num_heads=(3, 6), strides=(4, 2), out_indices=(0, 1))


@pytest.mark.parametrize('name', ['acmix_swin_block_w7', 'acmix_swin_block_sw7'])
def test_block_equals_published_code(golden, name):
    fixture = golden(name)
    meta = fixture.meta
    block = ACmixSwinBlock(
        meta['dim'], meta['num_heads'], 4 * meta['dim'], meta['window_size'],
        shift=meta['shift_size'] > 0, qkv_bias=True, qk_scale=None, drop_rate=0.,
        attn_drop_rate=0., drop_path_rate=0., act_cfg=dict(type='GELU'), norm_cfg=dict(type='LN'),
        with_cp=False, acmix=dict())
    own_names = {}
    for key in meta['state']:
        renamed = key.replace('attn.', 'attn.w_msa.').replace('mlp.fc1', 'ffn.layers.0.0')
        own_names[key] = renamed.replace('mlp.fc2', 'ffn.layers.1')
    weights = {own_names[key]: value for key, value in fixture.state_dict().items()}
    missing = block.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ['attn.w_msa.relative_position_index']
    assert not missing.unexpected_keys

    x = fixture.array('x', meta['input']).requires_grad_()
    out = block(x, tuple(meta['resolution']))
    assert relative_error(out, fixture['output']) < 1e-5
    out.backward(fixture.array('grad', out.shape))
    assert relative_error(x.grad, fixture['grad_input']) < 1e-5
    parameters = dict(block.named_parameters())
    gradients = [key for key in fixture if key.startswith('grad.')]
    assert len(gradients) > 10
    for key in gradients:
        gradient = parameters[own_names[key.removeprefix('grad.')]].grad
        assert relative_error(gradient, fixture[key]) < 1e-4, key


def test_network_equals_published_code(golden, tmp_path):
    """Loaded from a checkpoint file of the authors."""
    fixture = golden('acmix_swin_e24')
    meta = fixture.meta
    checkpoint = tmp_path / 'acmix_swin.pth'
    torch.save(dict(model=fixture.state_dict()), checkpoint)
    model = ACmixSwinTransformer(
        embed_dims=meta['embed_dim'], depths=meta['depths'], num_heads=meta['num_heads'],
        init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint)))
    model.init_weights()
    model.eval()
    stages = []
    for stage in model.stages:
        stage.register_forward_hook(
            lambda _, inputs, out: stages.append(out.unflatten(1, inputs[1]).permute(0, 3, 1, 2)))
    with torch.no_grad():
        outputs = model(fixture.array('x', meta['image']))
    for index, (stage, output) in enumerate(zip(stages, outputs)):
        expected = fixture[f'stage{index}']
        if stage.shape != expected.shape:
            stage = stage[:, :, ::2, ::2]
        assert relative_error(stage, expected) < 1e-5
        assert output.shape[1:] == (24 * 2**index, 56 // 2**index, 56 // 2**index)


SIZES = [
    (224, 224),  # whole windows; the last stage is a single window and not compared
    (224, 416),
    (231, 259),
    (64, 96),
    (33, 200),
]


@pytest.mark.parametrize('plain_swin', [mmdet_swin, mmseg_swin], ids=['mmdet', 'mmseg'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_attention_equals_plain_swin(plain_swin, size):
    """With the same weights, in every stage whose map is larger than one window."""
    plain = randomised(plain_swin.SwinTransformer(**SMALL))
    ours = ACmixSwinTransformer(**SMALL, mix='attn')
    ours.load_state_dict(plain.state_dict())
    plain.eval()
    ours.eval()
    x = torch.randn(2, 3, *size)
    compared = 0
    for expected, actual in zip(plain(x), ours(x)):
        if max(expected.shape[2:]) <= 7:
            break
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize(('size', 'arguments'), [
    ((4, 6), dict()), ((5, 3), dict()), ((1, 1), dict()), ((3, 2), dict(norm_cfg=None)),
    ((7, 8), dict(stride=3)), ((6, 6), dict(stride=1))])
def test_patch_merging_equals_unfolding(size, arguments):
    ours = randomised(SwinPatchMerging(4, 8, **arguments))
    theirs = PatchMerging(4, 8, **arguments)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for merging in (ours, theirs):
        x = torch.randn(2, size[0] * size[1], 4, generator=torch.Generator().manual_seed(0))
        out, out_size = merging(x.requires_grad_(), size)
        grads = torch.autograd.grad(out.square().sum(), [x, *merging.parameters()])
        results.append((out_size, [out, *grads]))
    assert results[0][0] == results[1][0]
    for actual, expected in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(actual, expected)


def test_gradients_of_attention_equal_plain_swin():
    plain = randomised(mmdet_swin.SwinTransformer(**TINY, drop_path_rate=0.)).double()
    ours = ACmixSwinTransformer(**TINY, mix='attn', drop_path_rate=0.).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 84, 68, dtype=torch.float64)
    for model in (plain, ours):
        sum(out.square().sum() for out in model(x)).backward()
    for (name, expected), (own_name, actual) in zip(plain.named_parameters(),
                                                    ours.named_parameters()):
        assert name == own_name
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.parametrize('plain_swin', [mmdet_swin, mmseg_swin], ids=['mmdet', 'mmseg'])
def test_has_the_arguments_of_plain_swin(plain_swin):
    theirs = inspect.signature(plain_swin.SwinTransformer.__init__).parameters
    own = inspect.signature(ACmixSwinTransformer.__init__).parameters
    for name, parameter in theirs.items():
        assert own[name].default == parameter.default, name
    assert set(own) - set(theirs) <= {'acmix_cfg', 'mix', 'mixer', 'last_mixer',
                                      'convert_weights'}


def test_parameter_counts_equal_published_code():
    """With a classifier of 1000 classes: 28.65M and 50.35M (field notes)."""
    for depths, published in (((2, 2, 6, 2), 28.65), ((2, 2, 18, 2), 50.35)):
        model = ACmixSwinTransformer(depths=depths, out_indices=(3,))
        head = 768 * 1000 + 1000
        count = sum(parameter.numel() for parameter in model.parameters()) + head
        assert round(count / 1e6, 2) == published


def test_initial_shift_kernels_and_rates():
    cfg = load_config('configs/shapes/maskrcnn_acmix_swin.py')
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    detector.init_weights()
    for module in detector.modules():
        if isinstance(module, torch.nn.Conv2d):
            kaiming_init(module)
    layers = [module for module in detector.modules() if isinstance(module, WindowACmix)]
    assert len(layers) == 8
    for layer in layers:
        assert layer.rate1.item() == layer.rate2.item() == 0.5
        one_hot = torch.eye(9).view(9, 3, 3)
        assert all(torch.equal(kernels, one_hot) for kernels in layer.dep_conv.weight)
        assert 0 < layer.fc.weight.abs().max() <= (3 * layer.num_heads)**-0.5
        assert 0.01 < layer.qkv.weight.std() < 0.03


def test_absolute_position_embedding_is_interpolated():
    plain = randomised(mmdet_swin.SwinTransformer(**TINY, use_abs_pos_embed=True,
                                                  pretrain_img_size=(64, 96)))
    ours = ACmixSwinTransformer(**TINY, use_abs_pos_embed=True, pretrain_img_size=(64, 96),
                                mix='attn')
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 64, 96)
    plain.eval()
    for expected, actual in zip(plain(x), ours.eval()(x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert ours.position_embedding((20, 30)).shape == (1, 600, 12)
    assert ours(torch.randn(1, 3, 80, 120))[0].shape == (1, 12, 20, 30)
    with torch.no_grad():
        ours.absolute_pos_embed.fill_(0.7)
    torch.testing.assert_close(ours.position_embedding((5, 9)), torch.full((1, 45, 12), 0.7))


def test_half_precision_and_autocast():
    model = randomised(ACmixSwinTransformer(**TINY))
    x = torch.randn(1, 3, 61, 90)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        for out, full in zip(model(x), expected):
            assert relative_error(out.float(), full) < 0.05
    for out, full in zip(model.bfloat16()(x.bfloat16()), expected):
        assert out.dtype == torch.bfloat16
        assert relative_error(out.float(), full) < 0.1


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(mix='both'), 'mix must be one of acmix, attn, conv'),
    (dict(num_heads=(3, 5, 12, 24)), 'num_heads must divide embed_dims, got 5 heads for 192'),
    (dict(patch_size=2), 'patch_size must equal strides'),
    (dict(init_cfg=dict(type='Normal')), 'take init_cfg=dict'),
    (dict(init_cfg=dict(type='Pretrained', checkpoint='a'), pretrained='b'), 'give one'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixSwinTransformer(**arguments)
