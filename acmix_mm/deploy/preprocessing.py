"""Preprocessing of a detector's images inside the ONNX graph, in ONNX's standard operators."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import numpy as np
from mmcv.image import rescale_size
from mmengine.config import Config

from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir

# Transforms of the test pipeline that a file with preprocessing in the graph makes unnecessary.
GRAPH_TRANSFORMS = ('Resize', 'Pad')


class Preprocessing(NamedTuple):
    """What a config does to an image before the network reads it; written into the metadata.

    Attributes:
        scale: (width, height) that the image is resized to, or None.
        keep_ratio: whether ``scale`` is only the largest size, of any orientation.
        pad: arguments of the transform ``Pad``, or None.
        order: ``'RGB'`` or ``'BGR'``: the channels that the network reads.
        mean: is subtracted from the channels, in this order.
        std: divides them.
        pad_size_divisor: the normalised image is padded to multiples of this.
        pad_value: with this value.
        unsupported: transforms of the test pipeline that cannot be part of the graph.
    """

    scale: Optional[tuple[int, int]]
    keep_ratio: bool
    pad: Optional[dict[str, Any]]
    order: str
    mean: Sequence[float]
    std: Sequence[float]
    pad_size_divisor: int
    pad_value: float
    unsupported: Sequence[str]


def preprocessing_of(cfg: Config) -> Preprocessing:
    """Read the preprocessing of a config's test pipeline and data preprocessor."""
    scale, keep_ratio, pad, unsupported = None, False, None, []
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    for transform in dataset.get('pipeline') or []:
        kind = type_name(transform['type'])
        arguments = {key: value for key, value in transform.items() if key != 'type'}
        if kind == 'Resize' and 'scale' in arguments and not pad:
            scale, keep_ratio = arguments['scale'], arguments.get('keep_ratio', False)
            scale = (scale, scale) if isinstance(scale, int) else tuple(scale)
        elif kind == 'Pad':
            pad = arguments
        elif kind not in ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackSegInputs'):
            unsupported.append(kind)
    preprocessor = cfg.model.get('data_preprocessor') or {}
    return Preprocessing(
        scale, keep_ratio, pad, 'RGB' if preprocessor.get('bgr_to_rgb') else 'BGR',
        preprocessor.get('mean') or [0., 0., 0.], preprocessor.get('std') or [1., 1., 1.],
        preprocessor.get('pad_size_divisor', 1), preprocessor.get('pad_value', 0), unsupported)


def check_preprocessing(steps: Preprocessing) -> None:
    """Check that preprocessing can be part of the graph.

    Raises:
        UsageError: it cannot.
    """
    if steps.unsupported or steps.scale is None:
        reason = (f'the transforms {", ".join(steps.unsupported)}' if steps.unsupported else
                  'no transform Resize with a scale')
        raise UsageError(f'The test pipeline of this config has {reason}, which '
                         '--with-preprocessing cannot export; leave it out and pass normalised '
                         'images to the exported file.')
    if steps.pad is not None and len(set(pad_values(steps.pad))) > 1:
        raise UsageError(f'--with-preprocessing pads all channels with one value, but the test '
                         f'pipeline of this config pads with {pad_values(steps.pad)}.')


def check_whole_images(cfg: Config) -> None:
    """Check that a segmentor's config tests on whole images, as exported files do.

    Raises:
        UsageError: it tests in a sliding window.
    """
    if (cfg.model.get('test_cfg') or {}).get('mode') == 'slide':
        raise UsageError('This config tests in a sliding window, but an exported model takes whole '
                         'images; to test on whole images, pass --cfg-options '
                         'model.test_cfg.mode=whole.')


def pad_values(pad: dict[str, Any]) -> Sequence[float]:
    """The values that the transform ``Pad`` pads an image with, one or one per channel."""
    value = pad.get('pad_val', 0)
    value = value.get('img', 0) if isinstance(value, dict) else value
    return value if isinstance(value, (list, tuple)) else [value]


