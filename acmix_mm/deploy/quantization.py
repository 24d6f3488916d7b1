"""Quantising an exported file to 8-bit integers, calibrated on training images."""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS

from acmix_mm.deploy.preprocessing import GRAPH_TRANSFORMS
from acmix_mm.engine.config import check_data, dataset_configs, enter_scope
from acmix_mm.utils.config import type_name

if TYPE_CHECKING:
    import onnx

# The layers with weights. Products of two activations, as in attention, stay in float32.
QUANTIZED = ['Conv', 'MatMul', 'Gemm']


class CalibrationImages:
    """The first images of a config's training set, as an exported file takes them.

    They are preprocessed as for testing.

    Args:
        cfg: the config.
        count: number of images, fewer if the training set is smaller.
        in_graph: whether the file resizes, pads and normalises images itself.

    Raises:
        UsageError: the training set is missing.
    """

    def __init__(self, cfg: Config, count: int, in_graph: bool) -> None:
        enter_scope(cfg)
        check_data(cfg, ('train',))
        own, tested = (next(dataset_configs(cfg, (split,))) for split in ('train', 'test'))
        dropped = {'LoadAnnotations', *(GRAPH_TRANSFORMS if in_graph else ())}
        own = deepcopy(own)
        own.pipeline = [transform for transform in tested.pipeline
                        if type_name(transform['type']) not in dropped]
        self.dataset = DATASETS.build(own)
        self.preprocessor = None if in_graph else MODELS.build(cfg.model.data_preprocessor)
        self.count = min(count, len(self.dataset))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(self.count):
            sample = self.dataset[index]
            if self.preprocessor is None:
                image = sample['inputs'].permute(1, 2, 0)
            else:
                image = self.preprocessor(pseudo_collate([sample]))['inputs']
            yield np.ascontiguousarray(image.numpy())


def quantize(path: str, images: CalibrationImages) -> None:
    """Quantise weights and activations of an exported file to 8 bits, in place.

    Weights have a scale for each output channel, activations one for each tensor, from their
    smallest and largest values on the images. Of the 8 bits of each weight, 7 are used.

    Args:
        path: the file, which has one input.
        images: what to calibrate with.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):

        def __init__(self, name: str) -> None:
            self.name = name
            self.images = iter(images)

        def get_next(self) -> Optional[dict[str, np.ndarray]]:
            image = next(self.images, None)
            return None if image is None else {self.name: image}

    metadata = onnx.load(path).metadata_props
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        prepared = str(Path(folder) / 'prepared.onnx')
        # Symbolic shapes are not needed, and their inference knows fewer operators than ONNX.
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        separate_biases(model.graph)
        quantize_static(model, path, Reader(model.graph.input[0].name),
                        quant_format=QuantFormat.QDQ, op_types_to_quantize=QUANTIZED,
                        # With 8 bits, products saturate on CPUs without VNNI instructions.
                        per_channel=True, weight_type=QuantType.QInt8, reduce_range=True,
                        nodes_to_exclude=products_of_activations(model.graph))
    model = onnx.load(path)
    del model.metadata_props[:]
    model.metadata_props.extend(metadata)
    # As in the file in float32.
    del model.graph.value_info[:]
    onnx.save(model, path)


def separate_biases(graph: 'onnx.GraphProto') -> None:
    """Give each layer that shares its bias with another one a copy of its own.

    ONNX Runtime's tools name their copies by adding a number, which gives ``val_32`` and
    ``val_3285`` the same name.
    """
    initializers = {each.name: each for each in graph.initializer}
    seen = set()
    for node in graph.node:
        bias = node.input[2] if node.op_type in QUANTIZED and len(node.input) > 2 else ''
        if bias in seen and bias in initializers:
            copy = graph.initializer.add()
            copy.CopyFrom(initializers[bias])
            copy.name = node.input[2] = f'{node.name}.bias'
        seen.add(bias)


def products_of_activations(graph: 'onnx.GraphProto') -> list[str]:
    """The names of matrix products without a weight."""
    weights = {each.name for each in graph.initializer}
    return [node.name for node in graph.node
            if node.op_type == 'MatMul' and not weights & set(node.input)]
