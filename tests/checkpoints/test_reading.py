"""What ACmix-Swin loads, what it says of it, and what it refuses."""

import argparse

import mmdet.models.backbones.swin as mmdet_swin
import pytest
import torch
from helpers import relative_error
from helpers.checkpoints import write_bad_checkpoint

from acmix_mm.backbones import ACmixSwinTransformer
from acmix_mm.layers import WindowACmix
from acmix_mm.utils.errors import CheckpointError

TINY = dict(embed_dims=12, depths=(2, 2), num_heads=(3, 6), strides=(4, 2), out_indices=(0, 1))


def microsoft_names(state_dict):
    """A state dict in MMDetection's naming, as Microsoft's code would have saved it."""
    renamed = {}
    for key, value in state_dict.items():
        if key.startswith('norm'):
            continue
        if '.downsample.' in key:
            # Channel by channel, row by row, to pixel by pixel, column by column.
            value = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -2)
            value = value.movedim(-3, -1).flatten(-3)
        for new, old in (('stages.', 'layers.'), ('.attn.w_msa.', '.attn.'),
                         ('.ffn.layers.0.0.', '.mlp.fc1.'), ('.ffn.layers.1.', '.mlp.fc2.'),
                         ('patch_embed.projection.', 'patch_embed.proj.')):
            key = key.replace(new, old)
        renamed[key] = value
    return {
        **renamed,
        'norm.weight': torch.zeros(24),
        'norm.bias': torch.zeros(24),
        'head.weight': torch.zeros(10, 24),
        'head.bias': torch.zeros(10),
        'layers.0.blocks.1.attn_mask': torch.zeros(4, 49, 49),
    }


def random_plain():
    plain = mmdet_swin.SwinTransformer(**TINY)
    plain.eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
        for name, parameter in plain.named_parameters():
            if 'norm' in name and name.startswith('norm'):
                parameter.fill_(1.0 if name.endswith('weight') else 0.0)
    return plain


