"""Exporting the model of a config to ONNX, verified with ONNX Runtime."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random
from typing import Any, Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.config import Config
from sympy import Integer
from torch import Tensor, nn
from torch.export import ExportedProgram

from acmix_mm.backbones.base import BACKBONES, ACmixBackbone
from acmix_mm.checkpoints.reading import read_checkpoint
from acmix_mm.engine.config import build_model
from acmix_mm.engine.runner import load_all_weights
from acmix_mm.environment import export_unavailable
from acmix_mm.layers.base import OperatorLayer
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.output_paths import file_to_write

OPSET = 20
# A file is kept only if no output differs from torch's by more, relative to the largest value.
MAX_RELATIVE_ERROR = 1e-3
SPECIALISED = ('This network cannot be exported with dynamic sizes; for images of one size pass '
               '--fixed-size and --shape H W.')


class ClassMap(nn.Module):
    """A segmentor with the interface of MMDeploy's exports.

    Maps normalised images (batch, 3, height, width) to the class of each pixel, (batch, 1, height,
    width), int64, and, for verification, to the logits (batch, classes, height, width).
    """

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(image)
        return logits.argmax(1, keepdim=True), logits

    def logits(self, image: Tensor) -> Tensor:
        """Compute the logits as MMSegmentation's inference on whole images does."""
        logits = self.segmentor.encode_decode(image, [dict(img_shape=image.shape[2:])])
        if logits.shape[1] > 1:
            return logits
        # A single logit is that of the second of two classes, which is predicted from a threshold
        # of its probability on.
        threshold = torch.tensor(self.segmentor.decode_head.threshold).logit().item()
        return torch.cat([torch.full_like(logits, threshold), logits], 1)


class PadToStrides(nn.Module):
    """Pad (batch, channels, height, width) at the bottom and right to multiples of the strides."""

    def __init__(self, strides: tuple[int, int], value: float) -> None:
        super().__init__()
        self.strides, self.value = strides, value

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = ((extent + stride - 1) // stride * stride - extent
                         for extent, stride in zip(x.shape[2:], self.strides))
        return F.pad(x, (0, right, 0, bottom), value=self.value)


class MatrixAdaptiveAvgPool2d(nn.Module):
    """Adaptive average pooling as two matrix products; ONNX has no adaptive pooling."""

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.pooling_matrix(extent, bins, x)
                         for extent, bins in zip(x.shape[2:], self.output_size))
        return rows @ x @ columns.T

    @staticmethod
    def pooling_matrix(extent: int, bins: int, like: Tensor) -> Tensor:
        """Matrix (bins, extent) whose row i averages the positions from ⌊i · extent / bins⌋ to
        ⌈(i + 1) · extent / bins⌉, the last excluded, as torch's adaptive pooling does.
        """
        index = torch.arange(bins, device=like.device)[:, None]
        start, stop = index * extent // bins, ((index + 1) * extent + bins - 1) // bins
        position = torch.arange(extent, device=like.device)
        inside = (position >= start) & (position < stop)
        return inside.to(like.dtype) / (stop - start)


class IntegerUpsample(nn.Module):
    """Interpolation by integer factors."""

    def __init__(self, factors: tuple[int, int], mode: str, align_corners: Optional[bool]) -> None:
        super().__init__()
        self.factors, self.mode, self.align_corners = factors, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [extent * factor for extent, factor in zip(x.shape[2:], self.factors)]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def with_dynamic_modules(network: nn.Module) -> nn.Module:
    """Copy a network and replace its modules as :func:`dynamic_module` does."""
    copy = deepcopy(network)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            setattr(parent, name, dynamic_module(child))
    return copy