class Graph:
    """Builds ONNX nodes; constants are given as numbers, lists or arrays.

    Attributes:
        nodes: the nodes built.
    """

    def __init__(self) -> None:
        import onnx_ir
        self.ir = onnx_ir
        self.nodes: list[onnx_ir.Node] = []

    def constant(self, value: Any, dtype: Any) -> 'onnx_ir.Value':
        """A constant tensor."""
        tensor = self.ir.tensor(np.asarray(value, dtype))
        return self.add('Constant', value=tensor)

    def add(self, operator: str, *inputs: Optional['onnx_ir.Value'],
            **attributes: Any) -> 'onnx_ir.Value':
        """Add a node with one output, and return that."""
        node = self.ir.node(operator, inputs, attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, *values: int) -> 'onnx_ir.Value':
        """A constant vector, int64."""
        return self.constant(values, np.int64)

    def round_up(self, size: 'onnx_ir.Value', divisor: int) -> 'onnx_ir.Value':
        """Round sizes up to multiples of ``divisor``."""
        up = self.add('Add', size, self.ints(divisor - 1))
        return self.add('Mul', self.add('Div', up, self.ints(divisor)), self.ints(divisor))

    def pad(self, image: 'onnx_ir.Value', size: 'onnx_ir.Value', target: 'onnx_ir.Value',
            value: float) -> 'onnx_ir.Value':
        """Pad (1, 3, height, width) at the bottom and right from ``size`` to ``target``."""
        pads = self.add('Concat', self.ints(0, 0, 0, 0, 0, 0), self.add('Sub', target, size),
                        axis=0)
        return self.add('Pad', image, pads, self.constant(value, np.float32))


