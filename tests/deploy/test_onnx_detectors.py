"""Tests of exported detectors: their post-processing, the ONNX file, its evaluation, examples."""

import json
import pickle
import subprocess
import venv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, relative_error
from helpers.detectors import assert_same, padded, predict, responsive
from helpers.stack import needs_export
from helpers.tools import as_options, call_tool
from PIL import Image
from pycocotools.mask import decode, frPyObjects
from torch import nn

from acmix_mm.deploy import onnx as onnx_module
from acmix_mm.deploy.dynamic_modules import dynamic_module
from acmix_mm.deploy.masks import paste_masks
from acmix_mm.deploy.onnx import export_onnx, forget_shapes, inputs_of, metadata, network_of
from acmix_mm.deploy.preprocessing import (
    add_preprocessing,
    check_preprocessing,
    preprocessing_of,
    resized_shape,
)
from acmix_mm.engine.config import build_model, enter_scope, load_config, set_data_root
from acmix_mm.engine.runner import save_predictions
from acmix_mm.engine.runner import test as run_test
from acmix_mm.layers import WindowACmix
from acmix_mm.utils.errors import UsageError

onnx_ir = pytest.importorskip('onnx_ir')
onnxruntime = pytest.importorskip('onnxruntime')
pytestmark = needs_export
SITE_PACKAGES = Path(np.__file__).parents[1]
SMALL = {
    'model.backbone.depth': 18, 'model.backbone.base_channels': 8,
    'model.neck.in_channels': [8, 16, 32, 64], 'model.neck.out_channels': 16}
HEADS = {
    f'model.{part}': 16 for part in (
        'rpn_head.in_channels', 'rpn_head.feat_channels',
        'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels',
        'roi_head.bbox_head.in_channels', 'roi_head.bbox_head.fc_out_channels',
        'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels')}
RETINA = {'model.bbox_head.in_channels': 16, 'model.bbox_head.feat_channels': 16}
CASCADE = {key.replace('bbox_head', f'bbox_head.{stage}'): value for key, value in HEADS.items()
           for stage in range(3)}
CASCADE.update({f'model.roi_head.{head}.num_classes': 3 for head in (
    'bbox_head.0', 'bbox_head.1', 'bbox_head.2', 'mask_head')})
# As in the configs with Swin, where all stages have such heads.
CASCADE.update({f'model.roi_head.bbox_head.0.{name}': value for name, value in dict(
    type='ConvFCBBoxHead', num_shared_convs=1, num_shared_fcs=1, conv_out_channels=16,
    norm_cfg=dict(type='BN')).items()})
MASK_ACMIX = {**SMALL, **HEADS, 'model.roi_head.mask_head.num_convs': 1,
              'model.roi_head.bbox_head.num_classes': 3, 'model.roi_head.mask_head.num_classes': 3}
YOLO = {
    'model.backbone.widen_factor': 0.125, 'model.neck.in_channels': [32, 64, 128],
    'model.neck.out_channels': 32, 'model.bbox_head.in_channels': 32,
    'model.bbox_head.feat_channels': 32}
# A config of each kind of detector, reduced.
MASK_RCNN = 'shapes/maskrcnn_acmix_pvt'
CONFIGS = {
    MASK_RCNN: {'model.backbone.embed_dims': 8, 'model.backbone.num_layers': [1, 1, 1, 1],
                'model.neck.in_channels': [8, 16, 40, 64], 'model.neck.out_channels': 16,
                'model.test_cfg.rcnn.max_per_img': 30, **HEADS},
    'cascade_maskrcnn_acmix_r50': {**SMALL, **CASCADE},
    'maskrcnn_r50_acmix_fpn_mask': MASK_ACMIX,
    'retinanet_acmix_r50': {**SMALL, **RETINA},
    'yolox_acmix_s': YOLO,
    'rtmdet_acmix_s': YOLO,
}


def config(name, options=()):
    """The config of this name, reduced."""
    return load_config(str(ROOT / f'configs/{name}.py'), {**CONFIGS.get(name, {}), **dict(options)})