def pretrained(path, **arguments):
    model = ACmixSwinTransformer(**{**TINY, **arguments},
                                 init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model.eval()


def wrap_plain(plain):
    own = plain.state_dict()
    return {
        'Microsoft': dict(model=microsoft_names(own)),
        'MMDetection': dict(state_dict=own),
        'bare': own,
        'detector': dict(state_dict={
            **{f'module.backbone.{key}': value for key, value in own.items()},
            'module.neck.weight': torch.zeros(3)}),
    }


@pytest.mark.parametrize('source', ['Microsoft', 'MMDetection', 'bare', 'detector'])
def test_plain_swin_computes_the_same_at_first(source, tmp_path, said):
    plain = random_plain()
    torch.save(wrap_plain(plain)[source], tmp_path / 'swin.pth')
    model = pretrained(tmp_path / 'swin.pth')
    x = torch.randn(2, 3, 84, 68)
    for expected, actual in zip(plain(x), model(x)):
        assert relative_error(actual, expected) < 1e-5
    for module in model.modules():
        if isinstance(module, WindowACmix):
            assert (module.rate1.item(), module.rate2.item()) == (1, 0)
    naming = "Microsoft's" if source == 'Microsoft' else "MMDetection's"
    assert f'recognised as plain Swin, {naming} naming' in said()
    assert 'rate1 = 1 and rate2 = 0' in said()
    assert 'stages.*.blocks.*.attn.w_msa.dep_conv.weight (4×)' in said()
    dropped = said().split('dropped: ')[1].split('\n')[0]
    assert dropped == ('norm.weight, norm.bias, head.weight, head.bias, '
                       'stages.0.blocks.1.attn_mask' if source == 'Microsoft' else 'none')


def test_convolution_path_wakes_up(tmp_path):
    """From rate2 = 0, rate2 gets a gradient at the first step and the whole path at the second."""
    torch.save(random_plain().state_dict(), tmp_path / 'swin.pth')
    model = pretrained(tmp_path / 'swin.pth')
    x = torch.randn(1, 3, 64, 64)
    path = [parameter for name, parameter in model.named_parameters()
            if 'w_msa.fc.' in name or 'dep_conv' in name]
    rates = [parameter for name, parameter in model.named_parameters() if name.endswith('rate2')]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(out.square().sum() for out in model(x)).backward()
    assert all(rate.grad.abs() > 0 for rate in rates)
    assert all(parameter.grad.abs().max() == 0 for parameter in path)
    optimizer.step()
    optimizer.zero_grad()
    sum(out.square().sum() for out in model(x)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in path)


@pytest.mark.parametrize('naming', ['authors', 'own'])
def test_acmix_round_trip(naming, tmp_path, said):
    saved = ACmixSwinTransformer(**TINY).eval()
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if not name.startswith('norm'):
                parameter.normal_(std=0.3)
    own = saved.state_dict()
    torch.save(dict(model=microsoft_names(own)) if naming == 'authors' else own,
               tmp_path / 'acmix.pth')
    model = pretrained(tmp_path / 'acmix.pth')
    x = torch.randn(1, 3, 75, 40)
    for expected, actual in zip(saved(x), model(x)):
        torch.testing.assert_close(actual, expected)
    assert 'recognised as ACmix-Swin' in said()
    assert 'rate1 = 1' not in said()


@pytest.mark.parametrize('mix', ['attn', 'conv'])
def test_one_path_of_an_acmix_checkpoint_keeps_its_rate(mix, tmp_path, said):
    saved = ACmixSwinTransformer(**TINY)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if name.endswith('rate1' if mix == 'conv' else 'rate2'):
                parameter.zero_()
            elif name.endswith(('rate1', 'rate2')):
                parameter.fill_(0.3)
    torch.save(saved.state_dict(), tmp_path / 'acmix.pth')
    model = pretrained(tmp_path / 'acmix.pth', mix=mix)
    x = torch.randn(1, 3, 64, 64)
    for expected, actual in zip(saved.eval()(x), model(x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert 'attn.w_msa.rate1 (4×)' in said()


def test_tables_of_another_window_and_image_size_are_interpolated(tmp_path):
    plain = mmdet_swin.SwinTransformer(**TINY, use_abs_pos_embed=True, pretrain_img_size=64)
    state_dict = plain.state_dict()
    for key in state_dict:
        if key.endswith('bias_table') or key == 'absolute_pos_embed':
            state_dict[key].fill_(0.25)
    torch.save(state_dict, tmp_path / 'swin.pth')
    model = pretrained(tmp_path / 'swin.pth', window_size=5, use_abs_pos_embed=True,
                       pretrain_img_size=(96, 32))
    table = model.stages[0].blocks[0].attn.w_msa.relative_position_bias_table
    torch.testing.assert_close(table, torch.full((81, 3), 0.25))
    torch.testing.assert_close(model.absolute_pos_embed, torch.full((1, 24 * 8, 12), 0.25))


def test_arguments_of_a_training_script_are_data(tmp_path):
    plain = random_plain()
    arguments = argparse.Namespace(model='swin', lr=5e-4, betas=(0.9, 0.99), model_kwargs=dict(a=1))
    torch.save(dict(state_dict=plain.state_dict(), epoch=2, args=arguments), tmp_path / 'last.pth')
    model = pretrained(tmp_path / 'last.pth')
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(('kind', 'message'), [
    ('code', r'is refused and nothing of it was run: besides data it holds \S*posix\.system'),
    ('code in arguments', r'nothing of it was run: besides data it holds \S*posix\.system'),
    ('old code', r'is refused and nothing of it was run: besides data it holds \S*posix\.system'),
    ('truncated', 'cannot be read .* damaged'),
    ('empty', 'cannot be read .* damaged'),
    ('text', 'cannot be read .* damaged'),
    ('no weights', 'holds no weights'),
    ('ResNet', r'of no known network .* keys are conv1\.weight, bn1\.weight'),
    ('wider', r'does not fit .* of another shape: .*patch_embed\.projection\.weight'),
    ('deeper', r'does not fit .* not in the model: stages\.\*\.blocks\.\*\.norm1\.weight \(2×\)'),
    ('shallower', r'does not fit .* missing: .*stages\.1\.blocks\.1\.norm1\.weight'),
    ('missing', 'does not exist; check the path'),
])
def test_refuses(kind, message, tmp_path):
    path = write_bad_checkpoint(kind, tmp_path)
    model = ACmixSwinTransformer(**TINY, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        model.init_weights()
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'ran').exists()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_unreachable_download_names_the_address_and_the_remedy():
    url = 'http://127.0.0.1:9/swin.pth'
    model = ACmixSwinTransformer(**TINY, init_cfg=dict(type='Pretrained', checkpoint=url))
    with pytest.raises(CheckpointError, match=f'{url} could not be downloaded .* name the file'):
        model.init_weights()