def resized_shape(steps: Preprocessing, shape: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of an image of ``shape`` after the test pipeline."""
    assert steps.scale is not None
    width, height = steps.scale
    if steps.keep_ratio:
        width, height = rescale_size(shape[::-1], steps.scale)
    pad = steps.pad or {}
    if pad.get('pad_to_square'):
        height = width = max(height, width)
    elif pad.get('size') is not None:
        width, height = pad['size']
    divisor = pad.get('size_divisor') or 1
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def add_padding(model: 'onnx_ir.Model', steps: Preprocessing, divisor: int, smallest: int,
                shape: Optional[tuple[int, int]] = None) -> None:
    """Make a graph that reads padded images and their size read images of any size.

    Args:
        model: a graph with the inputs of :class:`acmix_mm.deploy.detectors.Detector`, ``image``
            and ``size``; in their place it gets ``input``, (1, 3, height, width).
        steps: the config's preprocessing.
        divisor: the padded height and width are multiples of this,
        smallest: and not less than this.
        shape: fixed (height, width) of the input.
    """
    graph = Graph()
    image = graph.ir.Input('input', graph.ir.Shape([1, 3, *(shape or ('height', 'width'))]),
                           graph.ir.TensorType(graph.ir.DataType.FLOAT))
    size = graph.add('Shape', image, start=2)
    target = graph.add('Max', graph.round_up(size, divisor), graph.ints(smallest))
    # Each side becomes an axis of steps and one of the positions in a step; the first is inferred.
    number, length = graph.ints(-1), graph.ints(divisor)
    columns = graph.add('Div', graph.add('Gather', target, graph.ints(1)), length)
    divided = graph.add('Concat', graph.ints(1, 3), number, length, columns, length, axis=0)
    divided = graph.add('Reshape', graph.pad(image, size, target, steps.pad_value), divided)
    connect(model, image, graph, divided, size)


def connect(model: 'onnx_ir.Model', new_input: 'onnx_ir.Value', graph: Graph,
            *values: 'onnx_ir.Value') -> None:
    """Compute the inputs of a graph, ``values``, from another input."""
    for old, new in zip(list(model.graph.inputs), values):
        old.replace_all_uses_with(new)
    model.graph.inputs[:] = [new_input]
    model.graph.insert_before(model.graph[0], graph.nodes)


def add_preprocessing(model: 'onnx_ir.Model', steps: Preprocessing,
                      shape: Optional[tuple[int, int]] = None) -> None:
    """Make a graph that reads normalised images, ``input``, read raw ones, ``image``.

    Raw images are (height, width, 3), BGR, uint8. The boxes become those in the raw image.

    Args:
        model: a graph with the input ``input`` and the output ``boxes``.
        steps: the config's preprocessing, checked by :func:`check_preprocessing`.
        shape: fixed (height, width) of the raw image.
    """
    assert steps.scale is not None
    graph = Graph()
    ir, add = graph.ir, graph.add
    raw = ir.Input('image', ir.Shape([*(shape or ('height', 'width')), 3]),
                   ir.TensorType(ir.DataType.UINT8))
    size = add('Shape', raw, start=0, end=2)
    if steps.keep_ratio:
        # mmcv computes this in double precision, too.
        sides = add('Cast', size, to=ir.DataType.DOUBLE)
        factor = add('Min', *(
            add('Div', graph.constant(limit, np.float64), add(reduce, sides, keepdims=0))
            for limit, reduce in ((max(steps.scale), 'ReduceMax'),
                                  (min(steps.scale), 'ReduceMin'))))
        sides = add('Add', add('Mul', sides, factor), graph.constant(0.5, np.float64))
        resized = add('Max', add('Cast', sides, to=ir.DataType.INT64), graph.ints(1))
    else:
        resized = graph.ints(*steps.scale[::-1])

    image = add('Transpose', add('Cast', raw, to=ir.DataType.FLOAT), perm=[2, 0, 1])
    image = add('Unsqueeze', image, graph.ints(0))
    sizes = add('Concat', graph.ints(1, 3), resized, axis=0)
    image = add('Resize', image, None, None, sizes, mode='linear',
                coordinate_transformation_mode='half_pixel')
    # OpenCV resizes uint8 to uint8.
    image = add('Clip', add('Round', image), *(graph.constant(limit, np.float32)
                                               for limit in (0, 255)))
    if steps.pad is not None:
        image = graph.pad(image, resized, padded_size(graph, resized, steps.pad),
                          pad_values(steps.pad)[0])
    if steps.order == 'RGB':
        image = add('Gather', image, graph.ints(2, 1, 0), axis=1)
    mean, std = (graph.constant(np.reshape(each, (1, 3, 1, 1)), np.float32)
                 for each in (steps.mean, steps.std))
    image = add('Div', add('Sub', image, mean), std)

    connect(model, raw, graph, image)
    rescale_boxes(model, size, resized)


def rescale_boxes(model: 'onnx_ir.Model', size: 'onnx_ir.Value', resized: 'onnx_ir.Value') -> None:
    """Make a graph whose image is resized from ``size`` return the boxes before resizing."""
    graph = Graph()
    add, to_float = graph.add, graph.ir.DataType.FLOAT
    scale = add('Div', add('Cast', resized, to=to_float), add('Cast', size, to=to_float))
    # Height and width to x1, y1, x2, y2.
    scale = add('Gather', scale, graph.ints(1, 0, 1, 0), axis=0)
    names = [value.name for value in model.graph.outputs]
    place = names.index('boxes')
    old = model.graph.outputs[place]
    new = add('Div', old, scale)
    old.name, new.name = 'resized_boxes', 'boxes'
    new.shape, new.type = old.shape, old.type
    model.graph.outputs[place] = new
    model.graph.extend(graph.nodes)


def padded_size(graph: Graph, size: 'onnx_ir.Value', pad: dict[str, Any]) -> 'onnx_ir.Value':
    """The (height, width) that the transform ``Pad`` pads to."""
    if pad.get('pad_to_square'):
        size = graph.add('Expand', graph.add('ReduceMax', size, keepdims=0), graph.ints(2))
    elif pad.get('size') is not None:
        size = graph.ints(*pad['size'][::-1])
    if pad.get('size_divisor') is not None:
        size = graph.round_up(size, pad['size_divisor'])
    return size
