"""Loading weights into backbones: paths, position tables and refusals."""

import re

import mmdet.models.backbones.swin as mmdet_swin
import pytest
import torch
from helpers.checkpoints import PVT, SWIN, load_pretrained, write_bad_checkpoint

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.utils.errors import CheckpointError

RESNET = dict(depth=26, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1),
              out_indices=(0, 1), zero_init_residual=False)
# The rate that is 0 after loading a plain checkpoint, and the parameters of its path.
PATHS = {
    'Swin': (ACmixSwinTransformer, SWIN, 'rate2', r'\.(fc|dep_conv)\.'),
    'PVT': (ACmixPyramidVisionTransformer, PVT, 'rate2', r'\.attn\.(fc|dep_conv)\.'),
    'SAN': (ACmixSAN, dict(depth=10, base_channels=32), 'rate2', r'\.sam\.(fc|dep_conv)\.'),
    # The convolution path replaces a convolution, so attention is off at first.
    'ResNet': (ACmixResNet, RESNET, 'rate1', r'\.conv_p\.weight'),
}


@pytest.mark.parametrize('host', PATHS)
def test_path_with_zero_rate_learns(host, tmp_path):
    """The rate gets a gradient in the first step, and the other parameters in the second."""
    network, arguments, rate, path = PATHS[host]
    plain = dict(acmix_stages=()) if host == 'ResNet' else dict(mix='attn')
    torch.save(network(**arguments, **plain).state_dict(), tmp_path / 'plain.pth')
    model = load_pretrained(network, tmp_path / 'plain.pth', **arguments)
    rates = [value for name, value in model.named_parameters() if name.endswith(rate)]
    parameters = {name: value for name, value in model.named_parameters() if re.search(path, name)}
    assert rates
    assert len(parameters) >= len(rates)
    assert all(value.item() == 0 for value in rates)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    x = torch.randn(1, 3, 64, 64)
    for step in (1, 2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(x)).backward()
        assert all(value.grad.abs() > 0 for value in rates)
        for name, value in parameters.items():
            assert (value.grad.abs().max() > 0) == (step == 2), name
        optimizer.step()


@pytest.mark.parametrize('mix', ['attn', 'conv'])
def test_single_path_absorbs_its_rate(mix, tmp_path, log_text):
    saved = ACmixSwinTransformer(**SWIN)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if name.endswith('rate1' if mix == 'conv' else 'rate2'):
                parameter.zero_()
            elif name.endswith(('rate1', 'rate2')):
                parameter.fill_(0.3)
    torch.save(saved.state_dict(), tmp_path / 'acmix.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'acmix.pth', **SWIN, mix=mix)
    x = torch.randn(1, 3, 64, 64)
    for expected, actual in zip(saved.eval()(x), model(x)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert 'attn.w_msa.rate1 (4×)' in log_text()


def test_position_tables_are_interpolated(tmp_path):
    plain = mmdet_swin.SwinTransformer(**SWIN, use_abs_pos_embed=True, pretrain_img_size=64)
    state_dict = plain.state_dict()
    for key in state_dict:
        if key.endswith('bias_table') or key == 'absolute_pos_embed':
            state_dict[key].fill_(0.25)
    torch.save(state_dict, tmp_path / 'swin.pth')
    model = load_pretrained(ACmixSwinTransformer, tmp_path / 'swin.pth', **SWIN, window_size=5,
                            use_abs_pos_embed=True, pretrain_img_size=(96, 32))
    table = model.stages[0].blocks[0].attn.w_msa.relative_position_bias_table
    torch.testing.assert_close(table, torch.full((81, 3), 0.25))
    torch.testing.assert_close(model.absolute_pos_embed, torch.full((1, 24 * 8, 12), 0.25))


@pytest.mark.parametrize(('kind', 'message'), [
    ('code', r'is refused and nothing in it was run: besides data, it holds \S*posix\.system'),
    ('code in arguments', r'nothing in it was run: besides data, it holds \S*posix\.system'),
    ('old code', r'is refused and nothing in it was run: besides data, it holds \S*posix\.system'),
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
def test_refusal_leaves_the_model_unchanged(kind, message, tmp_path):
    path = write_bad_checkpoint(kind, tmp_path)
    model = ACmixSwinTransformer(**SWIN, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        model.init_weights()
    assert str(path) in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'ran').exists()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
