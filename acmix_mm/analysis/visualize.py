"""Pictures of what a detector or segmentor predicts, and of what its ACmix layers do."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from acmix_mm.analysis.figures import draw_attention, draw_energies, draw_predictions, save
from acmix_mm.analysis.paths import inputs_of, last_layers, path_energies, stride
from acmix_mm.checkpoints.reading import (
    HAS_ALLOW_LIST,
    LOAD_ERRORS,
    allow_mmengine_checkpoints,
    explain_load_error,
    weights_only,
)
from acmix_mm.engine.config import build_model
from acmix_mm.engine.runner import load_all_weights
from acmix_mm.utils.errors import CheckpointError, UsageError


def visualize(cfg: Config, checkpoint: str, images: Sequence[str], out_dir: str,
              point: Optional[tuple[int, int]] = None) -> list[str]:
    """Write pictures of predictions, attention and the energies of both paths.

    For each image ``NAME_predictions.png``; and of the last ACmix layer in each stage of the
    backbone, ``NAME_attention_stage_N.png`` with what the point attends to, and together
    ``NAME_energy.png``. A layer without attention has no picture of it, and one with a single path
    none of energies.

    Args:
        cfg: a detection or segmentation config.
        checkpoint: the weights of all of its model.
        images: paths of pictures.
        out_dir: the folder to write to; made if need be.
        point: x and y in pixels of the image; the centre if None.

    Returns:
        What was written.

    Raises:
        UsageError: a picture cannot be read or the point lies outside, two have one name, the
            backbone has no ACmix layer, or the folder cannot be made.
        CheckpointError: the checkpoint cannot be read or is of another network.
    """
    names = [Path(image).stem for image in images]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f'Two pictures are called {name}, and so would be what is written of '
                             'them; name them in two runs with another --out-dir each.')
    pictures = [read_picture(image) for image in images]
    points = [inside(image, picture, point) for image, picture in zip(images, pictures)]
    model = load_model(cfg, checkpoint)
    stages = last_layers(model.backbone)
    if not stages:
        raise UsageError(f'The backbone of {cfg.filename} has no ACmix layer to look into; '
                         'tools/test.py --show-dir draws the predictions of any model.')
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'The folder {out_dir} cannot be made ({error.strerror}).') from error

    written = []
    for image, name, picture, where in zip(images, names, pictures, points):
        result, batch = predict(cfg, model, image)
        figures = dict(predictions=prediction_figure(cfg, model, picture, result))
        seen = Seen(model.backbone, stages, batch, picture, result.metainfo)
        figures.update(seen.attention_figures(where))
        figures.update(seen.energy_figure())
        for kind, figure in figures.items():
            written.append(str(Path(out_dir, f'{name}_{kind}.png')))
            save(figure, written[-1])
    return written


def read_picture(image: str) -> np.ndarray:
    """Read a picture, (height, width, 3), RGB, uint8.

    Raises:
        UsageError: it is missing or no picture.
    """
    if not Path(image).is_file():
        raise UsageError(f'The picture {image} does not exist; check the path.')
    try:
        return mmcv.imread(image, channel_order='rgb')
    except cv2.error as error:
        raise UsageError(f'The file {image} is not a picture that OpenCV can read.') from error


def inside(image: str, picture: np.ndarray, point: Optional[tuple[int, int]]) -> tuple[int, int]:
    """The point, or the centre of the picture.

    Raises:
        UsageError: it lies outside.
    """
    height, width = picture.shape[:2]
    if point is None:
        return width // 2, height // 2
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise UsageError(f'--point {point[0]} {point[1]} lies outside of {image}, which is {width} '
                         f'pixels wide and {height} high.')
    return point


def load_model(cfg: Config, checkpoint: str) -> nn.Module:
    """The model of a config with the weights of a checkpoint, which is read as data.

    Raises:
        CheckpointError: it cannot be read, is of another network, or has no class names.
    """
    allow_mmengine_checkpoints()
    with weights_only() if HAS_ALLOW_LIST else contextlib.nullcontext():
        try:
            found = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        except LOAD_ERRORS as error:
            raise CheckpointError(explain_load_error(checkpoint, error)) from error
    if 'dataset_meta' not in found.get('meta', {}):
        raise CheckpointError(f'The checkpoint {checkpoint} does not say the names of its classes '
                              '(meta.dataset_meta), as those of tools/train.py do.')
    model = build_model(cfg)
    load_all_weights(model, found, checkpoint)
    # From these the functions for inference of MMDetection and MMSegmentation take the rest.
    model.cfg, model.dataset_meta = cfg, found['meta']['dataset_meta']
    return model.to('cuda:0' if torch.cuda.is_available() else 'cpu')


def predict(cfg: Config, model: nn.Module, image: str) -> tuple[Any, Tensor]:
    """The prediction for a picture, and what the model was given, (1, 3, height, width)."""
    if cfg.get('default_scope') == 'mmseg':
        from mmseg.apis import inference_model as infer
    else:
        from mmdet.apis import inference_detector as infer
    batches = []
    hook = model.data_preprocessor.register_forward_hook(
        lambda _, arguments, output: batches.append(output['inputs']))
    try:
        return infer(model, image), batches[0]
    finally:
        hook.remove()


def prediction_figure(cfg: Config, model: nn.Module, picture: np.ndarray, result: Any) -> Any:
    """Predictions as the config's visualizer draws them, the picture beside."""
    visualizer = VISUALIZERS.build({**cfg.visualizer, 'vis_backends': None})
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample('predictions', picture, result, draw_gt=False)
    classes, palette = (model.dataset_meta.get(key) for key in ('classes', 'palette'))
    if 'pred_sem_seg' in result:
        labels, title = result.pred_sem_seg.data, 'predicted classes'
    else:
        # Those that MMDetection's visualizer draws.
        labels = result.pred_instances.labels[result.pred_instances.scores > 0.3]
        title = f'{len(labels) or "no"} predictions with a score above 30 %'
    legend = {} if isinstance(palette, str) else {
        classes[label]: palette[label] for label in labels.unique().tolist()}
    return draw_predictions(picture, visualizer.get_image(), title, legend)