@pytest.mark.parametrize('name', CONFIGS)
def test_post_processing_equals_mmdetection(name):
    from acmix_mm.deploy.detectors import KINDS
    cfg = config(name)
    model = responsive(build_model(cfg))
    detector = KINDS[cfg.model.type](model).eval()
    for size in ((64, 96), (70, 45)):
        image = torch.randn(1, 3, *size)
        expected = predict(model, image)
        assert len(expected) > 1
        with torch.no_grad():
            outputs = detector(inputs_of(detector, padded(image))[0], torch.tensor(size))
        assert_same(outputs[:len(detector.output_names)], expected)


# What the file of each kind of detector leaves out: other tests export backbones and necks.
PLAIN = {'model.backbone.type': 'ResNet', 'model.backbone.frozen_stages': -1}
FILES = {
    'cascade_maskrcnn_acmix_r50': PLAIN,
    'maskrcnn_r50_acmix_fpn_mask': {'model.neck.conv_cfg': None},
    'retinanet_acmix_r50': {**PLAIN, 'model.bbox_head.stacked_convs': 1},
    'yolox_acmix_s': {'model.neck.conv_cfg': None, 'model.bbox_head.conv_cfg': None},
    'rtmdet_acmix_s': {'model.neck.conv_cfg': None, 'model.bbox_head.conv_cfg': None},
}


@pytest.mark.parametrize('name', FILES)
def test_files_equal_mmdetection(name, tmp_path):
    cfg = config(name, FILES[name])
    network = network_of(cfg, None, backbone_only=False)
    model = responsive(network.detector)
    export_onnx(network, str(tmp_path / 'a.onnx'), (64, 96), False, cfg)
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    for size in ((64, 96), (70, 45)):
        image = torch.randn(1, 3, *size)
        expected = predict(model, image)
        assert len(expected) > 1
        assert_same(session.run(None, dict(input=image.numpy())), expected)


@pytest.mark.parametrize('size', [(6, 6), (7, 7), (1, 9), (42, 3), (2, 8), (15, 13)])
@pytest.mark.parametrize('shift_size', [0, 3])
def test_dynamic_windows_equal_the_layer(size, shift_size):
    for mix, (embed_dims, num_heads) in (('acmix', (24, 3)), ('acmix', (8, 2)), ('attn', (8, 2)),
                                         ('conv', (8, 2))):
        layer = WindowACmix(embed_dims, num_heads, 7, shift_size=shift_size, mix=mix).eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, *size, embed_dims)
        with torch.no_grad():
            assert relative_error(dynamic_module(layer)(x), layer(x)) < 1e-5