def dynamic_module(module: nn.Module) -> nn.Module:
    """Return a module equal to ``module`` that torch.export can trace with dynamic sizes.

    Modules of torch and OpenMMLab that round sizes make torch.export specialise on the sizes of its
    example; those listed here are replaced, all others are returned as they are.
    """
    if isinstance(module, AdaptivePadding) and (
            module.padding == 'corner' and module.kernel_size == module.stride):
        return PadToStrides(module.stride, 0.)
    if isinstance(module, nn.MaxPool2d):
        kernel, stride, padding = (sides if isinstance(sides, tuple) else (sides, sides) for sides
                                   in (module.kernel_size, module.stride, module.padding))
        # Whether the output has ⌈extent / stride⌉ positions, as it has after padding to the stride.
        rounds_up = all(side - 2 * pad == (step if module.ceil_mode else 1)
                        for side, step, pad in zip(kernel, stride, padding))
        if rounds_up:
            return nn.Sequential(PadToStrides(stride, -torch.inf),
                                 nn.MaxPool2d(kernel, stride, padding))
    if isinstance(module, nn.AdaptiveAvgPool2d):
        size = module.output_size
        return MatrixAdaptiveAvgPool2d(size if isinstance(size, tuple) else (size, size))
    factors = getattr(module, 'scale_factor', None)
    if type(module).__name__ == 'Upsample' and factors is not None:
        factors = factors if isinstance(factors, tuple) else (factors, factors)
        if all(factor == int(factor) for factor in factors):
            return IntegerUpsample(tuple(map(int, factors)), module.mode, module.align_corners)
    return module


