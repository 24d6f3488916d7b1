"""Tests of the export to torch.export and ONNX."""

from copy import deepcopy

import numpy as np
import onnxruntime
import pytest
import torch
from helpers import ROOT, relative_error
from helpers.stack import needs_export
from helpers.tools import FAST, as_options, call_tool, plain_message
from PIL import Image
from torch import nn

from acmix_mm.analysis.complexity import padded_image_size
from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.deploy import onnx as export
from acmix_mm.deploy.dynamic_modules import MatrixAdaptiveAvgPool2d, dynamic_module
from acmix_mm.deploy.onnx import (
    ClassMap,
    export_onnx,
    export_program,
    network_of,
    smallest_side,
    translate,
)
from acmix_mm.engine.config import build_model, load_config
from acmix_mm.utils.errors import UsageError

onnx_ir = pytest.importorskip('onnx_ir')
pytestmark = needs_export
# (network, smallest height and width)
NETWORKS = {
    'swin': (lambda: ACmixSwinTransformer(
        embed_dims=12, depths=(2, 1), num_heads=(2, 4), strides=(4, 2), out_indices=(0, 1),
        window_size=3, use_abs_pos_embed=True, pretrain_img_size=32), 25),
    'resnet': (lambda: ACmixResNet(
        26, base_channels=8, stage_blocks=(1, 1), num_stages=2, strides=(1, 2), dilations=(1, 2),
        out_indices=(0, 1)), 9),
    'pvt': (lambda: ACmixPyramidVisionTransformer(
        embed_dims=8, num_stages=2, num_layers=[1, 1], num_heads=[1, 2], patch_sizes=[4, 2],
        strides=[4, 2], paddings=[0, 0], sr_ratios=[4, 1], mlp_ratios=[2, 2], out_indices=(0, 1),
        pretrain_img_size=32), 32),
    'san': (lambda: SmallSAN(), 33),
}


class SmallSAN(ACmixSAN):
    """A SAN with one block and all poolings; each further block takes seconds to export."""

    def __init__(self):
        super().__init__(10, base_channels=32)
        for stage in range(5):
            setattr(self, f'layer{stage}', getattr(self, f'layer{stage}')[:stage == 1])


@pytest.fixture(scope='module', params=NETWORKS)
def exported(request, tmp_path_factory):
    """A network, its smallest side, its traced program, and its session in ONNX Runtime."""
    torch.manual_seed(0)
    build, side = NETWORKS[request.param]
    network = build().eval()
    program = export_program(network)
    path = tmp_path_factory.mktemp('onnx') / f'{request.param}.onnx'
    translate(program, network, fixed_size=False).save(path, external_data=False)
    return network, side, program, onnxruntime.InferenceSession(path)


def images_of_sizes(side):
    """Batches of the smallest size, and of two sizes that no window or stride divides."""
    return [torch.randn(batch, 3, side + height, side + width)
            for batch, height, width in ((1, 0, 0), (2, 1, 30), (1, 44, 17))]


def test_smallest_side(exported):
    network, side, _, _ = exported
    assert smallest_side(network) == side


def test_torch_program_equals_network(exported):
    network, side, program, _ = exported
    for images in images_of_sizes(side):
        with torch.no_grad():
            for actual, expected in zip(program.module()(images), network(images)):
                assert relative_error(actual, expected) < 1e-5


def test_onnx_runtime_equals_network(exported):
    network, side, _, session = exported
    names = [output.name for output in session.get_outputs()]
    assert session.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    for images in images_of_sizes(side):
        with torch.no_grad():
            outs = network(images)
        assert names == [f'feature{index}' for index in range(len(outs))]
        for actual, expected in zip(session.run(None, dict(input=images.numpy())), outs):
            assert relative_error(torch.from_numpy(actual), expected) < 1e-5


def test_programs_contain_only_torch_operations(exported):
    _, _, program, _ = exported
    assert not any('acmix' in str(node.target) for node in program.graph.nodes)


def test_fixed_size_may_be_below_the_smallest_side(exported):
    network, side, _, _ = exported
    images = torch.randn(1, 3, side - 5, side - 2)
    program = export_program(network, (side - 5, side - 2))
    with torch.no_grad():
        for actual, expected in zip(program.module()(images), network(images)):
            assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize('module', [
    nn.AdaptiveAvgPool2d((6, 4)),
    nn.AdaptiveAvgPool2d(1),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d(2, stride=2, ceil_mode=True),
    nn.Upsample(scale_factor=2, mode='bilinear'),
])
def test_dynamic_modules_equal_torch(module):
    replaced = dynamic_module(module)
    assert replaced is not module
    for height, width in ((1, 1), (4, 6), (7, 13), (12, 5)):
        x = torch.randn(2, 3, height, width) - 5
        torch.testing.assert_close(replaced(x), module(x), rtol=1e-5, atol=1e-5)


