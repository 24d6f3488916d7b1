"""Exporting the network of a config: torch.export, ONNX, and a check against ONNX Runtime."""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib.util import find_spec
from random import Random
from typing import Any, Optional

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmengine.config import Config
from sympy import Integer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from acmix_mm import backbones
from acmix_mm.engine.cli import file_to_write
from acmix_mm.engine.config import build_model
from acmix_mm.engine.runner import load_weights
from acmix_mm.layers.base import OperatorLayer
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError

Size = tuple[int, int]
OPSET = 20
# Largest difference from torch's outputs, over the largest output, with which a file is kept.
TOLERANCE = 1e-3
TIED = ('This network ties itself to the sizes of an example; for pictures of one size pass '
        '--fixed-size and --shape H W.')


class ClassMap(nn.Module):
    """A segmentor as it is deployed: pictures in, the class of each pixel out.

    Maps normalised pictures (batch, 3, height, width) to (batch, 1, height, width), int64, as
    MMDeploy's exports do; and, to be compared, to the logits behind it.
    """

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        self.segmentor = segmentor

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(image)
        return logits.argmax(1, keepdim=True), logits

    def logits(self, image: Tensor) -> Tensor:
        """(batch, classes, height, width), as MMSegmentation's inference on whole pictures."""
        logits = self.segmentor.encode_decode(image, [dict(img_shape=image.shape[2:])])
        if logits.shape[1] > 1:
            return logits
        # One logit for two classes: the second one's, from a threshold of its probability on.
        threshold = torch.tensor(self.segmentor.decode_head.threshold).logit().item()
        return torch.cat([torch.full_like(logits, threshold), logits], 1)


class PadToStrides(nn.Module):
    """Pad (batch, channels, height, width) at its bottom and right to multiples of the strides."""

    def __init__(self, strides: Size, value: float) -> None:
        super().__init__()
        self.strides, self.value = strides, value

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = ((extent + stride - 1) // stride * stride - extent
                         for extent, stride in zip(x.shape[2:], self.strides))
        return F.pad(x, (0, right, 0, bottom), value=self.value)


class AveragesBySize(nn.Module):
    """Adaptive average pooling as two products with small matrices, which are made of the sizes.

    ONNX has no adaptive pooling.
    """

    def __init__(self, output_size: Size) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        down, across = (self.averaging(extent, bins, x) for extent, bins in
                        zip(x.shape[2:], self.output_size))
        return down @ x @ across.T

    @staticmethod
    def averaging(extent: int, bins: int, like: Tensor) -> Tensor:
        """(bins, extent): a row takes the mean of positions ⌊bin · extent / bins⌋ to
        ⌈(bin + 1) · extent / bins⌉, the last excluded.
        """
        index = torch.arange(bins, device=like.device)[:, None]
        start, stop = index * extent // bins, ((index + 1) * extent + bins - 1) // bins
        position = torch.arange(extent, device=like.device)
        inside = (position >= start) & (position < stop)
        return inside.to(like.dtype) / (stop - start)


class WholeUpsample(nn.Module):
    """Interpolation by whole factors."""

    def __init__(self, factors: Size, mode: str, align_corners: Optional[bool]) -> None:
        super().__init__()
        self.factors, self.mode, self.align_corners = factors, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [extent * factor for extent, factor in zip(x.shape[2:], self.factors)]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def traceable(network: nn.Module) -> nn.Module:
    """A copy whose modules leave sizes open.

    Torch's and OpenMMLab's own round sizes in ways that tie torch.export to those of its example.
    """
    copy = deepcopy(network)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            setattr(parent, name, open_sized(child))
    return copy


def open_sized(module: nn.Module) -> nn.Module:
    """What computes the same as ``module`` and leaves sizes open, or ``module`` where it does."""
    if isinstance(module, AdaptivePadding) and (
            module.padding == 'corner' and module.kernel_size == module.stride):
        return PadToStrides(module.stride, 0.)
    if isinstance(module, nn.MaxPool2d):
        kernel, stride, padding = (sides if isinstance(sides, tuple) else (sides, sides) for sides
                                   in (module.kernel_size, module.stride, module.padding))
        # Where it gives ⌈extent / stride⌉ positions, as it does here with whole strides.
        rounds_up = all(side - 2 * pad == (step if module.ceil_mode else 1)
                        for side, step, pad in zip(kernel, stride, padding))
        if rounds_up:
            return nn.Sequential(PadToStrides(stride, -torch.inf),
                                 nn.MaxPool2d(kernel, stride, padding))
    if isinstance(module, nn.AdaptiveAvgPool2d):
        size = module.output_size
        return AveragesBySize(size if isinstance(size, tuple) else (size, size))
    factors = getattr(module, 'scale_factor', None)
    if type(module).__name__ == 'Upsample' and factors is not None:
        factors = factors if isinstance(factors, tuple) else (factors, factors)
        if all(factor == int(factor) for factor in factors):
            return WholeUpsample(tuple(map(int, factors)), module.mode, module.align_corners)
    return module


