"""ACmix-PVT against MMDetection's plain PVT and the published counts."""

import inspect

import mmdet.models.backbones.pvt as mmdet_pvt
import pytest
import torch
from helpers import relative_error
from helpers.checkpoints import load_pretrained
from helpers.stack import HALF_DTYPES
from helpers.weights import randomised
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.backbones import ACmixPyramidVisionTransformer, ACmixPyramidVisionTransformerV2
from acmix_mm.layers import ReducedACmix
from acmix_mm.ops import use_backend

SMALL = dict(embed_dims=8, num_layers=[1, 2, 1, 1], pretrain_img_size=64)
TINY = dict(embed_dims=4, num_stages=2, num_layers=[1, 2], num_heads=[1, 2], patch_sizes=[4, 2],
            strides=[4, 2], paddings=[0, 0], sr_ratios=[2, 1], mlp_ratios=[2, 2],
            out_indices=(0, 1), pretrain_img_size=32)


@pytest.mark.parametrize('size', [(64, 64), (96, 64), (65, 99), (32, 71)], ids=str)
@pytest.mark.parametrize('v2', [False, True], ids=['v1', 'v2'])
def test_attention_equals_plain_pvt(size, v2):
    """With the same weights; position embeddings are interpolated to sizes other than 64."""
    arguments = dict(SMALL)
    if v2:
        arguments.update(patch_sizes=[7, 3, 3, 3], paddings=[3, 1, 1, 1], norm_after_stage=True,
                         use_conv_ffn=True, use_abs_pos_embed=False)
    plain = randomised(mmdet_pvt.PyramidVisionTransformer(**arguments)).double()
    ours = ACmixPyramidVisionTransformer(**arguments, mix='attn').eval().double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for expected, actual in zip(plain(x), ours(x)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_attention_equal_plain_pvt():
    plain = randomised(mmdet_pvt.PyramidVisionTransformer(**TINY, drop_path_rate=0.)).double()
    ours = ACmixPyramidVisionTransformer(**TINY, mix='attn', drop_path_rate=0.).double()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 40, 28, dtype=torch.float64)
    for model in (plain, ours):
        sum(out.square().sum() for out in model(x)).backward()
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.pop(name).grad)
    assert not expected


def test_has_the_arguments_of_plain_pvt():
    theirs = inspect.signature(mmdet_pvt.PyramidVisionTransformer.__init__).parameters
    own = inspect.signature(ACmixPyramidVisionTransformer.__init__).parameters
    for name, parameter in theirs.items():
        assert own[name].default == parameter.default, name
    assert set(own) - set(theirs) == {'acmix_cfg', 'mix', 'with_cp'}


# Published: plain 13.2M, 1.9G and 24.5M, 3.8G; ACmix 13M, 2.0G and 25M, 3.9G.
COUNTS = [
    ('attn', [2, 2, 2, 2], None, 13.23, 1.926),
    ('attn', [3, 4, 6, 3], None, 24.48, 3.806),
    ('acmix', [2, 2, 2, 2], None, 13.40, 1.972),
    ('acmix', [3, 4, 6, 3], None, 24.82, 3.906),
    ('acmix', [2, 2, 2, 2], 'two_step', 13.40, 2.010),
    ('acmix', [3, 4, 6, 3], 'two_step', 24.82, 3.963),
]


@pytest.mark.parametrize(('mix', 'num_layers', 'backend', 'parameters', 'multiply_adds'), COUNTS)
def test_counts_with_a_classifier_of_1000_classes(mix, num_layers, backend, parameters,
                                                  multiply_adds):
    """At 224×224, for the default backend and for the paper's two steps."""
    with torch.device('meta'):
        model = ACmixPyramidVisionTransformer(num_layers=num_layers, mix=mix)
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend(backend):
        model(image)
    # The plain network's published parameters include the last norm.
    head = 2 * 512 + 512 * 1000 + 1000
    counted = sum(parameter.numel() for parameter in model.parameters()) + head
    assert counted / 1e6 == pytest.approx(parameters, abs=0.005)
    counted = counter.get_total_flops() / 2 + 512 * 1000
    assert counted / 1e9 == pytest.approx(multiply_adds, abs=0.001)


