"""Tests of 8-bit files: what is quantised, and the images for calibration."""

import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, relative_error
from helpers.stack import needs_export
from helpers.tools import DETECTION

from acmix_mm.backbones import ACmixSwinTransformer
from acmix_mm.deploy.onnx import export_onnx, open_session
from acmix_mm.deploy.quantization import CalibrationImages, quantize
from acmix_mm.engine.config import load_config, set_data_root
from acmix_mm.utils.errors import UsageError

onnx = pytest.importorskip('onnx')
pytestmark = needs_export


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A small Swin and its 8-bit version, calibrated on random images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('int8')
    network = ACmixSwinTransformer(embed_dims=16, depths=(2, 1), num_heads=(2, 4), strides=(4, 2),
                                   out_indices=(0, 1), window_size=3).eval()
    paths = [str(folder / name) for name in ('float.onnx', 'int8.onnx')]
    export_onnx(network, paths[0], (64, 64), fixed_size=True)
    shutil.copy(*paths)
    images = [np.random.default_rng(seed).standard_normal((1, 3, 64, 64), np.float32)
              for seed in range(3)]
    quantize(paths[1], images)
    return *paths, images


def test_layers_with_weights_have_integer_weights(files):
    graph = onnx.load(files[1]).graph
    sources = {name: node for node in graph.node for name in node.output}
    types = {each.name: each.data_type for each in graph.initializer}
    kinds = {'Conv': [], 'Gemm': [], 'MatMul': []}
    for node in graph.node:
        if node.op_type in kinds:
            weight = sources.get(node.input[1])
            is_quantized = weight is not None and weight.op_type == 'DequantizeLinear'
            kinds[node.op_type].append(is_quantized)
            if is_quantized:
                assert types[weight.input[0]] == onnx.TensorProto.INT8
    assert kinds['Conv'] and all(kinds['Conv'] + kinds['Gemm'])
    # Each of three blocks has two products of activations, and four with weights.
    assert kinds['MatMul'].count(False) == 6
    assert kinds['MatMul'].count(True) + len(kinds['Gemm']) >= 12


def test_features_are_nearly_those_of_float32(files):
    *paths, images = files
    expected, actual = (open_session(path).run(None, {'input': images[0]}) for path in paths)
    for ours, theirs in zip(actual, expected):
        assert 1e-5 < relative_error(torch.from_numpy(ours), torch.from_numpy(theirs)) < 0.1


def test_metadata_is_kept(files):
    assert not any(onnx.load(path).graph.value_info for path in files[:2])
    entries = [{each.key: each.value for each in onnx.load(path).metadata_props}
               for path in files[:2]]
    assert entries[1] == entries[0] and 'smallest_height' in entries[0]


def test_layers_that_share_a_bias(tmp_path):
    # The tools of ONNX Runtime would name the second layer's copy of this bias val_30.
    make = onnx.helper.make_node
    nodes = [make('Conv', ['input', 'weight', 'val_3'], ['first'], 'conv1'),
             make('Conv', ['first', 'weight', 'val_3'], ['val_30'], 'conv2'),
             make('Sqrt', ['val_30'], ['output'], 'sqrt')]
    tensors = {'weight': np.ones((2, 2, 1, 1), np.float32), 'val_3': np.ones(2, np.float32)}
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, 2, 4, 4))
              for name in ('input', 'output')]
    graph = onnx.helper.make_graph(nodes, 'shared', values[:1], values[1:], [
        onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()])
    path, image = str(tmp_path / 'shared.onnx'), np.ones((1, 2, 4, 4), np.float32)
    onnx.save(onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid('', 20)], ir_version=10), path)
    expected, = open_session(path).run(None, {'input': image})
    quantize(path, [image])
    actual, = open_session(path).run(None, {'input': image})
    np.testing.assert_allclose(actual, expected, rtol=0.02)


@pytest.mark.parametrize('in_graph', [False, True])
def test_calibration_images(shapes, in_graph):
    cfg = load_config(str(ROOT / DETECTION))
    set_data_root(cfg, str(shapes))
    images = CalibrationImages(cfg, 3, in_graph)
    assert len(images) == 3 and len(CalibrationImages(cfg, 100, in_graph)) == 8
    first, *others = images
    assert len(others) == 2
    if in_graph:
        assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    else:
        # Resized and normalised.
        assert first.shape == (1, 3, 192, 192) and first.dtype == np.float32
        assert abs(first.mean()) < 3


def test_missing_training_set(tmp_path):
    cfg = load_config(str(ROOT / DETECTION))
    set_data_root(cfg, str(tmp_path))
    with pytest.raises(UsageError, match='--data-root'):
        CalibrationImages(cfg, 3, in_graph=True)