def smallest_side(network: nn.Module) -> int:
    """Height and width from which on all pictures take the same steps through a network.

    A map is larger than a window (Swin), as large as two cells (PVT), and never a single position.
    """
    suffices = True

    def measure(layer: OperatorLayer, inputs: tuple[Tensor, ...]) -> None:
        nonlocal suffices
        suffices &= min(layer.map_size(inputs[0])) >= layer.min_dynamic_size

    on_shapes = deepcopy(network).to('meta')
    for layer in on_shapes.modules():
        if isinstance(layer, OperatorLayer):
            layer.register_forward_pre_hook(measure)

    def is_enough(side: int) -> bool:
        nonlocal suffices
        suffices = True
        outs = on_shapes(torch.empty(1, 3, side, side, device='meta'))
        return suffices and all(min(out.shape[2:]) >= 2 for out in outs)

    low, high = 1, 2
    with torch.no_grad():
        while not is_enough(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def export_program(network: nn.Module, fixed: Optional[Size] = None) -> ExportedProgram:
    """Trace a network with torch.export, into torch's own operations.

    Args:
        network: in evaluation mode; takes (batch, 3, height, width).
        fixed: (height, width), for one picture of this size; if None batch, height and width are
            open, the last two from :func:`smallest_side` on.

    Raises:
        UsageError: it asks for sizes in a way that cannot be left open.
    """
    if fixed is not None:
        with torch.no_grad():
            return torch.export.export(network, (torch.zeros(1, 3, *fixed),))
    side = smallest_side(network)
    # Odd, unlike, and no multiple of anything: a condition that happens to hold would be kept.
    example = torch.zeros(2, 3, side * 3 // 2 | 1, side * 2 | 1)
    axes = {0: Dim('batch'), 2: Dim('height', min=side), 3: Dim('width', min=side)}
    try:
        with torch.no_grad():
            # Some conditions hold for all sizes, and torch cannot prove it: it writes them into the
            # program, and translations leave them out.
            program = torch.export.export(traceable(network), (example,), dynamic_shapes=(axes,),
                                          prefer_deferred_runtime_asserts_over_guards=True)
    except (torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
        raise UsageError(f'{TIED} torch.export says: {" ".join(str(error).split()):.300} …'
                         ) from error
    check_conditions(program, side)
    return program


def check_conditions(program: ExportedProgram, side: int) -> None:
    """Try the conditions that torch could not prove, at many sizes.

    Raises:
        UsageError: one of them does not hold, and the program is right for some sizes alone.
    """
    name, = program.graph_signature.user_inputs
    image = next(node.meta['val'] for node in program.graph.nodes if node.name == name)
    symbols = [image.shape[axis].node.expr for axis in (0, 2, 3)]
    conditions = {node.args[0].meta['val'].node.expr for node in program.graph.nodes
                  if node.target is torch.ops.aten._assert_scalar.default}
    draw = Random(0).randrange
    for size in ((1, side, side), *((draw(1, 9), side + draw(999), side + draw(999))
                                    for _ in range(31))):
        given = {symbol: Integer(extent) for symbol, extent in zip(symbols, size)}
        for condition in conditions:
            if not condition.xreplace(given):
                raise UsageError(f'{TIED} Of {size[0]} × 3 × {size[1]} × {size[2]} this does not '
                                 f'hold: {condition}.')


def network_of(cfg: Config, checkpoint: Optional[str], backbone_only: bool) -> nn.Module:
    """The network of a config that is to be exported, in evaluation mode.

    Args:
        cfg: a segmentation config, or with ``backbone_only`` also one of detection.
        checkpoint: the trained model; for a backbone alone anything that its ``init_cfg`` takes,
            too. If None the weights are random.
        backbone_only: leave out all but the backbone.

    Raises:
        UsageError: the config is of another kind.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    model = build_model(cfg)
    ours = tuple(getattr(backbones, name) for name in backbones.__all__)
    if not isinstance(getattr(model, 'backbone', None), ours):
        raise UsageError(f'The config {cfg.filename} has none of the backbones '
                         f'{", ".join(backbones.__all__)}, which are what this exports.')
    if backbone_only:
        if checkpoint is not None:
            model.backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
            model.backbone.init_weights()
        return model.backbone
    if getattr(model, 'decode_head', None) is None:
        raise UsageError(f'The config {cfg.filename} is of a detector, whose heads are left to '
                         'MMDeploy; pass --backbone-only for its backbone.')
    if model.test_cfg.get('mode') == 'slide':
        raise UsageError('This config tests in a sliding window, and an export takes whole '
                         'pictures; if they may be whole, pass --cfg-options '
                         'model.test_cfg.mode=whole.')
    model.auxiliary_head = None
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return ClassMap(model)


def export_onnx(network: nn.Module, out: str, shape: Size, fixed_size: bool) -> str:
    """Write a network to an ONNX file, once ONNX Runtime computes there what torch does.

    Args:
        network: see :func:`network_of`.
        out: the file, which is there only if all went well.
        shape: (height, width) of the pictures it is made for; open sizes are checked at two others
            as well.
        fixed_size: whether to take one picture of this size only.

    Returns:
        What was written, in words.

    Raises:
        UsageError: a package is missing, the folder does not exist, the shape is too small for open
            sizes, or the outputs differ from torch's.
    """
    check_exporter()
    path = file_to_write(out)
    sizes = [(1, *shape)]
    if not fixed_size:
        side = smallest_side(network)
        if min(shape) < side:
            raise UsageError(f'Open sizes of this network begin at {side}×{side}, and the shape is '
                             f'{shape[0]}×{shape[1]}: name a larger one with --shape H W, or pass '
                             '--fixed-size for pictures of that size alone.')
        between = (side + shape[0]) // 2 | 1, (side + 2 * shape[1]) // 3 | 1
        sizes += [(2, side, side + 1), (1, *between)]
    print('Tracing with torch.export; this and the next step take minutes …', flush=True)
    program = export_program(network, shape if fixed_size else None)
    print(f'Translating {len(program.graph.nodes)} steps into ONNX …', flush=True)
    with atomic_write(path) as beside:
        onnx = translate(program, network, None if fixed_size else side)
        onnx.save(beside, external_data=False)
        for size in sizes:
            check(network, str(beside), size)
        if isinstance(network, ClassMap):
            # The logits have been compared, and are not part of what is deployed.
            onnx.model.graph.outputs.pop()
            onnx.save(beside, external_data=False)
            check(network, str(beside), sizes[-1])
        described = describe(str(beside))
    if not fixed_size:
        described += f'\n  height and width from {side} on, batch from 1 on'
    return f'Wrote {path}: {path.stat().st_size / 1e6:.1f} MB, opset {OPSET}\n{described}'


def check_exporter() -> None:
    """Raise UsageError unless all that an export to ONNX needs is there."""
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if not find_spec(name)]
    if missing:
        raise UsageError(f'An export to ONNX needs {", ".join(missing)}: run '
                         'pip install onnx onnxruntime onnxscript.')
    if 'prefer_deferred_runtime_asserts_over_guards' not in inspect.signature(
            torch.export.export).parameters:
        raise UsageError(f'An export to ONNX needs a newer torch than {torch.__version__}; it is '
                         'tested with 2.11.')


def translate(program: ExportedProgram, network: nn.Module,
              side: Optional[int]) -> torch.onnx.ONNXProgram:
    """Translate a traced program into ONNX; its sizes are open from ``side`` on, or fixed."""
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
    """Keep to itself what the exporter says of its own workings."""
    logger = logging.getLogger('onnxscript')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def check(network: nn.Module, path: str, size: Sequence[int]) -> None:
    """Compare ONNX Runtime with torch on pictures of (batch, height, width), and print how it went.

    Of a class map the difference is what the class that was chosen lacks to the best logit.

    Raises:
        UsageError: they differ by more than ``TOLERANCE``, relative to the largest output.
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
    print(f'  {batch} × 3 × {height} × {width}, largest relative difference: ' + ', '.join(
        f'{output.name} {difference:.1e}'
        for output, difference in zip(session.get_outputs(), differences)), flush=True)
    if not all(difference <= TOLERANCE for difference in differences):
        raise UsageError(f'At {height}×{width} ONNX Runtime computes something else than torch, by '
                         f'more than {TOLERANCE:g}; nothing was written.')


def open_session(path: str) -> Any:
    """Open a file in ONNX Runtime, on the CPU."""
    import onnxruntime
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])


def describe(path: str) -> str:
    """Inputs and outputs of an ONNX file: name, type and axes."""
    session = open_session(path)
    return '\n'.join(f'  {each.name}: {each.type} ({", ".join(map(str, each.shape))})'
                     for each in (*session.get_inputs(), *session.get_outputs()))


def normalisation(cfg: Config) -> str:
    """How the input has to be normalised, in words."""
    given = cfg.model.get('data_preprocessor') or {}
    order = 'RGB' if given.get('bgr_to_rgb') else 'BGR'
    return (f'{order} pictures of 0 to 255, less {given.get("mean")}, divided by '
            f'{given.get("std")}')
