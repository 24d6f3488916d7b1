"""Looking inside a network: the numbers against independent ones, and the figures against both."""

import itertools
import json
import re
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from helpers.tools import Bomb, plain_message
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

import acmix_mm  # noqa: F401
from acmix_mm.analysis import figures
from acmix_mm.analysis.config_receptive_field import fields_of, label, short_names, variants
from acmix_mm.analysis.paths import inputs_of, last_layers, path_energies, stride
from acmix_mm.analysis.rates import rates_of, read_rates, stage_of
from acmix_mm.analysis.receptive_field import Field, receptive_fields, square
from acmix_mm.analysis.visualize import Seen, visualize
from acmix_mm.engine.config import load_config
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.layers.base import TwoPathLayer
from acmix_mm.utils.errors import CheckpointError, UsageError

DETECTION = 'configs/shapes/maskrcnn_acmix_swin.py'
SEGMENTATION = 'configs/shapes/upernet_acmix_swin.py'
# Eleven layers in a stage: as text, the tenth would come before the second.
BACKBONES = {
    'Swin': dict(type='ACmixSwinTransformer', embed_dims=12, depths=(1, 2, 11, 1),
                 num_heads=(1, 1, 2, 2), window_size=4),
    'ResNet': dict(type='ACmixResNet', depth=26, base_channels=8, stage_blocks=(1, 2, 11, 1)),
    'PVT': dict(type='ACmixPyramidVisionTransformer', embed_dims=8, num_layers=(1, 2, 11, 1)),
    'SAN': dict(type='ACmixSAN', depth=10, base_channels=32),
}


def with_rates(backbone):
    """A backbone whose layers, in the order in which they run, have rates known beforehand."""
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
    # The order of a checkpoint says nothing.
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
    bias = next(line for line in lower.lines if len(line.get_xdata()) > 2)
    np.testing.assert_allclose(bias.get_ydata(), np.log((0.1 + depths) / (0.25 * (depths + 1))),
                               rtol=1e-5, atol=1e-6)
    assert [text.get_text() for text in upper.get_legend().get_texts()] == [
        '|α|, attention (rate1)', '|β|, convolution (rate2)']
    stages = [text.get_text() for text in lower.get_xticklabels()]
    assert stages == list(dict.fromkeys(stage_of(name) for name in order))
    assert stages[0] == 'stage 0'


def test_neck_and_heads_come_behind_the_backbone():
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
    assert rates.bias[:2].tolist() == [np.inf, -np.inf]
    assert rates.bias[2] == pytest.approx(np.log(2))
    assert np.isnan(rates.bias[3])
    marks = {line.get_label(): list(line.get_xdata())
             for line in figures.draw_rates([[rates]]).axes[1].lines}
    assert marks['β = 0'] == [1]
    assert marks['α = 0'] == [2]


def test_a_run_is_read_in_the_order_of_its_training(tmp_path):
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
    with pytest.raises(CheckpointError, match=r'epoch_11\.pth is of another network than .*_2\.'):
        read_rates(str(tmp_path))


def test_networks_without_rates_are_refused(tmp_path):
    torch.save(MODELS.build({**BACKBONES['PVT'], 'mix': 'attn'}).state_dict(), tmp_path / 'a.pth')
    with pytest.raises(UsageError, match=r'a\.pth has no rates: it is of a plain network'):
        read_rates(str(tmp_path / 'a.pth'))
    with pytest.raises(CheckpointError, match=r'holds no epoch_N\.pth'):
        read_rates(str(tmp_path))


class TwoLayers(BaseModel):

    def __init__(self, mix='acmix'):
        super().__init__()
        self.backbone = nn.ModuleDict(dict(layer1=ACmixConv2d(3, 4, num_heads=1, mix=mix),
                                           layer2=ACmixConv2d(4, 4, num_heads=1, mix=mix)))

    def forward(self, inputs, mode='tensor'):
        out = self.backbone['layer2'](self.backbone['layer1'](inputs))
        return dict(loss=out.square().mean())