class Layer(NamedTuple):
    """The last ACmix layer of a stage, what it took, and where its positions lie in the picture."""

    name: str
    module: nn.Module
    x: Tensor
    stride: int


class Seen:
    """What the last ACmix layers of all stages did with one picture.

    Args:
        backbone: has the layers.
        stages: their names, by those of the stages.
        batch: what the model was given, (1, 3, height, width).
        picture: the picture as it was, (height, width, 3).
        metainfo: says what size it was resized to.
    """

    def __init__(self, backbone: nn.Module, stages: dict[str, str], batch: Tensor,
                 picture: np.ndarray, metainfo: dict) -> None:
        modules = {stage: backbone.get_submodule(name) for stage, name in stages.items()}
        inputs = inputs_of(backbone, modules, lambda: backbone(batch))
        self.picture = picture
        # A mixing layer behind the last output is not run.
        self.layers = {
            stage: Layer(stages[stage], modules[stage], x,
                         stride(batch.shape[2:], modules[stage].map_size(x)))
            for stage, x in inputs.items()}
        self.scale = [given / own for given, own in zip(metainfo['img_shape'][1::-1],
                                                        picture.shape[1::-1])]

    def spacing(self, pixels: int) -> tuple[float, float]:
        """Pixels of the picture, along x and y, that are ``pixels`` of what the model was given."""
        return tuple(pixels / scale for scale in self.scale)

    def attention_figures(self, point: tuple[int, int]) -> dict[str, Any]:
        """A figure for each stage whose layer attends."""
        figures = {}
        for stage, layer in self.layers.items():
            if not layer.module.attends:
                continue
            size = layer.module.map_size(layer.x)
            column, row = (min(int((place + 0.5) * scale / layer.stride), extent - 1)
                           for place, scale, extent in zip(point, self.scale, size[::-1]))
            attention = layer.module.attention_of_point(layer.x, row, column)
            figures[f'attention_{stage.replace(" ", "_")}'] = draw_attention(
                self.picture, point, attention, self.spacing(layer.stride * attention.cell),
                f'Attention of one point in {stage} ({layer.name})')
        return figures

    def energy_figure(self) -> dict[str, Any]:
        """The figure of all stages whose layers have both paths, or nothing."""
        energies, spacings = {}, {}
        for stage, layer in self.layers.items():
            if layer.module.mix != 'acmix':
                continue
            energies[stage] = path_energies(layer.module, layer.x).cpu().numpy()
            step = getattr(layer.module, 'stride', (1, 1))[0]
            spacings[stage] = self.spacing(layer.stride * step)
        if not energies:
            return {}
        return dict(energy=draw_energies(
            self.picture, energies, spacings,
            'What either path adds to the output of the last layer of each stage'))
