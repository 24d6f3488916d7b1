"""ACmix-Swin against the authors' published code, and against MMDetection's plain Swin."""

import inspect

import mmdet.models.backbones.swin as mmdet_swin
import mmseg.models.backbones.swin as mmseg_swin
import pytest
import torch
from helpers import relative_error
from mmengine.model import kaiming_init
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.backbones.swin import ACmixSwinBlock, ACmixSwinTransformer
from acmix_mm.checkpoints.host import HOSTS
from acmix_mm.engine.config import load_config
from acmix_mm.layers import WindowACmix, window_acmix
from acmix_mm.layers import base as conv_path

SMALL = dict(embed_dims=24, depths=(2, 2, 2, 2), num_heads=(3, 3, 6, 12))
TINY = dict(embed_dims=12, depths=(2, 2), num_heads=(3, 6), strides=(4, 2), out_indices=(0, 1))


def randomised(model, scale=0.2):
    """Give every parameter a value that matters, norms and rates near one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = scale * torch.randn(parameter.shape, generator=generator)
            near_one = name.endswith(('rate1', 'rate2')) or ('norm' in name and 'weight' in name)
            parameter.copy_(1 + noise if near_one else noise)
    return model


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
    """Through the checkpoint file of the authors, as a user loads it."""
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
    (224, 224),  # whole windows down to the last stage, which is one window: left out below
    (224, 416),
    (231, 259),
    (64, 96),
    (33, 200),
]


@pytest.mark.parametrize('rival', [mmdet_swin, mmseg_swin], ids=['mmdet', 'mmseg'])
@pytest.mark.parametrize('size', SIZES, ids=str)
def test_attention_alone_equals_plain_swin(rival, size):
    """On the same weights, in every stage whose map is larger than one window."""
    plain = randomised(rival.SwinTransformer(**SMALL))
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


def test_attention_alone_has_the_gradients_of_plain_swin():
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


@pytest.mark.parametrize('rival', [mmdet_swin, mmseg_swin], ids=['mmdet', 'mmseg'])
def test_takes_the_arguments_of_plain_swin(rival):
    theirs = inspect.signature(rival.SwinTransformer.__init__).parameters
    own = inspect.signature(ACmixSwinTransformer.__init__).parameters
    for name, parameter in theirs.items():
        assert own[name].default == parameter.default, name
    assert set(own) - set(theirs) <= {'acmix_cfg', 'mix', 'mixer', 'convert_weights'}


@pytest.mark.parametrize('mix', ['acmix', 'attn', 'conv'])
def test_any_size(mix):
    model = randomised(ACmixSwinTransformer(**SMALL, mix=mix)).eval()
    for height, width in ((1, 1), (1, 300), (3, 5), (28, 29), (57, 31), (225, 17)):
        maps = model(torch.randn(1, 3, height, width))
        for index, out in enumerate(maps):
            stride = 4 * 2**index
            assert out.shape == (1, 24 * 2**index, -(-height // stride), -(-width // stride))
            assert out.isfinite().all()


@pytest.mark.parametrize('size', [(14, 21), (7, 7), (10, 9), (5, 6), (2, 20), (7, 13), (1, 1)])
@pytest.mark.parametrize('shift_size', [0, 3])
def test_layer_equals_reference_forms(size, shift_size, monkeypatch):
    """The module as it runs against the same module on the reference form of each operator."""
    layer = randomised(WindowACmix(12, 3, 7, shift_size)).double()
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    fast = layer(x)
    gradient, = torch.autograd.grad(fast.sin().sum(), x)
    for module, name in ((conv_path, 'shift_conv'), (window_acmix, 'window_attention')):
        operator = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, operator=operator, **kwargs: operator(
            *args, **kwargs, backend='reference'))
    slow = layer(x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradient, torch.autograd.grad(slow.sin().sum(), x)[0])


def test_paths_add_up():
    """'acmix' is rate1 times 'attn' plus rate2 times 'conv', on the same weights."""
    both = randomised(WindowACmix(12, 3, 7, 3)).eval()
    x = torch.randn(2, 15, 16, 12)
    parts = []
    for mix in ('attn', 'conv'):
        part = WindowACmix(12, 3, 7, 3, mix=mix).eval()
        result = part.load_state_dict(both.state_dict(), strict=False)
        assert not result.missing_keys
        assert not [name for name, _ in part.named_parameters() if 'rate' in name]
        parts.append(part(x))
    torch.testing.assert_close(both(x), both.rate1 * parts[0] + both.rate2 * parts[1])


def test_left_out_path_has_no_parameters():
    names = {mix: {name for name, _ in WindowACmix(12, 3, 7, mix=mix).named_parameters()}
             for mix in ('acmix', 'attn', 'conv')}
    attending = {'relative_position_bias_table', 'proj.weight', 'proj.bias'}
    mixing = {'fc.weight', 'fc.bias', 'dep_conv.weight'}
    shared = {'qkv.weight', 'qkv.bias'}
    assert names['attn'] == shared | attending
    assert names['conv'] == shared | mixing
    assert names['acmix'] == shared | attending | mixing | {'rate1', 'rate2'}


def test_convolution_wraps_around_in_shifted_blocks_only():
    """The edges of the map meet in a shifted block, whatever padding the windows need."""
    for size in ((14, 14), (16, 9)):
        reach = {}
        for shift_size in (0, 3):
            layer = randomised(WindowACmix(12, 3, 7, shift_size, mix='conv'))
            x = torch.randn(1, *size, 12, requires_grad=True)
            layer(x)[0, 0, 0].sum().backward()
            touched = x.grad[0].abs().sum(-1).nonzero()
            reach[shift_size] = {tuple(position) for position in touched.tolist()}
        assert reach[0] == {(0, 0), (0, 1), (1, 0), (1, 1)}
        rows, columns = (0, 1, size[0] - 1), (0, 1, size[1] - 1)
        assert reach[3] == {(row, column) for row in rows for column in columns}


def test_parameter_counts_equal_published_code():
    """Counted on the published code with a 1000-class head: 28.65M and 50.35M (field notes)."""
    for depths, published in (((2, 2, 6, 2), 28.65), ((2, 2, 18, 2), 50.35)):
        model = ACmixSwinTransformer(depths=depths, out_indices=(3,))
        head = 768 * 1000 + 1000
        count = sum(parameter.numel() for parameter in model.parameters()) + head
        assert round(count / 1e6, 2) == published


def test_starts_with_shift_kernels_and_rates_of_one_half():
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


def test_frozen_stages_stay_frozen():
    model = ACmixSwinTransformer(**SMALL, frozen_stages=2, use_abs_pos_embed=True, drop_rate=0.1)
    assert model.train() is model
    frozen = ('patch_embed', 'absolute_pos_embed', 'stages.0', 'stages.1', 'norm0', 'norm1')
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    assert not model.stages[1].training
    assert not model.drop_after_pos.training
    assert model.stages[2].training
    sum(out.sum() for out in model(torch.randn(1, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name


def test_checkpointing_changes_nothing_but_memory():
    x = torch.randn(1, 3, 60, 40, requires_grad=True)
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = ACmixSwinTransformer(**TINY, with_cp=with_cp, drop_path_rate=0.)
        outs = model(x)
        gradients.append(torch.autograd.grad(sum(out.square().sum() for out in outs),
                                             [x, *model.parameters()]))
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)


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
    model = randomised(ACmixSwinTransformer(**TINY)).eval()
    x = torch.randn(1, 3, 61, 90)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        for out, full in zip(model(x), expected):
            assert relative_error(out.float(), full) < 0.05
    for out, full in zip(model.bfloat16()(x.bfloat16()), expected):
        assert out.dtype == torch.bfloat16
        assert relative_error(out.float(), full) < 0.1


def test_patch_merging_order_is_converted():
    """A weight that picks one pixel and channel in Microsoft's order picks it in MMDetection's."""
    merging = mmdet_swin.PatchMerging(in_channels=3, out_channels=6)
    image = torch.arange(2 * 2 * 3.).view(1, 2, 2, 3)
    # Microsoft joins the pixels (row, column) in the order (0, 0), (1, 0), (0, 1), (1, 1).
    order = [(row, column, channel) for column in (0, 1) for row in (0, 1) for channel in range(3)]
    for index, (row, column, channel) in enumerate(order):
        weight = torch.zeros(6, 12)
        weight[0, index] = 1
        _, converted = HOSTS['Swin'].to_backbone_keys({
            'patch_embed.proj.weight': torch.zeros(1),
            'layers.0.blocks.0.norm1.weight': torch.zeros(1),
            'layers.0.downsample.reduction.weight': weight})
        merging.reduction.weight.data = converted['stages.0.downsample.reduction.weight']
        merging.norm = torch.nn.Identity()
        out, _ = merging(image.view(1, 4, 3), (2, 2))
        assert out[0, 0, 0] == image[0, row, column, channel]


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(mix='both'), 'mix must be one of acmix, attn, conv'),
    (dict(num_heads=(3, 5, 12, 24)), 'num_heads must divide embed_dims, got 5 heads for 192'),
    (dict(patch_size=2), 'patch_size must equal strides'),
    (dict(init_cfg=dict(type='Normal')), 'take init_cfg=dict'),
    (dict(init_cfg=dict(type='Pretrained', checkpoint='a'), pretrained='b'), 'give one'),
])
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixSwinTransformer(**arguments)


def test_layer_refuses_shift_of_a_whole_window():
    with pytest.raises(ValueError, match='shift_size must lie in'):
        WindowACmix(12, 3, 7, 7)