def test_modules_that_round_differently_are_kept():
    for module in (nn.MaxPool2d(2), nn.MaxPool2d(3, 2), nn.Conv2d(1, 1, 3)):
        assert dynamic_module(module) is module


def test_pooling_bins_may_differ_in_width():
    x = torch.arange(5.).view(1, 1, 1, 5)
    assert MatrixAdaptiveAvgPool2d((1, 2))(x).tolist() == [[[[1., 3.]]]]


def test_single_logit_gives_two_classes():
    class Segmentor(nn.Module):
        decode_head = nn.Module()

        def encode_decode(self, images, metas):
            return images

    segmentor = Segmentor()
    segmentor.decode_head.threshold = 0.3
    logits = torch.randn(2, 1, 5, 4)
    expected = (logits.sigmoid() > 0.3).long()
    assert torch.equal(ClassMap(segmentor)(logits)[0], expected)


def test_reports_networks_without_dynamic_sizes():
    class Thirds(nn.Module):
        def forward(self, x):
            return [x * 2 if x.shape[2] % 3 else x + 1]

    with pytest.raises(UsageError, match=r'cannot be exported with dynamic sizes.*--fixed-size'
                       r'.*does not hold'):
        export_program(Thirds())


TOOL = ['tools/export_onnx.py', 'configs/shapes/upernet_acmix_swin.py']
TINY = {'model.backbone.embed_dims': 12, 'model.backbone.depths': [1, 1],
        'model.backbone.num_heads': [1, 2], 'model.backbone.strides': [4, 2],
        'model.backbone.out_indices': [0, 1], 'model.backbone.window_size': 3,
        'model.decode_head.in_channels': [12, 24], 'model.decode_head.in_index': [0, 1],
        'model.decode_head.channels': 16, 'model.auxiliary_head.in_channels': 24,
        'model.auxiliary_head.in_index': 1}


@pytest.fixture(scope='module')
def segmentor(run_tool, tmp_path_factory):
    """A tiny UperNet, the folder with its checkpoint and ONNX file, and the tool's output."""
    folder = tmp_path_factory.mktemp('segmentor')
    torch.manual_seed(0)
    cfg = load_config(str(ROOT / TOOL[1]), TINY)
    torch.save(dict(state_dict=build_model(cfg).state_dict(), meta={}), folder / 'tiny.pth')
    network = network_of(cfg, str(folder / 'tiny.pth'), backbone_only=False)
    done = run_tool(*TOOL, folder / 'tiny.pth', folder / 'tiny.onnx', '--shape', 96, 130,
                    '--cfg-options', *as_options(TINY))
    assert done.returncode == 0, done.stderr
    return network, folder, done.stdout


def test_tool_exports_a_segmentor(segmentor):
    network, folder, output = segmentor
    assert output.count('logits ') == 3
    assert 'input: tensor(float) (batch, 3, height, width)' in output
    assert 'output: tensor(int64) (batch, 1, height, width)' in output
    assert 'height and width from 25 on' in output
    assert 'RGB images with values from 0 to 255, minus [123.675, 116.28, 103.53]' in output
    assert sorted(path.name for path in folder.iterdir()) == ['tiny.onnx', 'tiny.pth']
    session = onnxruntime.InferenceSession(folder / 'tiny.onnx')
    images = torch.randn(2, 3, 71, 98)
    classes, = session.run(None, dict(input=images.numpy()))
    with torch.no_grad():
        expected = network.segmentor.encode_decode(images, [dict(img_shape=(71, 98))] * 2)
    assert (torch.from_numpy(classes) == expected.argmax(1, keepdim=True)).float().mean() > 0.999


def test_backbone_loads_the_checkpoint_of_a_whole_model(segmentor):
    network, folder, _ = segmentor
    backbone = network_of(load_config(str(ROOT / TOOL[1]), TINY), str(folder / 'tiny.pth'),
                          backbone_only=True)
    for actual, expected in zip(backbone.parameters(), network.segmentor.backbone.parameters()):
        assert torch.equal(actual, expected)


def test_exports_a_fixed_size(tmp_path):
    output = export_onnx(NETWORKS['pvt'][0]().eval(), str(tmp_path / 'a.onnx'), (20, 33),
                         fixed_size=True)
    assert 'input: tensor(float) (1, 3, 20, 33)' in output
    assert 'feature1: tensor(float) (1, 16, 2, 4)' in output
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']


