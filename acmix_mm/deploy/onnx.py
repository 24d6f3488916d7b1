"""Exporting the model of a config to ONNX, verified with ONNX Runtime."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from random import Random
from typing import TYPE_CHECKING, Any, Optional

import sympy
import torch
import torch.fx.experimental._config
from mmengine.config import Config
from sympy import Integer
from torch import Tensor, nn
from torch.export import ExportedProgram

from acmix_mm.backbones.base import BACKBONES, ACmixBackbone
from acmix_mm.checkpoints.reading import read_checkpoint
from acmix_mm.deploy.dynamic_modules import with_dynamic_modules
from acmix_mm.deploy.preprocessing import (
    Preprocessing,
    add_padding,
    add_preprocessing,
    check_preprocessing,
    check_whole_images,
    preprocessing_of,
    resized_shape,
)
from acmix_mm.deploy.quantization import CalibrationImages, quantize
from acmix_mm.engine.config import build_model, classes_of, dataset_configs
from acmix_mm.engine.runner import load_all_weights
from acmix_mm.environment import export_unavailable
from acmix_mm.layers.base import OperatorLayer
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.output_paths import file_to_write

if TYPE_CHECKING:
    import onnx_ir

OPSET = 20
# A file is kept only if no output differs from torch's by more, relative to the largest value.
MAX_RELATIVE_ERROR = 1e-3
# Of the confident detections. Rounding may decide which of two boxes suppresses the other.
MIN_MATCHING = 0.98
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


def smallest_side(network: nn.Module) -> int:
    """Return the smallest image height and width from which all sizes take the same code path.

    Every map must be at least as large as ``min_dynamic_size`` of the layer that reads it, and no
    output of the backbone may have a height or width of 1. Detectors read padded images, whose
    sides are multiples of their ``step``.
    """
    step = getattr(network, 'step', 1)
    backbone = network.detector.backbone if is_detector(network) else network
    large_enough: list[bool] = []

    def measure(layer: OperatorLayer, inputs: tuple[Tensor, ...]) -> None:
        large_enough.append(min(layer.map_size(inputs[0])) >= layer.min_dynamic_size)

    # Of detectors only, sizes of one, here the number of windows, are not special to the tracer.
    on_shapes = (with_dynamic_modules(backbone) if is_detector(network) else deepcopy(backbone)).to(
        'meta')
    for layer in on_shapes.modules():
        if isinstance(layer, OperatorLayer):
            layer.register_forward_pre_hook(measure)

    def is_enough(steps: int) -> bool:
        large_enough.clear()
        outs = on_shapes(torch.empty(1, 3, steps * step, steps * step, device='meta'))
        return all(large_enough) and all(min(out.shape[2:]) >= 2 for out in outs)

    low, high = 1, 2
    with torch.no_grad():
        while not is_enough(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high * step


def is_detector(network: nn.Module) -> bool:
    """Whether a network is one of :mod:`acmix_mm.deploy.detectors`, which need MMDetection."""
    return hasattr(network, 'detector')


def inputs_of(network: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The inputs of a network: images and, for a detector, which divides them, their size."""
    if not is_detector(network):
        return (images,)
    divided = images.unflatten(2, (-1, network.step)).unflatten(4, (-1, network.step))
    return divided, torch.tensor(images.shape[2:])


