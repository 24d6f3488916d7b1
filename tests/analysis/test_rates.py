"""Rates are read from checkpoints and plotted in the order of the layers."""

import cv2
import numpy as np
import pytest
import torch
from helpers.analysis import BACKBONES
from helpers.tools import plain_message
from mmengine.registry import MODELS

from acmix_mm.analysis import figures
from acmix_mm.analysis.rates import rates_of, read_rates, stage_of
from acmix_mm.layers.base import TwoPathLayer
from acmix_mm.utils.errors import CheckpointError, UsageError


def with_rates(backbone):
    """Build a backbone with known rates; also return its layers in the order in which they run."""
    model = MODELS.build(backbone).eval()
    order = []
    hooks = [module.register_forward_hook(lambda _, *rest, name=name: order.append(name))
             for name, module in model.named_modules() if isinstance(module, TwoPathLayer)]
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        for index, name in enumerate(order):
            layer = model.get_submodule(name)
            layer.rate1.fill_(0.1 + index)
            layer.rate2.fill_(-0.25 * (index + 1))
    for hook in hooks:
        hook.remove()
    return model, order


@pytest.mark.parametrize('host', BACKBONES)
def test_rates_are_plotted_in_the_order_of_the_layers(host, tmp_path):
    model, order = with_rates(BACKBONES[host])
    weights = {f'module.backbone.{key}': value for key, value in model.state_dict().items()}
    # The order of the keys in a checkpoint must not matter.
    torch.save(dict(state_dict=dict(sorted(weights.items(), reverse=True))),
               tmp_path / 'epoch_1.pth')
    rates, = read_rates(str(tmp_path / 'epoch_1.pth'))
    assert rates.layers == tuple(f'backbone.{name}' for name in order)
    assert rates.network == f'ACmix-{host}'
    assert [stage_of(name) for name in rates.layers] == sorted(map(stage_of, order))

    upper, lower = figures.draw_rates([[rates]]).axes
    attention, convolution = (line for line in upper.lines if len(line.get_xdata()) > 2)
    depths = np.arange(len(order))
    np.testing.assert_array_equal(attention.get_xdata(), depths + 1)
    np.testing.assert_allclose(attention.get_ydata(), 0.1 + depths, rtol=1e-6)
    np.testing.assert_allclose(convolution.get_ydata(), 0.25 * (depths + 1), rtol=1e-6)
    log_ratio = next(line for line in lower.lines if len(line.get_xdata()) > 2)
    expected = np.log((0.1 + depths) / (0.25 * (depths + 1)))
    np.testing.assert_allclose(log_ratio.get_ydata(), expected, rtol=1e-5, atol=1e-6)
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        '|α|, attention (rate1)', '|β|, convolution (rate2)']
    stages = [text.get_text() for text in lower.get_xticklabels()]
    assert stages == list(dict.fromkeys(stage_of(name) for name in order))
    assert stages[0] == 'stage 0'


def test_neck_and_heads_follow_the_backbone():
    names = ['decode_head.convs.0.conv', 'neck.fpn_convs.10.conv', 'neck.fpn_convs.2.conv',
             'backbone.layer1.0.conv2', 'auxiliary_head.convs.0.conv']
    state_dict = {f'{name}.rate{rate}': torch.ones(1) for name in names for rate in (1, 2)}
    layers = rates_of(state_dict, 'these weights').layers
    assert layers == (names[3], names[2], names[1], names[0], names[4])
    assert [stage_of(name) for name in layers] == [
        'stage 0', 'neck.fpn_convs', 'neck.fpn_convs', 'decode_head.convs', 'auxiliary_head.convs']


def test_zero_rates_are_marked():
    state_dict = {}
    for index, pair in enumerate([(1, 0), (0, 1), (0.5, 0.25), (0, 0)]):
        for rate, value in zip((1, 2), pair):
            state_dict[f'layer1.{index}.conv2.rate{rate}'] = torch.tensor([float(value)])
    rates = rates_of(state_dict, 'these weights')
    assert rates.log_ratio[:2].tolist() == [np.inf, -np.inf]
    assert rates.log_ratio[2] == pytest.approx(np.log(2))
    assert np.isnan(rates.log_ratio[3])
    marks = {line.get_label(): list(line.get_xdata())
             for line in figures.draw_rates([[rates]]).axes[1].lines}
    assert marks['β = 0'] == [1]
    assert marks['α = 0'] == [2]


def test_run_is_read_in_the_order_of_training(tmp_path):
    for epoch in (10, 9, 2):
        torch.save({'layer1.0.conv2.rate1': torch.tensor([float(epoch)]),
                    'layer1.0.conv2.rate2': torch.ones(1)}, tmp_path / f'epoch_{epoch}.pth')
    (tmp_path / 'best_epoch_9.pth').write_bytes(b'')
    history = read_rates(str(tmp_path))
    assert [rates.attention.item() for rates in history] == [2, 9, 10]
    upper, _ = figures.draw_rates([history]).axes
    assert [line.get_ydata()[0] for line in upper.lines] == [2, 1, 9, 1, 10, 1]
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels[0].endswith(', epoch_2')
    assert labels[-1].endswith(', epoch_10')

    torch.save({'layer2.0.conv2.rate1': torch.ones(1), 'layer2.0.conv2.rate2': torch.ones(1)},
               tmp_path / 'epoch_11.pth')
    with pytest.raises(CheckpointError, match=r'epoch_11\.pth and .*_2\.pth belong to different'):
        read_rates(str(tmp_path))


def test_networks_without_rates_are_rejected(tmp_path):
    torch.save(MODELS.build({**BACKBONES['PVT'], 'mix': 'attn'}).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(UsageError, match=r'a\.pth has no rates: it is a baseline network'):
        read_rates(str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match=r'contains no epoch_N\.pth'):
        read_rates(str(tmp_path))


def test_plot_rates_tool(detector, run_tool, tmp_path):
    checkpoint, _ = detector
    done = run_tool('tools/plot_rates.py', checkpoint, checkpoint.parent,
                    '--out', tmp_path / 'rates.png')
    assert done.returncode == 0, done.stderr
    assert f'{checkpoint}: ACmix-Swin, 5 layers, |α| > |β| in 0 of them' in done.stdout
    assert cv2.imread(str(tmp_path / 'rates.png')).std() > 10
    message = plain_message(run_tool('tools/plot_rates.py', tmp_path / 'no.pth'))
    assert 'no.pth does not exist' in message