def authors_names(state_dict):
    """Rename a state dict from MMDetection's names to those of PVT's authors."""
    renamed = {}
    is_v2 = 'layers.0.2.weight' in state_dict
    ffn = {'0': 'fc1', '1': 'dwconv.dwconv', '4': 'fc2'} if is_v2 else {'0': 'fc1', '3': 'fc2'}
    for key, value in state_dict.items():
        _, stage, part, *rest = key.split('.')
        stage, rest = int(stage) + 1, '.'.join(rest)
        if part == '0':
            renamed[f'patch_embed{stage}.{rest.replace("projection", "proj")}'] = value
        elif rest == '0.pos_embed':
            if stage == 2:
                value = torch.cat([torch.ones(1, 1, value.shape[2]), value], 1)
            renamed[f'pos_embed{stage}'] = value
        elif part == '2':
            renamed[f'norm{stage}.{rest}'] = value
        else:
            block, _, rest = rest.partition('.')
            name = f'block{stage}.{int(block) - (not is_v2)}.{rest}'
            if 'in_proj_' in name:
                q, kv = value.tensor_split([value.shape[0] // 3])
                renamed[name.replace('attn.in_proj_', 'q.')] = q
                renamed[name.replace('attn.in_proj_', 'kv.')] = kv
                continue
            name = name.replace('attn.attn.out_proj', 'attn.proj')
            for index, layer in ffn.items():
                name = name.replace(f'ffn.layers.{index}.', f'mlp.{layer}.')
            is_linear = '.mlp.fc' in name and value.dim() == 4
            renamed[name] = value.flatten(1) if is_linear else value
    if is_v2:
        return renamed
    return {**renamed, 'cls_token': torch.zeros(1, 1, 8), 'norm.weight': torch.zeros(8),
            'norm.bias': torch.zeros(8), 'head.weight': torch.zeros(10, 8)}


@pytest.mark.parametrize('naming', ['authors', 'MMDetection'])
@pytest.mark.parametrize(('network', 'arguments'), [
    (ACmixPyramidVisionTransformer, TINY),
    (ACmixPyramidVisionTransformerV2, dict(embed_dims=4, num_layers=[1, 2, 1, 1])),
], ids=['v1', 'v2'])
def test_initial_outputs_equal_the_loaded_plain_pvt(network, arguments, naming, tmp_path):
    host = getattr(mmdet_pvt, network.__name__.removeprefix('ACmix'))
    plain = randomised(host(**arguments))
    state_dict = plain.state_dict()
    if naming == 'authors':
        state_dict = authors_names(state_dict)
        theirs = mmdet_pvt.pvt_convert(state_dict)
        assert {key: value.shape for key, value in theirs.items() if 'pos_embed' not in key} == {
            key: value.shape for key, value in plain.state_dict().items() if 'pos_embed' not in key}
    torch.save(state_dict, tmp_path / 'pvt.pth')
    model = load_pretrained(network, tmp_path / 'pvt.pth', **arguments)
    x = torch.randn(2, 3, 48, 36)
    for expected, actual in zip(plain(x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    for module in model.modules():
        if isinstance(module, ReducedACmix):
            assert (module.rate1.item(), module.rate2.item()) == (1, 0)


def test_position_embedding_of_another_image_size_is_resized(tmp_path):
    plain = randomised(mmdet_pvt.PyramidVisionTransformer(**{**TINY, 'pretrain_img_size': 64}))
    torch.save(plain.state_dict(), tmp_path / 'pvt.pth')
    model = load_pretrained(ACmixPyramidVisionTransformer, tmp_path / 'pvt.pth', **TINY)
    assert model.layers[0][1][0].pos_embed.shape == (1, 64, 4)
    with torch.no_grad():
        for stage in (0, 1):
            plain.layers[stage][1][0].pos_embed.fill_(0.7)
    torch.save(authors_names(plain.state_dict()), tmp_path / 'pvt.pth')
    model = load_pretrained(ACmixPyramidVisionTransformer, tmp_path / 'pvt.pth', **TINY)
    table = model.layers[1][1][0].pos_embed
    torch.testing.assert_close(table, torch.full((1, 16, 8), 0.7))


def test_half_precision_and_autocast():
    model = randomised(ACmixPyramidVisionTransformer(**TINY))
    x = torch.randn(1, 3, 45, 50)
    expected = model(x)
    with torch.autocast('cpu', torch.bfloat16):
        for out, full in zip(model(x), expected):
            assert relative_error(out.float(), full) < 0.05
    for dtype in HALF_DTYPES:
        for out, full in zip(model.to(dtype)(x.to(dtype)), expected):
            assert out.dtype == dtype
            assert relative_error(out.float(), full) < 0.1


@pytest.mark.parametrize(('arguments', 'message'), [
    (dict(mix='both'), 'mix must be one of acmix, attn, conv'),
    (dict(num_layers=[2, 2]), 'num_layers needs one number for each of the 4 stages'),
    (dict(out_indices=(0, 4)), r'out_indices must lie in \[0, 4\)'),
    (dict(init_cfg=dict(type='Normal')), 'take init_cfg=dict'),
    (dict(init_cfg=dict(type='Pretrained', checkpoint='a'), pretrained='b'), 'give one'),
])
def test_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ACmixPyramidVisionTransformer(**arguments)