class Remember(Hook):
    """What the rates are after each iteration, read in another way than the hook does."""

    def __init__(self):
        self.steps = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        layers = runner.model.backbone
        self.steps.append({f'rates/backbone.{name}.{rate}': getattr(layers[name], rate).item()
                           for name in layers for rate in ('rate1', 'rate2')})


def run_with_hook(work_dir, backend, mix='acmix'):
    remember = Remember()
    runner = Runner(
        model=TwoLayers(mix), work_dir=str(work_dir), experiment_name=f'{work_dir.name}_{mix}',
        train_dataloader=dict(
            batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=[torch.randn(3, 8, 8) for _ in range(6)],
            collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1.)),
        custom_hooks=[dict(type='RateHook', interval=2), remember],
        visualizer=dict(type='Visualizer', name=f'{work_dir.name}_{backend}_{mix}',
                        vis_backends=[dict(type=backend)]),
        default_scope='mmengine')
    runner.model.train_step = lambda inputs, optim_wrapper: TwoLayers.train_step(
        runner.model, dict(inputs=inputs), optim_wrapper)
    runner.train()
    return remember.steps


def test_hook_records_rates(tmp_path):
    steps = run_with_hook(tmp_path, 'LocalVisBackend')
    scalars, = tmp_path.glob('*/vis_data/scalars.json')
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    records = [entry for entry in entries if any(key.startswith('rates/') for key in entry)]
    assert [record.pop('step') for record in records] == [2, 4, 6]
    assert len(records[0]) == 4
    for record, expected in zip(records, steps[1::2]):
        assert record == pytest.approx(expected)
    assert records[0] != records[1]


def test_hook_records_rates_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    steps = run_with_hook(tmp_path, 'TensorboardVisBackend')
    events, = tmp_path.glob('*/vis_data/events*')
    found = EventAccumulator(str(events)).Reload()
    for name in steps[0]:
        assert [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)] == [
            (step, steps[step - 1][name]) for step in (2, 4, 6)]


def test_hook_refuses_a_model_without_rates(tmp_path):
    with pytest.raises(UsageError, match='RateHook is to record has no rates'):
        run_with_hook(tmp_path, 'LocalVisBackend', mix='attn')