def test_pasting_equals_mmdetection():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    masks = torch.rand(40, 28, 28)
    corner, side = torch.rand(40, 2) * 90 - 10, torch.rand(40, 2) * 60
    boxes = torch.cat([corner, corner + side], 1)
    expected, _ = _do_paste_mask(masks[:, None], boxes, 70, 90, skip_empty=False)
    actual = torch.from_numpy(paste_masks(masks.numpy(), boxes.numpy(), (70, 90)))
    # Away from the threshold, where rounding decides.
    clear = (expected - 0.5).abs() > 1e-4
    assert torch.equal(actual[clear], (expected >= 0.5)[clear])
    assert paste_masks(np.zeros((0, 28, 28)), np.zeros((0, 4)), (7, 9)).shape == (0, 7, 9)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A small Mask R-CNN, its config, and the files with and without preprocessing."""
    folder = tmp_path_factory.mktemp('detector')
    torch.manual_seed(0)
    cfg = config(MASK_RCNN)
    network = network_of(cfg, None, backbone_only=False)
    responsive(network.detector)
    torch.save(dict(state_dict=network.detector.state_dict(), meta={}), folder / 'small.pth')
    export_onnx(network, str(folder / 'plain.onnx'), (100, 130), False, cfg)
    # As with_preprocessing=True does, but without another trace.
    model, steps = onnx_ir.load(folder / 'plain.onnx'), preprocessing_of(cfg)
    add_preprocessing(model, steps)
    model.metadata_props.update(metadata(cfg, network, steps, True, 64))
    forget_shapes(model)
    onnx_ir.save(model, folder / 'raw.onnx')
    return network.detector, cfg, folder


def test_file_has_standard_operators_and_metadata(exported):
    import onnx
    _, _, folder = exported
    for name, given in (('plain', [1, 3, 'height', 'width']), ('raw', ['height', 'width', 3])):
        model = onnx.load(folder / f'{name}.onnx')
        assert [(each.domain, each.version) for each in model.opset_import] == [('', 20)]
        assert not model.functions
        # Shapes would let ONNX Runtime keep memory for later tensors; notes contain local paths.
        assert not model.graph.value_info
        assert not any(node.metadata_props for node in model.graph.node)
        assert {node.domain for node in model.graph.node} == {''}
        operators = {node.op_type for node in model.graph.node}
        assert operators >= {'NonMaxSuppression', 'RoiAlign', 'TopK'}
        session = onnxruntime.InferenceSession(folder / f'{name}.onnx')
        assert session.get_inputs()[0].shape == given
        assert [each.name for each in session.get_outputs()] == ['boxes', 'scores', 'labels',
                                                                 'masks']
        entries = session.get_modelmeta().custom_metadata_map
        assert json.loads(entries['classes']) == ['circle', 'square', 'triangle']
        steps = json.loads(entries['preprocessing'])
        assert steps['scale'] == [192, 192]
        assert steps['order'] == 'RGB'
        assert steps['in_graph'] == (name == 'raw')
        assert float(entries['mask_threshold']) == 0.5


def normalised(cfg, image):
    """A raw image as the network reads it, if the test pipeline does not resize it."""
    steps = preprocessing_of(cfg)
    assert resized_shape(steps, image.shape[:2]) == image.shape[:2]
    pixels = (image[:, :, ::-1] - np.float32(steps.mean)) / np.float32(steps.std)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


def random_image(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_sizes_in_a_row(exported):
    model, _, folder = exported
    session = onnxruntime.InferenceSession(folder / 'plain.onnx')
    for size in ((96, 160), (33, 47), (100, 250), (40, 64), (191, 65)):
        image = torch.randn(1, 3, *size)
        expected = predict(model, image)
        assert len(expected) > 1
        assert_same(session.run(None, dict(input=image.numpy())), expected)
    # Smaller images are padded to 64 pixels, more than by MMDetection.
    boxes, *_ = session.run(None, dict(input=np.ones((1, 3, 5, 3), np.float32)))
    assert (boxes <= np.array([3, 5, 3, 5])).all()


def test_sizes_in_a_row_of_raw_images(exported):
    model, cfg, folder = exported
    session = onnxruntime.InferenceSession(folder / 'raw.onnx')
    for size in ((192, 131), (64, 192), (192, 192)):
        image = random_image(*size)
        expected = predict(model, normalised(cfg, image))
        assert_same(session.run(None, dict(image=image)), expected)
    # The first is padded further than by MMDetection, the others are resized with other rounding.
    for height, width in ((192, 6), (5, 3), (1, 1), (333, 250)):
        boxes, *_ = session.run(None, dict(image=random_image(height, width)))
        limits = np.array([width, height, width, height])
        assert (boxes >= 0).all()
        assert (boxes <= limits + 1e-4).all()


def test_order_of_improbable_proposals(exported, tmp_path):
    # ONNX Runtime's sigmoid of such logits is noise.
    network, cfg, folder = exported
    bias = network.rpn_head.rpn_cls.bias
    before = bias.detach().clone()
    bias.data -= 17
    model = onnx_ir.load(folder / 'plain.onnx')
    initializer = model.graph.initializers['detector.rpn_head.rpn_cls.bias']
    initializer.const_value = onnx_ir.tensor(bias.detach().numpy())
    onnx_ir.save(model, tmp_path / 'a.onnx')
    image = normalised(cfg, random_image(192, 90))
    expected = predict(network, image)
    bias.data.copy_(before)
    assert len(expected) > 1
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    # Without masks, whose logits may share an initializer with the bias.
    outputs = session.run(['boxes', 'scores', 'labels'], dict(input=image.numpy()))
    assert_same(outputs, expected)


@pytest.fixture(scope='module')
def fixed(exported):
    """The small Mask R-CNN for raw images of 192×90 pixels, exported by the tool."""
    path = exported[2] / 'fixed.onnx'
    done = call_tool('export_onnx', ROOT / f'configs/{MASK_RCNN}.py', exported[2] / 'small.pth',
                     path, '--with-preprocessing', '--fixed-size', '--shape', 192, 90,
                     '--cfg-options', *as_options(CONFIGS[MASK_RCNN]))
    assert done.returncode == 0, done.stderr
    assert 'image: tensor(uint8) (192, 90, 3)' in done.stdout
    return path


def test_fixed_size(exported, fixed):
    model, cfg, _ = exported
    session = onnxruntime.InferenceSession(fixed)
    image = random_image(192, 90)
    expected = predict(model, normalised(cfg, image))
    assert len(expected) > 1
    assert_same(session.run(None, dict(image=image)), expected)
    with pytest.raises(Exception, match='Got invalid dimensions for input: image'):
        session.run(None, dict(image=random_image(192, 91)))


def test_fixed_size_smaller_than_a_window(tmp_path):
    cfg = config('shapes/maskrcnn_acmix_swin', {
        'model.backbone.depths': [1, 1, 1, 1], 'model.neck.out_channels': 16, **HEADS})
    network = network_of(cfg, None, backbone_only=False)
    model = responsive(network.detector)
    export_onnx(network, str(tmp_path / 'a.onnx'), (20, 13), True, cfg)
    image = torch.randn(1, 3, 20, 13)
    expected = predict(model, image)
    assert len(expected) > 1
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    assert session.get_inputs()[0].shape == [1, 3, 20, 13]
    assert_same(session.run(None, dict(input=image.numpy())), expected)


@pytest.mark.parametrize('name', ['plain', 'raw', 'fixed'])
def test_number_of_detections(name, exported, fixed, tmp_path):
    network, cfg, folder = exported
    head = network.roi_head.bbox_head
    given = random_image(192, 90)
    image = normalised(cfg, given)

    def count(background):
        head.fc_cls.bias.data[-1] = background
        return len(predict(network, image))

    def largest_background(number):
        """The logit of the background from which on fewer than ``number`` objects are found."""
        low, high = -100., 100.
        while high - low > 1e-3:
            middle = (low + high) / 2
            low, high = (middle, high) if count(middle) >= number else (low, middle)
        return low

    model = onnx_ir.load(folder / f'{name}.onnx')
    bias = model.graph.initializers['detector.roi_head.bbox_head.fc_cls.bias']
    before = head.fc_cls.bias.detach().clone()
    # The last finds more than the maximum, 30.
    for background, number in ((1e4, 0), (largest_background(1), 1),
                               (largest_background(30) - 1, 30)):
        assert count(background) == number
        bias.const_value = onnx_ir.tensor(head.fc_cls.bias.detach().numpy())
        onnx_ir.save(model, tmp_path / 'a.onnx')
        session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
        outputs = session.run(None, {
            each.name: image.numpy() if name == 'plain' else given
            for each in session.get_inputs()})
        assert [each.shape for each in outputs] == [(number, 4), (number,), (number,),
                                                    (number, 28, 28)]
        assert_same(outputs, predict(network, image))
    head.fc_cls.bias.data.copy_(before)


@pytest.mark.parametrize('name', ['maskrcnn_acmix_r50', 'yolox_acmix_s', 'rtmdet_acmix_s'])
def test_preprocessing_equals_the_pipeline(name, tmp_path):
    from mmdet.registry import MODELS, TRANSFORMS
    cfg = config(name)
    enter_scope(cfg)
    pipeline = [transform for transform in cfg.test_dataloader.dataset.pipeline
                if transform.type in ('Resize', 'Pad')]
    # A graph that returns its input.
    given = onnx_ir.Input('input', onnx_ir.Shape([1, 3, 'height', 'width']),
                          onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    pixels = onnx_ir.node('Identity', [given])
    boxes = onnx_ir.node('Constant', [], dict(value=onnx_ir.tensor(np.ones((1, 4), np.float32))))
    outputs = [pixels.outputs[0], boxes.outputs[0]]
    for output, (label, axes) in zip(outputs, (('pixels', given.shape),
                                               ('boxes', onnx_ir.Shape([1, 4])))):
        output.name, output.shape, output.type = label, axes, given.type
    graph = onnx_ir.Graph([given], outputs, nodes=[pixels, boxes], opset_imports={'': 20})
    model = onnx_ir.Model(graph, ir_version=10)
    add_preprocessing(model, preprocessing_of(cfg))
    onnx_ir.save(model, tmp_path / 'a.onnx')
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx')
    preprocessor = MODELS.build(dict(cfg.model.data_preprocessor, pad_size_divisor=1))
    for height, width in ((100, 130), (900, 700), (40, 333)):
        image = cv2.resize(random_image(12, 9), (width, height))
        results = dict(img=image, img_shape=image.shape[:2])
        for transform in pipeline:
            results = TRANSFORMS.build(transform).transform(results)
        expected = preprocessor(dict(inputs=[torch.from_numpy(results['img']).permute(2, 0, 1)],
                                     data_samples=None))['inputs']
        actual, boxes = session.run(None, dict(image=image))
        assert actual.shape == tuple(expected.shape)
        # OpenCV rounds some pixels to the next level.
        levels = (preprocessor.std.max() if preprocessor._enable_normalize else 1)
        difference = (torch.from_numpy(actual) - expected).abs() * levels
        assert difference.max() < 1.1
        assert difference.mean() < 0.2
        scale = results['scale_factor']
        np.testing.assert_allclose(boxes, 1 / np.array([[*scale, *scale]]), rtol=1e-5)


@pytest.fixture(scope='module')
def evaluate(exported, shapes):
    """A function that tests a file on generated images, with given annotations."""
    from acmix_mm.deploy.runtime import test_onnx
    _, _, folder = exported

    def run(name, annotations, save=None):
        options = {'test_dataloader.num_workers': 0, 'test_dataloader.persistent_workers': False}
        cfg = config(MASK_RCNN, options)
        set_data_root(cfg, str(shapes))
        cfg.test_dataloader.dataset.ann_file = cfg.test_evaluator.ann_file = str(annotations)
        cfg.update(work_dir=str(folder / 'work'), launcher='none', load_from=str(folder / name),
                   experiment_name=f'{name}-{save}')
        if save:
            save_predictions(cfg, str(save))
        return test_onnx(cfg, cfg.load_from) if name.endswith('.onnx') else run_test(cfg)
    return run


def test_evaluation_equals_that_of_the_checkpoint(evaluate, exported, shapes):
    _, _, folder = exported
    truth = shapes / 'annotations/instances_val2017.json'
    evaluate('small.pth', truth, folder / 'found.pkl')
    # The checkpoint's own detections become the truth, so that its weights may be random.
    contents = json.loads(truth.read_text())
    contents['annotations'] = []
    for result in pickle.loads((folder / 'found.pkl').read_bytes()):
        found = result['pred_instances']
        for box, score, label, mask in zip(found['bboxes'].tolist(), found['scores'].tolist(),
                                           found['labels'].tolist(), found['masks']):
            if score > 0.5:
                left, top, right, bottom = box
                contents['annotations'].append(dict(
                    id=len(contents['annotations']) + 1, image_id=result['img_id'], iscrowd=0,
                    category_id=label + 1, bbox=[left, top, right - left, bottom - top],
                    area=(right - left) * (bottom - top),
                    segmentation=dict(size=mask['size'], counts=mask['counts'].decode())))
    own = folder / 'own.json'
    own.write_text(json.dumps(contents))
    expected = evaluate('small.pth', own)
    assert min(expected['coco/bbox_mAP'], expected['coco/segm_mAP']) > 0.5
    plain, raw = evaluate('plain.onnx', own), evaluate('raw.onnx', own)
    for key in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert abs(plain[key] - expected[key]) <= 0.01
        # Unlike a trained network, a random one reacts to single levels of resized pixels.
        assert raw[key] > 0.2


def test_evaluation_of_other_files(evaluate, exported, shapes):
    _, _, folder = exported
    truth = shapes / 'annotations/instances_val2017.json'
    (folder / 'damaged.onnx').write_bytes((folder / 'raw.onnx').read_bytes()[:1000])
    with pytest.raises(UsageError, match=r'damaged.onnx is damaged or not an ONNX file'):
        evaluate('damaged.onnx', truth)
    with pytest.raises(UsageError, match=r'none.onnx does not exist'):
        evaluate('none.onnx', truth)
    model = onnx_ir.load(folder / 'raw.onnx')
    model.metadata_props['classes'] = json.dumps(['a', 'b', 'c'])
    onnx_ir.save(model, folder / 'classes.onnx')
    with pytest.raises(UsageError, match='has the classes a, b, c, but the dataset has circle'):
        evaluate('classes.onnx', truth)
    model.metadata_props.pop('preprocessing')
    onnx_ir.save(model, folder / 'unrelated.onnx')
    with pytest.raises(UsageError, match='is not a detector exported by'):
        evaluate('unrelated.onnx', truth)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('dino_acmix_swin_t', {}, 'The detector DINO cannot be exported; supported: RetinaNet, '),
    ('mask2former_acmix_swin_t_coco', {}, 'panoptic_head cannot be exported'),
    ('maskrcnn_acmix_r50', {'model.test_cfg.rcnn.nms.type': 'soft_nms'},
     'nms, soft_nms, cannot be exported; supported: nms'),
    ('maskrcnn_acmix_r50', {'model.test_cfg.rpn.nms.min_score': 0.1}, 'min_score of nms cannot be'),
    ('maskrcnn_acmix_r50', {'model.type': 'DetTTAModel'}, 'Test-time augmentation cannot be'),
    ('maskrcnn_acmix_r50', {'model.type': 'PanopticFPN'}, 'The detector PanopticFPN cannot be'),
    ('maskrcnn_acmix_r50', {'model.roi_head.mask_head.type': 'PointHead'}, 'mask_head, PointHead'),
])
def test_unsupported_detectors_are_named_before_any_work(monkeypatch, name, options, message):
    monkeypatch.setattr(onnx_module, 'build_model', lambda cfg: pytest.fail('built the model'))
    with pytest.raises(UsageError, match=message):
        network_of(config(name, options), 'none.pth', backbone_only=False)


def test_unsupported_preprocessing_is_named():
    steps = preprocessing_of(config('maskrcnn_acmix_r50', {
        'test_dataloader.dataset.pipeline.1.type': 'FixScaleResize'}))
    with pytest.raises(UsageError, match='transforms FixScaleResize, which --with-preprocessing'):
        check_preprocessing(steps)
    steps = preprocessing_of(config('maskrcnn_acmix_r50'))._replace(pad=dict(pad_val=(1, 2, 3)))
    with pytest.raises(UsageError, match='pads all channels with one value'):
        check_preprocessing(steps)


@pytest.mark.parametrize(('name', 'shape', 'resized'), [
    ('maskrcnn_acmix_r50', (480, 640), (800, 1067)),
    ('yolox_acmix_s', (480, 640), (640, 640)),
    ('rtmdet_acmix_s', (100, 640), (640, 640)),
])
def test_resized_shape(name, shape, resized):
    assert resized_shape(preprocessing_of(config(name)), shape) == resized


@pytest.fixture(scope='module')
def run_example(tmp_path_factory):
    """A function that runs an example in an environment with onnxruntime, numpy and Pillow only."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, symlinks=True)
    packages = folder / 'packages'
    packages.mkdir()
    for name in ('onnxruntime', 'numpy', 'numpy.libs', 'PIL', 'pillow.libs'):
        source = SITE_PACKAGES / name
        if source.is_dir():
            (packages / name).symlink_to(source)

    def run(*arguments):
        return subprocess.run([folder / 'bin/python', *map(str, arguments)], cwd=ROOT, text=True,
                              env=dict(PYTHONPATH=str(packages)), capture_output=True, check=False)
    assert run('-c', 'import torch').returncode != 0
    return run