def test_does_not_keep_a_file_whose_outputs_differ(monkeypatch, tmp_path):
    network = NETWORKS['pvt'][0]().eval()
    program = export_program(deepcopy(network), (32, 40))
    nn.init.constant_(network.layers[1][1][1].attn.rate1, 3.)
    monkeypatch.setattr(export, 'export_program', lambda *given: program)
    with pytest.raises(UsageError, match='outputs of ONNX Runtime differ from those of torch'):
        export_onnx(network, str(tmp_path / 'a.onnx'), (32, 40), fixed_size=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def evaluate(segmentor, shapes, tmp_path):
    """A function that tests a file of the tiny UperNet on generated images."""
    def run(name, *options):
        return call_tool(
            'test', ROOT / TOOL[1], segmentor[1] / name, '--data-root', shapes, '--out',
            tmp_path / name, '--work-dir', tmp_path / 'work', '--cfg-options', *as_options(TINY),
            *FAST, f'experiment_name={name}', *options)
    return run


def test_evaluation_equals_that_of_the_checkpoint(evaluate, tmp_path):
    # The images, padded to 120 pixels, are classified with their padding, which is cut off again.
    for name in ('tiny.pth', 'tiny.onnx'):
        done = evaluate(name, 'model.data_preprocessor.test_cfg.size_divisor=40')
        assert done.returncode == 0, done.stderr
        assert 'mIoU' in done.stdout
    maps = [np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).iterdir())])
            for name in ('tiny.pth', 'tiny.onnx')]
    assert maps[0].shape == (4, 96, 96) and len(np.unique(maps[0])) > 1
    assert (maps[0] == maps[1]).mean() > 0.999


def test_classes_have_the_size_of_the_image(segmentor):
    from mmseg.structures import SegDataSample

    from acmix_mm.deploy.runtime import ONNXSegmentor
    model = ONNXSegmentor(str(segmentor[1] / 'tiny.onnx'))
    images = torch.randn(2, 3, 48, 64)
    # Resized by 1/2, and padded by 4, 12, 2 and 6 pixels at the left, right, top and bottom.
    samples = [SegDataSample(metainfo=dict(ori_shape=(80, 96), img_padding_size=(4, 12, 2, 6)))
               for _ in images]
    for image, sample in zip(images, model(images, samples)):
        classes = torch.from_numpy(model.run(image[None])['output'])[0, :, 2:-6, 4:-12]
        expected = classes.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert torch.equal(sample.pred_sem_seg.data, expected)


def test_evaluation_of_other_files(segmentor, evaluate):
    _, folder, _ = segmentor

    def message(name, *options):
        return plain_message(evaluate(name, *options))
    assert 'mode=whole' in message('tiny.onnx', 'model.test_cfg.mode=slide')
    assert 'none.onnx does not exist' in message('none.onnx')
    model = onnx_ir.load(folder / 'tiny.onnx')
    model.graph.outputs[0].name = 'feature0'
    onnx_ir.save(model, folder / 'backbone.onnx')
    assert 'is not a segmentor exported by tools/export_onnx.py' in message('backbone.onnx')
    model.graph.outputs[0].name = 'output'
    model.metadata_props['classes'] = '["a", "b"]'
    onnx_ir.save(model, folder / 'classes.onnx')
    assert 'has the classes a, b, but the dataset has background' in message('classes.onnx')


@pytest.mark.parametrize(('config', 'given', 'message'), [
    ('shapes/upernet_acmix_swin', {}, 'begin at 225×225, but the shape is 192×192'),
    ('shapes/upernet_acmix_swin', dict(out='none/a.onnx'), 'none does not exist; create it'),
    ('shapes/upernet_acmix_swin', dict(checkpoint='none.pth'), 'none.pth does not exist'),
    ('shapes/upernet_acmix_swin', dict(checkpoint='other.pth'),
     "does not match the config's model"),
    ('shapes/upernet_acmix_swin', dict(options={'model.test_cfg.mode': 'slide'}), 'mode=whole'),
    ('maskrcnn_r50_acmix_fpn_mask', dict(backbone_only=True),
     'has none of the backbones that can be exported: ACmixResNet, '),
])
def test_errors(config, given, message, tmp_path):
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'other.pth')
    checkpoint = given.get('checkpoint') and str(tmp_path / given['checkpoint'])
    with pytest.raises(UsageError, match=message):
        cfg = load_config(str(ROOT / f'configs/{config}.py'), given.get('options'))
        network = network_of(cfg, checkpoint, given.get('backbone_only', False))
        export_onnx(network, str(tmp_path / given.get('out', 'a.onnx')),
                    given.get('shape', padded_image_size(cfg)), fixed_size=False)
    assert [path.name for path in tmp_path.iterdir()] == ['other.pth']


def test_shape_needs_two_positive_integers(run_tool, tmp_path):
    for shape, message in (([512], 'expected 2 arguments'),
                           ([512, 0], "must be a positive integer, got '0'")):
        done = run_tool(*TOOL, tmp_path / 'a.onnx', '--shape', *shape)
        assert done.returncode == 2
        assert f'error: argument --shape: {message}' in done.stderr
        assert 'Traceback' not in done.stderr