def export_program(network: nn.Module,
                   fixed_shape: Optional[tuple[int, int]] = None) -> ExportedProgram:
    """Trace a network with torch.export.

    Args:
        network: a network in evaluation mode that takes images (batch, 3, height, width); a
            detector also takes their size without padding, (2,).
        fixed_shape: (height, width) of the only image that the program takes; if None height and
            width are dynamic, from :func:`smallest_side` on, and so is the batch but for detectors.

    Raises:
        UsageError: the network cannot be traced with dynamic sizes.
    """
    if fixed_shape is not None:
        with torch.no_grad():
            return torch.export.export(network, inputs_of(network, torch.zeros(1, 3, *fixed_shape)))
    from torch.export import Dim  # since torch 2.2
    side, step = smallest_side(network), getattr(network, 'step', 1)
    # Odd and different: torch.export would keep a condition that holds for the example by chance.
    height, width = ((steps | 1) * step for steps in (side // step * 3 // 2, side // step * 2))
    first, second = Dim('height', min=side // step), Dim('width', min=side // step)
    if is_detector(network):
        axes = ({2: first, 4: second}, None)
    else:
        axes = ({0: Dim('batch'), 2: first, 3: second},)
    batch = 1 if is_detector(network) else 2
    inputs = inputs_of(network, torch.zeros(batch, 3, height, width))
    # Otherwise no map of a detector could have a single position.
    allow_single = torch.fx.experimental._config.patch(backed_size_oblivious=is_detector(network))
    try:
        with torch.no_grad(), allow_single:
            # Conditions that torch cannot prove become assertions in the program, which ONNX drops.
            program = torch.export.export(with_dynamic_modules(network), inputs,
                                          dynamic_shapes=axes,
                                          prefer_deferred_runtime_asserts_over_guards=True)
    except (torch._dynamo.exc.UserError, RuntimeError, ValueError) as error:
        raise UsageError(f'{SPECIALISED} torch.export reports: '
                         f'{" ".join(str(error).split()):.300} …') from error
    check_assertions(program, side, step)
    return program


def check_assertions(program: ExportedProgram, side: int, step: int = 1) -> None:
    """Check at many sizes the assertions that torch could not prove.

    Those on the number of boxes hold by construction.

    Args:
        program: the traced program.
        side: the smallest height and width.
        step: heights and widths are multiples of this.

    Raises:
        UsageError: an assertion fails, so that the program is correct only for some sizes.
    """
    name = program.graph_signature.user_inputs[0]
    image = next(node.meta['val'] for node in program.graph.nodes if node.name == name)
    # A detector divides its images into steps.
    sides = image.shape[2::2] if image.dim() == 6 else image.shape[2:]
    assertions = {node.args[0].meta['val'].node.expr for node in program.graph.nodes
                  if node.target is torch.ops.aten._assert_scalar.default}
    if step > 1:
        # On smaller images, the coarsest maps of a detector have one position. That this is assumed
        # not to be so concerns their strides only. The outputs there are compared later.
        side += 4 * step
    draw = Random(0).randrange
    for size in ((1, side, side), *((draw(1, 9), side + step * draw(999), side + step * draw(999))
                                    for _ in range(31))):
        given = {dim.node.expr: Integer(extent // factor)
                 for extent, dim, factor in zip(size, (image.shape[0], *sides[:2]), (1, step, step))
                 if isinstance(dim, torch.SymInt)}
        for assertion in assertions:
            if assertion.xreplace(given) == sympy.false:
                raise UsageError(f'{SPECIALISED} For an input of {size[0]} × 3 × {size[1]} × '
                                 f'{size[2]} this does not hold: {assertion}.')


def network_of(cfg: Config, checkpoint: Optional[str], backbone_only: bool) -> nn.Module:
    """Build the network of a config for export, in evaluation mode.

    Args:
        cfg: a segmentation or detection config.
        checkpoint: weights of the whole model; for a backbone anything that its ``init_cfg``
            accepts. If None the weights are random.
        backbone_only: return only the backbone.

    Raises:
        UsageError: this network cannot be exported.
        CheckpointError: the checkpoint cannot be read or does not match the model.
    """
    is_segmentor = 'decode_head' in (cfg.get('model') or {})
    if not is_segmentor and not backbone_only and cfg.get('model'):
        from acmix_mm.deploy.detectors import KINDS, check_detector
        check_detector(cfg)
    if is_segmentor and not backbone_only:
        check_whole_images(cfg)
    model = build_model(cfg)
    if (backbone_only or is_segmentor) and not isinstance(getattr(model, 'backbone', None),
                                                          ACmixBackbone):
        names = ', '.join(backbone.__name__ for backbone in BACKBONES.values())
        raise UsageError(f'The config {cfg.filename} has none of the backbones that can be '
                         f'exported: {names}.')
    if backbone_only:
        if checkpoint is not None:
            model.backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
            model.backbone.init_weights()
        return model.backbone
    if is_segmentor:
        model.auxiliary_head = None
    if checkpoint is not None:
        load_all_weights(model, read_checkpoint(checkpoint), checkpoint)
    return ClassMap(model) if is_segmentor else KINDS[type_name(cfg.model.type)](model).eval()


def export_onnx(network: nn.Module, out: str, shape: tuple[int, int], fixed_size: bool,
                cfg: Optional[Config] = None, with_preprocessing: bool = False,
                int8_images: Optional[int] = None) -> str:
    """Export a network to ONNX; the file is kept only if ONNX Runtime computes what torch does.

    Args:
        network: a network from :func:`network_of`.
        out: path of the file.
        shape: (height, width) of the images to verify with; dynamic sizes are verified at two
            further sizes.
        fixed_size: whether the model takes only one image of this size.
        cfg: the network's config; its classes and preprocessing are written into the metadata.
            Detectors need it.
        with_preprocessing: whether a detector takes raw images.
        int8_images: quantise the verified file to 8 bits, calibrated on this many images of the
            training set of ``cfg``.

    Returns:
        A description of the file.

    Raises:
        UsageError: a package is missing, the directory does not exist, the shape is too small for
            dynamic sizes, the preprocessing cannot be exported, or the outputs differ from torch's.
    """
    check_exporter()
    path = file_to_write(out)
    steps = None if cfg is None else preprocessing_of(cfg)
    if with_preprocessing:
        if not is_detector(network):
            raise UsageError('--with-preprocessing is for detectors.')
        assert steps is not None
        check_preprocessing(steps)
    images = None
    if int8_images is not None:
        images = CalibrationImages(cfg, int8_images, with_preprocessing)
    step = getattr(network, 'step', 1)
    given = shape
    if is_detector(network):
        assert steps is not None
        check_divisor(steps, step)
        if with_preprocessing and fixed_size:
            shape = resized_shape(steps, shape)
    side = 1 if fixed_size else smallest_side(network)
    input_shape = shape
    # The graph of a detector pads its images.
    shape = padded(shape, step, side if step > 1 else 1)
    if min(shape) < side:
        raise UsageError(f'The dynamic sizes of this network begin at {side}×{side}, but the '
                         f'shape is {shape[0]}×{shape[1]}: pass a larger --shape H W, or '
                         '--fixed-size for images of exactly that size.')
    sizes = [(1, *shape)]
    if not fixed_size and is_detector(network):
        sizes += [(1, side, side), (1, shape[0] + step, shape[1] + 2 * step)]
    elif not fixed_size:
        between = (side + shape[0]) // 2 | 1, (side + 2 * shape[1]) // 3 | 1
        sizes += [(2, side, side + 1), (1, *between)]
    print('Tracing with torch.export; this step and the next may take minutes …', flush=True)
    program = export_program(network, shape if fixed_size else None)
    print(f'Translating {len(program.graph.nodes)} graph nodes to ONNX …', flush=True)
    with atomic_write(path) as temporary:
        onnx = translate(program, network, fixed_size)
        onnx.save(temporary, external_data=False)
        for size in sizes:
            compare_outputs(network, str(temporary), size)
        if output_names(network):
            del onnx.model.graph.outputs[len(output_names(network)):]
        if is_detector(network):
            add_padding(onnx.model, steps, step, side, input_shape if fixed_size else None)
            for output in onnx.model.graph.outputs:
                output.shape[0] = 'detections'
        if with_preprocessing:
            add_preprocessing(onnx.model, steps, given if fixed_size else None)
        onnx.model.metadata_props.update(metadata(cfg, network, steps, with_preprocessing, side))
        forget_shapes(onnx.model)
        onnx.save(temporary, external_data=False)
        if images is not None:
            print(f'Quantising to 8 bits, calibrated on {len(images)} images …', flush=True)
            quantize(str(temporary), images)
        run_once(str(temporary), given)
        description = describe(str(temporary))
    if not fixed_size and step == 1:
        description += f'\n  height and width from {side} on, batch from 1 on'
    return f'Wrote {path}: {path.stat().st_size / 1e6:.1f} MB, opset {OPSET}\n{description}'


def padded(shape: Sequence[int], step: int, smallest: int) -> tuple[int, int]:
    """Round a shape up to multiples of ``step``, from ``smallest`` on."""
    height, width = (max(-(-extent // step) * step, smallest) for extent in shape)
    return height, width


def check_divisor(steps: Preprocessing, step: int) -> None:
    """Check that a config pads images to whole steps.

    Raises:
        UsageError: it does not.
    """
    if steps.pad_size_divisor % step and steps.pad is None:
        raise UsageError(f'The config pads images to multiples of {steps.pad_size_divisor}, but an '
                         f'exported detector to those of {step}: pass --cfg-options '
                         f'model.data_preprocessor.pad_size_divisor={step}.')


def check_exporter() -> None:
    """Check that torch and the installed packages can export to ONNX.

    Raises:
        UsageError: a package is missing, or torch is too old.
    """
    reason = export_unavailable()
    if reason is not None:
        raise UsageError(f'Export to ONNX {reason}.')


def translate(program: ExportedProgram, network: nn.Module,
              fixed_size: bool) -> 'torch.onnx.ONNXProgram':
    """Translate a traced program to ONNX.

    Args:
        program: the traced program; loses its assertions.
        network: the network that was traced.
        fixed_size: whether the program has been traced for a fixed size.
    """
    # The bounds in assertions on the number of boxes exceed ONNX's integers.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    names = output_names(network)
    features = len(program.graph_signature.user_outputs) - len(names)
    further = ['logits'] if isinstance(network, ClassMap) else [
        f'feature{index}' for index in range(features)]
    detects = is_detector(network)
    axes = {} if fixed_size or detects else {0: 'batch', 2: 'height', 3: 'width'}
    with quiet():
        onnx = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, output_names=[*names, *further],
            input_names=['image', 'size'] if detects else ['input'],
            dynamic_shapes=(axes,) if axes else None, verbose=False, optimize=False)
        simplify(onnx.model)
    return onnx


def simplify(model: 'onnx_ir.Model') -> None:
    """Fold constants and remove what is unused or computed twice.

    These are the passes of torch's exporter except for its rewriting of patterns, which takes time
    quadratic in the number of nodes. ONNX Runtime merges the same patterns when it opens a file.
    """
    from onnx_ir import passes
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir
    passes.Sequential(common.InlinePass(), common.RemoveUnusedNodesPass())(model)
    fold_constants_ir(model, onnx_shape_inference=True)
    passes.Sequential(
        common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(), common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(), common.OutputFixPass(), common.NameFixPass(),
        # The exporter's notes on each node, stack traces with the paths of this machine included.
        common.ClearMetadataAndDocStringPass(),
    )(model)


def forget_shapes(model: 'onnx_ir.Model') -> None:
    """Remove the types and shapes of all values between inputs and outputs.

    ONNX Runtime would plan to reuse the memory of a tensor for later ones of the same shape, and
    keep it until then, so that all shapes of a stage are in memory at once.
    """
    values = list(model.graph.initializers.values())
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
    for value in values:
        if not value.is_graph_output():
            value.type = value.shape = None
            value.metadata_props.clear()


def output_names(network: nn.Module) -> list[str]:
    """The names of the outputs of a segmentor or a detector, without those for verification."""
    if is_detector(network):
        return network.output_names
    return ['output'] if isinstance(network, ClassMap) else []


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
    equal logits may be ordered differently. So may nearly equal scores of a detector, whose feature
    maps are compared, and whose confident detections must match.

    Args:
        network: the exported network.
        path: path of the ONNX file.
        size: (batch, height, width).

    Raises:
        UsageError: an output differs by more than ``MAX_RELATIVE_ERROR``, or detections differ.
    """
    batch, height, width = size
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    session = open_session(path)
    inputs = inputs_of(network, images)
    given = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), inputs)}
    actual = [torch.from_numpy(each) for each in session.run(None, given)]
    names = [each.name for each in session.get_outputs()]
    with torch.no_grad():
        expected = network(*inputs)
    matched = ''
    if is_detector(network):
        pairs = list(zip(actual, expected))[len(output_names(network)):]
        names = names[len(output_names(network)):]
        found, total = matching_detections(actual, expected)
        matched = f'; {found} of {total} confident detections match'
    else:
        pairs = list(zip(actual, expected))
        found = total = 0
    if isinstance(network, ClassMap):
        logits = expected[1]
        pairs[0] = logits.gather(1, actual[0]), logits.amax(1, keepdim=True)
    differences = [((each - other).abs().max() / other.abs().max()).item() for each, other in pairs]
    print(f'  {batch} × 3 × {height} × {width}, maximum relative difference: ' + ', '.join(
        f'{name} {difference:.1e}' for name, difference in zip(names, differences)) + matched,
        flush=True)
    if not all(difference <= MAX_RELATIVE_ERROR for difference in differences):
        raise UsageError(f'At {height}×{width} the outputs of ONNX Runtime differ from those of '
                         f'torch by more than {MAX_RELATIVE_ERROR:g}; nothing was written.')
    if found < MIN_MATCHING * total:
        raise UsageError(f'At {height}×{width} the detections of ONNX Runtime differ from those of '
                         'torch; nothing was written.')


def matching_detections(actual: Sequence[Tensor], expected: Sequence[Tensor],
                        min_score: float = 0.3, tolerance: float = 0.1) -> tuple[int, int]:
    """Count the detections that one of another set equals.

    Args:
        actual: boxes (n, 4), scores (n,) and labels (n,).
        expected: the same of the other set.
        min_score: detections of ``expected`` with lower scores are not counted.
        tolerance: by how many pixels a coordinate may differ.

    Returns:
        The number of detections in ``expected`` that have an equal one, and how many there are.
    """
    boxes, _, labels = actual[:3]
    confident = expected[1] > min_score
    differences = (expected[0][confident][:, None] - boxes).abs().amax(2)
    is_equal = (differences <= tolerance) & (expected[2][confident][:, None] == labels)
    return int(is_equal.any(1).sum()), int(confident.sum())


def metadata(cfg: Optional[Config], network: nn.Module, steps: Optional[Preprocessing],
             with_preprocessing: bool, side: int) -> dict[str, str]:
    """The metadata of an exported file, as texts; classes and preprocessing are JSON.

    Args:
        cfg: the config, if known.
        network: the exported network.
        steps: the config's preprocessing, if known.
        with_preprocessing: whether it is part of the graph.
        side: smallest height and width of dynamic sizes.
    """
    entries = dict(smallest_height=str(side), smallest_width=str(side))
    if cfg is None or steps is None:
        return entries
    classes = next((classes_of(dataset, cfg.get('default_scope'))
                    for dataset in dataset_configs(cfg, ('test',))), None)
    entries['classes'] = json.dumps(classes and list(classes))
    entries['preprocessing'] = json.dumps(dict(steps._asdict(), in_graph=with_preprocessing))
    if 'masks' in output_names(network):
        entries['mask_threshold'] = str(network.detector.roi_head.test_cfg.mask_thr_binary)
    return entries


def open_session(path: str) -> Any:
    """Open an ONNX file in ONNX Runtime on the CPU."""
    import onnxruntime
    return onnxruntime.InferenceSession(path, session_options(),
                                        providers=['CPUExecutionProvider'])


def session_options() -> Any:
    """Options of ONNX Runtime for images of several sizes, some of them repeated."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    # Otherwise, the second image of a size takes memory of its own.
    options.enable_mem_pattern = False
    return options


def run_once(path: str, shape: tuple[int, int]) -> None:
    """Run the finished file, which has changed since it was compared with torch."""
    session = open_session(path)
    given, = session.get_inputs()
    image = torch.zeros((*shape, 3), dtype=torch.uint8) if 'uint8' in given.type else torch.zeros(
        1, 3, *shape)
    session.run(None, {given.name: image.numpy()})


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