@pytest.fixture
def photo(tmp_path):
    """The path of an image on which the small detector finds something."""
    Image.fromarray(random_image(12, 9)).resize((130, 100)).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


def test_detection_example(run_example, exported, photo, tmp_path):
    done = run_example('examples/detect_onnx.py', exported[2] / 'raw.onnx', photo,
                       tmp_path / 'found.png')
    assert (done.returncode, done.stderr) == (0, '')
    found = json.loads((tmp_path / 'found.json').read_text())
    session = onnxruntime.InferenceSession(exported[2] / 'raw.onnx')
    boxes, scores, labels, masks = session.run(None, dict(
        image=np.ascontiguousarray(np.asarray(Image.open(photo))[:, :, ::-1])))
    confident = scores >= 0.5
    assert len(found) == confident.sum() > 0
    np.testing.assert_allclose([each['box'] for each in found], boxes[confident], atol=0.1)
    classes = ('circle', 'square', 'triangle')
    assert [each['name'] for each in found] == [classes[label] for label in labels[confident]]
    for each, expected in zip(found, paste_masks(masks[confident], boxes[confident], (100, 130))):
        encoded = frPyObjects(each['segmentation'], 100, 130)
        assert (decode(encoded).astype(bool) != expected).mean() < 1e-3
    before, after = (np.asarray(Image.open(path)) for path in (photo, tmp_path / 'found.png'))
    assert before.shape == after.shape
    assert (before != after).any()


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """The file of a small segmentor for images of 147×192 pixels."""
    options = {
        'model.backbone.depth': 18, 'model.backbone.base_channels': 8,
        'model.backbone.num_stages': 2, 'model.backbone.strides': [1, 2],
        'model.backbone.dilations': [1, 1], 'model.backbone.out_indices': [0, 1],
        'model.decode_head.in_channels': [8, 16], 'model.decode_head.in_index': [0, 1],
        'model.decode_head.channels': 16, 'model.auxiliary_head': None}
    cfg = config('shapes/upernet_acmix_r50', options)
    network = network_of(cfg, None, backbone_only=False)
    path = tmp_path_factory.mktemp('segmentor') / 'segmentor.onnx'
    export_onnx(network, str(path), (147, 192), fixed_size=True, cfg=cfg)
    return path