def randomised(layer):
    """A layer with weights that make attention uneven, and norms that are not the identity."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return layer.eval()


def attended(layer, x, attention):
    """Weights times values at one point, projected as the layer does, without its rate."""
    weights = attention.weights
    if isinstance(layer, WindowACmix):
        bottom, right = (size - own for size, own in zip(weights.shape[1:], x.shape[1:3]))
        v = layer.qkv(F.pad(x, (0, 0, 0, right, 0, bottom)))[0].chunk(3, 2)[2].permute(2, 0, 1)
    elif isinstance(layer, ReducedACmix):
        weight, bias = layer.attn.in_proj_weight, layer.attn.in_proj_bias
        v = F.linear(layer.reduce(x)[0], weight.chunk(3)[2], bias.chunk(3)[2]).permute(2, 0, 1)
    else:
        v = layer.conv3(x)[0]
    if isinstance(layer, PatchwiseACmix):
        groups = torch.arange(len(v)) % len(weights)
    else:
        groups = torch.arange(len(v)) // (len(v) // len(weights))
    out = (weights[groups] * v).sum((1, 2))
    if isinstance(layer, WindowACmix):
        return layer.proj(out)
    return layer.attn.out_proj(out) if isinstance(layer, ReducedACmix) else out


CASES = {
    'window': (WindowACmix(8, 2, 4), (1, 9, 14, 8)),
    'shifted': (WindowACmix(8, 2, 4, shift_size=2), (1, 9, 14, 8)),
    'one window': (WindowACmix(8, 2, 7, shift_size=3), (1, 5, 6, 8)),
    'sliding': (ACmixConv2d(6, 8, num_heads=2, attn_kernel_size=7), (1, 6, 9, 14)),
    'dilated': (ACmixConv2d(6, 8, num_heads=2, attn_kernel_size=3, dilation=2), (1, 6, 9, 14)),
    'strided': (ACmixConv2d(6, 8, num_heads=2, stride=2), (1, 6, 9, 14)),
    'tiny map': (ACmixConv2d(6, 8, num_heads=2), (1, 6, 2, 1)),
    'reduced': (ReducedACmix(8, 2, sr_ratio=4), (1, 9, 14, 8)),
    'full map': (ReducedACmix(8, 2, qkv_bias=True), (1, 5, 6, 8)),
    'patch-wise': (PatchwiseACmix(32, 2, 16, 7), (1, 32, 9, 14)),
}


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_attention_of_a_point_gives_the_output_of_the_layer(case):
    layer, shape = CASES[case]
    randomised(layer)
    layer.rate1.fill_(1)
    layer.rate2.fill_(0)
    x = torch.randn(shape)
    out = layer(x)
    channels_last = isinstance(layer, (WindowACmix, ReducedACmix))
    size = shape[1:3] if channels_last else shape[2:]
    step = getattr(layer, 'stride', (1, 1))[0]
    for row, column in itertools.product(range(0, size[0], step), range(0, size[1], step)):
        attention = layer.attention_of_point(x, row, column)
        place = (row // step, column // step)
        expected = (out if channels_last else out.permute(0, 2, 3, 1))[0][place]
        assert relative_error(attended(layer, x, attention), expected) < 1e-4, (row, column)

        weights = attention.weights
        if attention.is_softmax:
            assert (weights >= 0).all()
            torch.testing.assert_close(weights.sum((1, 2)), torch.ones(len(weights)))
        seen_rows, seen_columns = np.nonzero(weights.abs().sum(0).numpy() > 1e-20)
        assert attention.count >= len(seen_rows)
        if isinstance(layer, (WindowACmix, ReducedACmix)):
            assert attention.count == len(seen_rows)
        if isinstance(layer, WindowACmix) and case != 'one window':
            # The windows of a shifted map begin two positions further on, or earlier.
            for seen, own in ((seen_rows, row), (seen_columns, column)):
                assert set((seen + layer.shift_size) // 4) == {(own + layer.shift_size) // 4}
        if isinstance(layer, (ACmixConv2d, PatchwiseACmix)):
            side = layer.attn_kernel_size if isinstance(layer, ACmixConv2d) else layer.kernel_size
            reach = side // 2 * getattr(layer, 'dilation', (1, 1))[0]
            assert abs(seen_rows - row).max() <= reach
            assert abs(seen_columns - column).max() <= reach


def test_attention_of_a_layer_that_does_not_attend_is_refused():
    with pytest.raises(ValueError, match="mix='conv' does not attend"):
        ReducedACmix(8, 2, mix='conv').attention_of_point(torch.randn(1, 4, 4, 8), 0, 0)


@pytest.mark.parametrize('case', CASES)
@torch.no_grad()
def test_energies_are_those_of_the_two_paths(case, monkeypatch):
    layer, shape = CASES[case]
    randomised(layer)
    layer.rate1.fill_(0.75)
    layer.rate2.fill_(-1.5)
    x = torch.randn(shape)
    attention, convolution = path_energies(layer, x)
    assert layer.rate1 == 0.75
    assert layer.rate2 == -1.5

    # The same by what the methods of either path return within the layer's own pass.
    given = {}
    for name in ('attend', 'convolve'):
        method = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *rest, name=name, method=method: given.setdefault(
            name, method(*rest)).clone())
    out = layer(x)
    if isinstance(layer, ACmixConv2d):
        given['attend'] = 0.75 * given['attend']
    axis = 3 if isinstance(layer, (WindowACmix, ReducedACmix)) else 1
    if isinstance(layer, WindowACmix) and case != 'one window':
        # Rolled and padded: the output, less what one path returns, is the other's share.
        shift = layer.shift_size
        rolled = given['convolve'].roll((shift, shift), (1, 2))
        expected = dict(attend=out - rolled, convolve=rolled)
    else:
        expected = given
    for energy, name in ((attention, 'attend'), (convolution, 'convolve')):
        assert relative_error(energy, expected[name].pow(2).mean(axis).sqrt()[0]) < 1e-4


def test_the_last_layer_of_each_stage_and_its_input():
    model = MODELS.build(BACKBONES['ResNet'])
    assert last_layers(model) == {'stage 0': 'layer1.0.conv2', 'stage 1': 'layer2.1.conv2',
                                  'stage 2': 'layer3.10.conv2', 'stage 3': 'layer4.0.conv2'}
    assert not last_layers(nn.Conv2d(3, 3, 1))
    layer = model.get_submodule('layer2.1.conv2')
    taken = inputs_of(model, dict(layer=layer), lambda: model(torch.randn(1, 3, 64, 64)))['layer']
    assert taken.shape == (1, 16, 8, 8)
    assert not layer._forward_pre_hooks
    assert stride((64, 64), taken.shape[2:]) == 8
    # Where a network rounds.
    assert stride((50, 70), (2, 3)) == 32


class Stages(nn.Module):

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


def test_receptive_field_of_convolutions():
    first, second = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=2, dilation=2)
    nn.init.constant_(first.weight, 1)
    nn.init.constant_(second.weight, 1)
    one, both = receptive_fields(Stages(first, second), (20, 21), samples=3)
    # Exactly nine pixels, all alike, around the centre of the output.
    assert sorted(Counter((one / one.max()).round(decimals=6).flatten().tolist()).items()) == [
        (0, 20 * 21 - 9), (1, 9)]
    assert torch.equal(one.nonzero().aminmax(dim=0)[0], torch.tensor([9, 9]))
    assert square(one) == (9, 9, 3)
    # A kernel that is spread by two on top of it: seven.
    assert int((both > 0).sum()) == 49
    assert both.nonzero().aminmax(dim=0)[1].tolist() == [13, 13]


def test_receptive_field_is_the_squared_gradient():
    layer = nn.Conv2d(3, 1, 5, stride=4, padding=2)
    field, = receptive_fields(Stages(layer), (16, 16), samples=2)
    expected = layer.weight[0].double().square().sum(0)
    around = field[6:11, 6:11]
    torch.testing.assert_close(around / around.sum(), expected / expected.sum())
    assert field.sum() == around.sum()


def test_receptive_field_behind_a_norm_is_not_zero():
    """The channels of a layer norm have a constant sum: the gradient of the sum is zero."""
    class NormOfChannels(nn.Module):
        def forward(self, x):
            return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)

    field, = receptive_fields(Stages(nn.Sequential(nn.Conv2d(3, 8, 1), NormOfChannels())), (6, 6),
                              samples=2)
    assert field[3, 3] > 1e-4


def test_smallest_square():
    energy = torch.rand(9, 13, dtype=torch.float64)**6
    for share in (0.3, 0.6, 0.9, 1.0):
        top, left, side = square(energy, share)
        windows = {length: [energy[y:y + length, x:x + length].sum() / energy.sum()
                            for y in range(10 - min(length, 9)) for x in range(14 - length)]
                   for length in (side - 1, side)}
        assert max(windows[side]) >= share - 1e-6
        assert max(windows[side - 1]) < share
        held = energy[top:top + side, left:left + side].sum() / energy.sum()
        assert held == pytest.approx(max(windows[side]))


def test_figures_show_what_they_are_given():
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    weights = torch.zeros(2, 10, 15)
    weights[:, 2:5, 3:7] = torch.rand(2, 3, 4)
    attention = figures.PointAttention(weights, 1, 12, True)
    drawn = figures.draw_attention(picture, (20, 12), attention, (4., 4.), 'of a point')
    overview, *heads = (axes for axes in drawn.axes if axes.get_visible())
    np.testing.assert_array_equal(overview.images[0].get_array(), picture)
    box, = overview.patches
    assert (box.get_xy(), box.get_width(), box.get_height()) == ((12, 8), 16, 12)
    for head, axes in zip(weights, heads):
        np.testing.assert_array_equal(axes.images[0].get_array(), head.numpy())
        assert axes.images[0].get_extent() == [0, 60, 40, 0]
        assert axes.get_xlim() == (12, 28)
        cross, = axes.lines
        assert cross.get_xydata().tolist() == [[20.5, 12.5]]

    energies = dict(one=np.random.rand(2, 10, 15), two=np.random.rand(2, 5, 8))
    drawn = figures.draw_energies(picture, energies, dict(one=(4., 4.), two=(8., 8.)), 'paths')
    shown = {axes.get_title(): axes.images[0] for axes in drawn.axes if axes.images}
    for name, pair in energies.items():
        for energy, path in zip(pair, ('α · attention', 'β · convolution')):
            image = shown[f'{name}\n{path}']
            np.testing.assert_array_equal(image.get_array(), energy)
            assert image.get_clim() == (0, pair.max())

    energy = np.random.rand(20, 30)
    fields = [('a', [Field('stage 0', 4, energy, 3, 5, 7)]),
              ('b', [Field('stage 0', 4, energy**2, 0, 0, 2),
                     Field('stage 1', 8, energy, 1, 1, 9)])]
    drawn = figures.draw_receptive_fields(fields)
    panels = [axes for axes in drawn.axes if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [
        'a\nstage 0, stride 4: 7 px', 'b\nstage 0, stride 4: 2 px', 'stage 1, stride 8: 9 px']
    np.testing.assert_allclose(panels[0].images[0].get_array(), np.sqrt(energy / energy.max()))
    assert len({axes.images[0].get_clim() for axes in panels}) == 1
    assert panels[0].patches[0].get_xy() == (5, 3)


def test_pictures_are_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(UsageError, match=r'rates\.pdf is not one'):
        figures.check_png(str(tmp_path / 'rates.pdf'))
    with pytest.raises(UsageError, match='none does not exist'):
        figures.check_png(str(tmp_path / 'none' / 'rates.png'))
    (tmp_path / 'taken.png').mkdir()
    with pytest.raises(UsageError, match=r'taken\.png cannot be written \('):
        figures.save(figures.Figure(), str(tmp_path / 'taken.png'))
    assert [path.name for path in tmp_path.iterdir()] == ['taken.png']


SMALL = ['model.backbone.embed_dims=12', 'model.backbone.depths=[1,1,1,2]',
         'model.backbone.num_heads=[1,1,2,2]', 'model.neck.in_channels=[12,24,48,96]']


def small_model(config, path, **options):
    """A config with a small backbone, and a checkpoint of it as MMEngine would write one."""
    cfg = load_config(config, {'model.backbone.embed_dims': 12,
                               'model.backbone.depths': [1, 1, 1, 2],
                               'model.backbone.num_heads': [1, 1, 2, 2], **options})
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    torch.save(dict(meta=dict(dataset_meta=dict(cfg.metainfo)), state_dict=model.state_dict()),
               path)
    return cfg


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp('small')
    cfg = small_model(DETECTION, folder / 'epoch_1.pth',
                      **{'model.neck.in_channels': [12, 24, 48, 96]})
    return folder / 'epoch_1.pth', cfg


def test_visualize_detector(detector, shapes, run_tool, tmp_path):
    checkpoint, _ = detector
    done = run_tool('tools/visualize.py', DETECTION, checkpoint, shapes / 'val2017' / '00000.jpg',
                    '--out-dir', tmp_path / 'out', '--point', 90, 5, '--cfg-options', *SMALL)
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert written == ['00000_attention_stage_0.png', '00000_attention_stage_1.png',
                       '00000_attention_stage_2.png', '00000_attention_stage_3.png',
                       '00000_energy.png', '00000_predictions.png']
    for path in (tmp_path / 'out').iterdir():
        assert str(path) in done.stdout
        assert cv2.imread(str(path)).std() > 10


def test_visualize_segmentor(shapes, tmp_path, monkeypatch):
    cfg = small_model(SEGMENTATION, tmp_path / 'iter_1.pth', **{
        'model.decode_head.in_channels': [12, 24, 48, 96], 'model.auxiliary_head.in_channels': 48})
    drawn = {}
    monkeypatch.setattr('acmix_mm.analysis.visualize.save',
                        lambda figure, path: drawn.update({path.rsplit('_', 1)[-1]: figure}))
    visualize(cfg, str(tmp_path / 'iter_1.pth'), [str(shapes / 'val2017' / '00001.jpg')],
              str(tmp_path))
    # What is shown as energy is that of the same layer in a pass of its own.
    image = cv2.imread(str(shapes / 'val2017' / '00001.jpg'))[..., ::-1].copy()
    from mmseg.apis import init_model
    model = init_model(cfg, str(tmp_path / 'iter_1.pth'), device='cpu')
    mean, std = (torch.tensor(cfg.model.data_preprocessor[key])[:, None, None]
                 for key in ('mean', 'std'))
    given = (torch.from_numpy(image).permute(2, 0, 1).float() - mean) / std
    layer = model.backbone.stages[3].blocks[1].attn.w_msa
    taken = []
    layer.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
    with torch.no_grad():
        model.backbone(given[None])
    expected = path_energies(layer, taken[0])
    shown = [axes.images[0].get_array() for axes in drawn['energy.png'].axes
             if axes.get_title().startswith('stage 3')]
    for values, energy in zip(shown, expected):
        np.testing.assert_allclose(values, energy.numpy(), rtol=1e-4)
    assert len(shown) == 2
    assert not np.array_equal(drawn['predictions.png'].axes[1].images[0].get_array(), image)


def test_the_point_is_found_in_every_stage():
    """In a picture that was doubled and padded before the backbone saw it."""
    backbone = MODELS.build(BACKBONES['Swin']).eval()
    batch, picture = torch.randn(1, 3, 128, 192), np.zeros((60, 90, 3), dtype=np.uint8)
    seen = Seen(backbone, last_layers(backbone), batch, picture, dict(img_shape=(120, 180)))
    drawn = seen.attention_figures((44, 10))
    # Its centre is at 89, 21 of what the backbone saw.
    for stage, (row, column) in enumerate([(5, 22), (2, 11), (1, 5), (0, 2)]):
        layer = seen.layers[f'stage {stage}']
        expected = layer.module.attention_of_point(layer.x, row, column).weights
        head = drawn[f'attention_stage_{stage}'].axes[1].images[0]
        np.testing.assert_array_equal(head.get_array(), expected[0])
        # Positions are 4, 8, … pixels apart for the backbone, half of that in the picture.
        assert head.get_extent()[1] == 2 * 2**stage * expected.shape[2]


def test_what_a_single_path_cannot_show_is_left_out():
    batch, picture = torch.randn(1, 3, 64, 64), np.zeros((64, 64, 3), dtype=np.uint8)
    for mix, attention in (('attn', 4), ('conv', 0)):
        backbone = MODELS.build({**BACKBONES['PVT'], 'mix': mix}).eval()
        seen = Seen(backbone, last_layers(backbone), batch, picture, dict(img_shape=(64, 64)))
        assert len(seen.attention_figures((0, 63))) == attention
        assert seen.energy_figure() == {}


def test_visualize_refusals(detector, shapes, tmp_path):
    checkpoint, cfg = detector
    picture, given = str(shapes / 'val2017' / '00000.jpg'), (str(checkpoint),)
    other = load_config(DETECTION)
    plain = load_config('configs/shapes/maskrcnn_acmix_r50.py', {'model.backbone.acmix_stages': []})
    torch.save(MODELS.build(plain.model).state_dict(), tmp_path / 'bare.pth')
    (tmp_path / 'text.jpg').write_text('no picture')
    for config, rest, message in [
            (cfg, (*given, [picture], 'out', (96, 0)), 'lies outside of .* 96 pixels wide and 96'),
            (cfg, (*given, [str(tmp_path / 'none.jpg')], 'out'), r'none\.jpg does not exist'),
            (cfg, (*given, [str(tmp_path / 'text.jpg')], 'out'), r'text\.jpg is not a picture'),
            (cfg, (*given, [picture, picture], 'out'), 'Two pictures are called 00000'),
            (cfg, (str(tmp_path / 'no.pth'), [picture], 'out'), r'no\.pth does not exist'),
            (cfg, (str(tmp_path / 'bare.pth'), [picture], 'out'), 'names of its classes'),
            (other, (*given, [picture], 'out'), "does not match the config's model")]:
        with pytest.raises(UsageError, match=message):
            visualize(config, *rest)
    small_model('configs/shapes/maskrcnn_acmix_swin.py', tmp_path / 'plain.pth',
                **{'model.neck.in_channels': [12, 24, 48, 96], 'model.backbone.type': 'mmdet.'
                   'SwinTransformer'})
    plain = load_config(DETECTION, {
        'model.backbone.type': 'mmdet.SwinTransformer', 'model.backbone.embed_dims': 12,
        'model.backbone.depths': [1, 1, 1, 2], 'model.backbone.num_heads': [1, 1, 2, 2],
        'model.neck.in_channels': [12, 24, 48, 96]})
    with pytest.raises(UsageError, match='has no ACmix layer to look into'):
        visualize(plain, str(tmp_path / 'plain.pth'), [picture], 'out')


def test_visualize_refuses_code(detector, shapes, tmp_path):
    checkpoint, cfg = detector
    found = torch.load(checkpoint)
    found['meta']['trap'] = Bomb(tmp_path / 'ran')
    torch.save(found, tmp_path / 'bomb.pth')
    with pytest.raises(CheckpointError, match='nothing of it was run'):
        visualize(cfg, str(tmp_path / 'bomb.pth'), [str(shapes / 'val2017' / '00000.jpg')],
                  str(tmp_path))
    assert not (tmp_path / 'ran').exists()


def test_plot_rates_as_a_user_would(detector, run_tool, tmp_path):
    checkpoint, _ = detector
    done = run_tool('tools/plot_rates.py', checkpoint, checkpoint.parent,
                    '--out', tmp_path / 'rates.png')
    assert done.returncode == 0, done.stderr
    assert f'{checkpoint}: ACmix-Swin, 5 layers, |α| > |β| in 0 of them' in done.stdout
    assert cv2.imread(str(tmp_path / 'rates.png')).std() > 10
    message = plain_message(run_tool('tools/plot_rates.py', tmp_path / 'no.pth'))
    assert 'no.pth does not exist' in message


def test_receptive_field_as_a_user_would(detector, run_tool, tmp_path):
    checkpoint, _ = detector
    done = run_tool('tools/receptive_field.py', DETECTION, '--mixers', 'acmix', 'conv',
                    '--checkpoints', checkpoint, '--shape', 96, 128, '--samples', 2,
                    '--out', tmp_path / 'fields.png', '--cfg-options', *SMALL[:3])
    assert done.returncode == 0, done.stderr
    sides = [re.findall(r'(\d+) in stage (\d) \(stride (\d+)\)', line)
             for line in done.stdout.splitlines() if line.startswith('maskrcnn_acmix_swin, ')]
    assert [[(stage, step) for _, stage, step in line] for line in sides] == [
        [('0', '4'), ('1', '8'), ('2', '16'), ('3', '32')]] * 2
    for line in sides:
        assert 4 <= int(line[0][0]) < int(line[2][0]) <= 128
    assert cv2.imread(str(tmp_path / 'fields.png')).std() > 10


def test_receptive_field_refusals(detector):
    checkpoint, cfg = detector
    plain = load_config(DETECTION, {'model.backbone.type': 'mmdet.SwinTransformer'})
    with pytest.raises(UsageError, match=r'mmdet\.SwinTransformer has no mixer to exchange'):
        variants(plain, ['attn'])
    with pytest.raises(CheckpointError, match="does not match the config's model"):
        fields_of(plain, (64, 64), 1, str(checkpoint))
    with pytest.raises(CheckpointError, match='does not fit this ACmixSwinTransformer'):
        fields_of(load_config(DETECTION), (64, 64), 1, str(checkpoint))
    made = variants(cfg, ['attn', 'involution'])
    assert [(mixer, variant.model.backbone.get('mix')) for mixer, variant in made] == [
        ('attn', 'attn'), ('involution', None)]
    assert label('swin', 'attn', 'work_dirs/run/epoch_1.pth') == 'swin, attn, run/epoch_1.pth'
    assert not {'mix', 'mixer'} & set(cfg.model.backbone)


@pytest.mark.parametrize(('paths', 'names'), [
    (['configs/a.py', 'configs/b.py'], ['a', 'b']),
    (['a/config.py', 'b/config.py'], ['a/config', 'b/config']),
    (['a.py', 'a.py'], ['a', 'a']),
    (['config.py', 'b/config.py'], ['config', 'b/config']),
])
def test_configs_are_named_as_briefly_as_tells_them_apart(paths, names):
    assert short_names(paths) == names