def smallest_side(network: nn.Module) -> int:
    """Return the smallest image height and width from which all sizes take the same code path.

    Every map must be at least as large as ``min_dynamic_size`` of the layer that reads it, and no
    output may have a height or width of 1.
    """
    large_enough: list[bool] = []

    def measure(layer: OperatorLayer, inputs: tuple[Tensor, ...]) -> None:
        large_enough.append(min(layer.map_size(inputs[0])) >= layer.min_dynamic_size)

    on_shapes = deepcopy(network).to('meta')
    for layer in on_shapes.modules():
        if isinstance(layer, OperatorLayer):
            layer.register_forward_pre_hook(measure)

    def is_enough(side: int) -> bool:
        large_enough.clear()
        outs = on_shapes(torch.empty(1, 3, side, side, device='meta'))
        return all(large_enough) and all(min(out.shape[2:]) >= 2 for out in outs)

    low, high = 1, 2
    with torch.no_grad():
        while not is_enough(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def export_program(network: nn.Module,
                   fixed_shape: Optional[tuple[int, int]] = None) -> ExportedProgram:
    """Trace a network with torch.export.

    Args:
        network: a network in evaluation mode that takes images (batch, 3, height, width).
        fixed_shape: (height, width) of the only image that the program takes; if None batch, height
            and width are dynamic, the last two from :func:`smallest_side` on.

    Raises:
        UsageError: the network cannot be traced with dynamic sizes.
    """
    if fixed_shape is not None:
        with torch.no_grad():
            return torch.export.export(network, (torch.zeros(1, 3, *fixed_shape),))
    from torch.export import Dim  # since torch 2.2
    side = smallest_side(network)
    # Odd and different: torch.export would keep a condition that holds for the example by chance.
    example = torch.zeros(2, 3, side * 3 // 2 | 1, side * 2 | 1)
    axes = {0: Dim('batch'), 2: Dim('height', min=side), 3: Dim('width', min=side)}
    try:
        with torch.no_grad():
            # Conditions that torch cannot prove become assertions in the program, which ONNX drops.
            program = torch.export.export(with_dynamic_modules(network), (example,),
                                          dynamic_shapes=(axes,),
                                          prefer_deferred_runtime_asserts_over_guards=True)
    except (torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
        raise UsageError(f'{SPECIALISED} torch.export reports: '
                         f'{" ".join(str(error).split()):.300} …') from error
    check_assertions(program, side)
    return program


def check_assertions(program: ExportedProgram, side: int) -> None:
    """Check at many sizes the assertions that torch could not prove.

    Raises:
        UsageError: an assertion fails, so that the program is correct only for some sizes.
    """
    name, = program.graph_signature.user_inputs
    image = next(node.meta['val'] for node in program.graph.nodes if node.name == name)
    symbols = [image.shape[axis].node.expr for axis in (0, 2, 3)]
    assertions = {node.args[0].meta['val'].node.expr for node in program.graph.nodes
                  if node.target is torch.ops.aten._assert_scalar.default}
    draw = Random(0).randrange
    for size in ((1, side, side), *((draw(1, 9), side + draw(999), side + draw(999))
                                    for _ in range(31))):
        given = {symbol: Integer(extent) for symbol, extent in zip(symbols, size)}
        for assertion in assertions:
            if not assertion.xreplace(given):
                raise UsageError(f'{SPECIALISED} For an input of {size[0]} × 3 × {size[1]} × '
                                 f'{size[2]} this does not hold: {assertion}.')


def network_of(cfg: Config, checkpoint: Optional[str], backbone_only: bool) -> nn.Module:
    """Build the network of a config for export, in evaluation mode.

    Args:
        cfg: a segmentation config or, with ``backbone_only``, also a detection config.
        checkpoint: weights of the whole model; for a backbone anything that its ``init_cfg``
            accepts. If None the weights are random.
        backbone_only: return only the backbone.

    Raises:
        UsageError: this network cannot be exported.
        CheckpointError: the checkpoint cannot be read or does not match the model.
    """
    model = build_model(cfg)
    if not isinstance(getattr(model, 'backbone', None), ACmixBackbone):
        names = ', '.join(backbone.__name__ for backbone in BACKBONES.values())
        raise UsageError(f'The config {cfg.filename} has none of the backbones that can be '
                         f'exported: {names}.')
    if backbone_only:
        if checkpoint is not None:
            model.backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
            model.backbone.init_weights()
        return model.backbone
    if getattr(model, 'decode_head', None) is None:
        raise UsageError(f'The config {cfg.filename} is of a detector, whose heads only MMDeploy '
                         'exports; pass --backbone-only to export its backbone.')
    if model.test_cfg.get('mode') == 'slide':
        raise UsageError('This config tests in a sliding window, but an exported model takes whole '
                         'images; to test on whole images, pass --cfg-options '
                         'model.test_cfg.mode=whole.')
    model.auxiliary_head = None
    if checkpoint is not None:
        load_all_weights(model, read_checkpoint(checkpoint), checkpoint)
    return ClassMap(model)


def export_onnx(network: nn.Module, out: str, shape: tuple[int, int], fixed_size: bool) -> str:
    """Export a network to ONNX; the file is kept only if ONNX Runtime computes what torch does.

    Args:
        network: a network from :func:`network_of`.
        out: path of the file.
        shape: (height, width) of the images to verify with; dynamic sizes are verified at two
            further sizes.
        fixed_size: whether the model takes only one image of this size.

    Returns:
        A description of the file.

    Raises:
        UsageError: a package is missing, the directory does not exist, the shape is too small for
            dynamic sizes, or the outputs differ from torch's.
    """
    check_exporter()
    path = file_to_write(out)
    sizes = [(1, *shape)]
    if not fixed_size:
        side = smallest_side(network)
        if min(shape) < side:
            raise UsageError(f'The dynamic sizes of this network begin at {side}×{side}, but the '
                             f'shape is {shape[0]}×{shape[1]}: pass a larger --shape H W, or '
                             '--fixed-size for images of exactly that size.')
        between = (side + shape[0]) // 2 | 1, (side + 2 * shape[1]) // 3 | 1
        sizes += [(2, side, side + 1), (1, *between)]
    print('Tracing with torch.export; this step and the next may take minutes …', flush=True)
    program = export_program(network, shape if fixed_size else None)
    print(f'Translating {len(program.graph.nodes)} graph nodes to ONNX …', flush=True)
    with atomic_write(path) as temporary:
        onnx = translate(program, network, None if fixed_size else side)
        onnx.save(temporary, external_data=False)
        for size in sizes:
            compare_outputs(network, str(temporary), size)
        if isinstance(network, ClassMap):
            # The logits serve only verification.
            onnx.model.graph.outputs.pop()
            onnx.save(temporary, external_data=False)
            compare_outputs(network, str(temporary), sizes[-1])
        description = describe(str(temporary))
    if not fixed_size:
        description += f'\n  height and width from {side} on, batch from 1 on'
    return f'Wrote {path}: {path.stat().st_size / 1e6:.1f} MB, opset {OPSET}\n{description}'


def check_exporter() -> None:
    """Check that torch and the installed packages can export to ONNX.

    Raises:
        UsageError: a package is missing, or torch is too old.
    """
    reason = export_unavailable()
    if reason is not None:
        raise UsageError(f'Export to ONNX {reason}.')


def translate(program: ExportedProgram, network: nn.Module,
              side: Optional[int]) -> 'torch.onnx.ONNXProgram':
    """Translate a traced program to ONNX.

    Args:
        program: the traced program.
        network: the network that was traced.
        side: smallest height and width of dynamic sizes, or None for a fixed size.
    """
    names = ['output', 'logits'] if isinstance(network, ClassMap) else [
        f'feature{index}' for index in range(len(program.graph_signature.user_outputs))]
    with quiet():
        onnx = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=['input'], output_names=names,
            dynamic_shapes=({} if side is None else {0: 'batch', 2: 'height', 3: 'width'},),
            verbose=False)
        if side is not None:
            onnx.model.metadata_props.update(smallest_height=str(side), smallest_width=str(side))
    return onnx


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own internals."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def compare_outputs(network: nn.Module, path: str, size: Sequence[int]) -> None:
    """Compare ONNX Runtime with torch on random images, and print the differences.

    For a class map, the logit of the predicted class is compared with the largest logit: two nearly
    equal logits may be ordered differently.

    Args:
        network: the exported network.
        path: path of the ONNX file.
        size: (batch, height, width).

    Raises:
        UsageError: an output differs by more than ``MAX_RELATIVE_ERROR``.
    """
    batch, height, width = size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    session = open_session(path)
    actual = [torch.from_numpy(each) for each in session.run(None, dict(input=images.numpy()))]
    with torch.no_grad():
        expected = network(images)
    pairs = list(zip(actual, expected))
    if isinstance(network, ClassMap):
        logits = expected[1]
        pairs[0] = logits.gather(1, actual[0]), logits.amax(1, keepdim=True)
    differences = [((each - other).abs().max() / other.abs().max()).item() for each, other in pairs]
    print(f'  {batch} × 3 × {height} × {width}, maximum relative difference: ' + ', '.join(
        f'{output.name} {difference:.1e}'
        for output, difference in zip(session.get_outputs(), differences)), flush=True)
    if not all(difference <= MAX_RELATIVE_ERROR for difference in differences):
        raise UsageError(f'At {height}×{width} the outputs of ONNX Runtime differ from those of '
                         f'torch by more than {MAX_RELATIVE_ERROR:g}; nothing was written.')


def open_session(path: str) -> Any:
    """Open an ONNX file in ONNX Runtime on the CPU."""
    import onnxruntime
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])


def describe(path: str) -> str:
    """Describe the inputs and outputs of an ONNX file: name, type and axes."""
    session = open_session(path)
    return '\n'.join(f'  {each.name}: {each.type} ({", ".join(map(str, each.shape))})'
                     for each in (*session.get_inputs(), *session.get_outputs()))


def normalisation(cfg: Config) -> str:
    """Describe how the input must be normalised."""
    preprocessor = cfg.model.get('data_preprocessor') or {}
    order = 'RGB' if preprocessor.get('bgr_to_rgb') else 'BGR'
    return (f'{order} images with values from 0 to 255, minus {preprocessor.get("mean")}, divided '
            f'by {preprocessor.get("std")}')