def test_segmentation_example(run_example, segmentor, photo, tmp_path):
    done = run_example('examples/segment_onnx.py', segmentor, photo, tmp_path / 'found.png')
    assert (done.returncode, done.stderr) == (0, '')
    shares = json.loads((tmp_path / 'found.json').read_text())
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert set(shares) <= {'background', 'circle', 'square', 'triangle'}
    assert Image.open(tmp_path / 'found.png').size == (130, 100)


@pytest.mark.parametrize('example', ['detect', 'segment'])
def test_errors_of_examples(run_example, exported, segmentor, photo, tmp_path, example):
    folder, output = exported[2], tmp_path / 'output'
    output.mkdir()
    (tmp_path / 'damaged.onnx').write_bytes((folder / 'raw.onnx').read_bytes()[:1000])
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'cut.png').write_bytes(photo.read_bytes()[:200])
    (tmp_path / 'a.json').mkdir()
    model, unusable = folder / 'raw.onnx', folder / 'plain.onnx'
    if example == 'segment':
        model, unusable = segmentor, model
    cases = [(tmp_path / 'damaged.onnx', photo, output / 'a.png', 'damaged.onnx is not a usable'),
             (unusable, photo, output / 'a.png', f'{unusable.name} is not a usable'),
             (photo, photo, output / 'a.png', 'photo.png is not a usable'),
             (model, tmp_path / 'none.png', output / 'a.png', 'none.png cannot be read'),
             (model, tmp_path / 'text.png', output / 'a.png', 'text.png cannot be read'),
             (model, tmp_path / 'cut.png', output / 'a.png', 'cut.png cannot be read'),
             (model, photo, tmp_path / 'none/a.png', 'none/a.png cannot be written'),
             (model, photo, output / 'a.unknown', 'a.unknown cannot be written'),
             (model, photo, tmp_path / 'a.png', 'a.png cannot be written')]
    for *arguments, message in cases:
        done = run_example(f'examples/{example}_onnx.py', *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert 'Traceback' not in done.stderr
        assert not list(output.iterdir())
    assert not (tmp_path / 'a.png').exists()
