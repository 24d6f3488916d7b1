"""Figures of a detector's or segmentor's predictions, and of its ACmix layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from acmix_mm.analysis.figures import draw_attention, draw_energies, draw_predictions, save
from acmix_mm.analysis.paths import inputs_of, last_layers, path_energies, stride
from acmix_mm.checkpoints.reading import read_checkpoint
from acmix_mm.engine.config import build_model
from acmix_mm.engine.runner import load_all_weights
from acmix_mm.layers.base import TwoPathLayer
from acmix_mm.utils.errors import CheckpointError, UsageError
from acmix_mm.utils.output_paths import folder_to_write

# Detections below this score are not drawn: the default of MMDetection's visualizer.
SCORE_THRESHOLD = 0.3


def visualize(cfg: Config, checkpoint: str, images: Sequence[str], out_dir: str,
              point: Optional[Sequence[int]] = None) -> list[str]:
    """Write figures of predictions, attention and path energies.

    Writes ``NAME_predictions.png`` for each image. For the last ACmix layer in each stage of the
    backbone, it also writes ``NAME_attention_stage_N.png`` if the layer has attention, and a
    joint ``NAME_energy.png`` of the layers that have both paths.

    Args:
        cfg: a detection or segmentation config.
        checkpoint: weights of the whole model.
        images: paths of the images.
        out_dir: output folder, created if necessary.
        point: (x, y) of the attention query in pixels of the image; the centre if None.

    Returns:
        The paths of the written files.

    Raises:
        UsageError: an image cannot be read, the point lies outside an image, two images have the
            same name, the backbone has no ACmix layer, or the folder cannot be created.
        CheckpointError: the checkpoint cannot be read or belongs to another network.
    """
    names = [Path(path).stem for path in images]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f'Two images are called {name}, and their figures would overwrite '
                             'each other; run the tool once for each, with different --out-dir.')
    folder_to_write(out_dir)
    pixels = [read_image(path) for path in images]
    points = [query_point(path, image, point) for path, image in zip(images, pixels)]
    model = load_model(cfg, checkpoint)
    stages = last_layers(model.backbone)
    if not stages:
        raise UsageError(f'The backbone of {cfg.filename} has no ACmix layer to visualize; '
                         'tools/test.py --show-dir draws the predictions of any model.')
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    written = []
    for path, name, image, query in zip(images, names, pixels, points):
        result, batch = run_inference(cfg, model, path)
        layers = StageLayers(model.backbone, stages, batch, image, result.metainfo)
        figures = dict(predictions=prediction_figure(cfg, model, image, result),
                       **layers.attention_figures(query), **layers.energy_figure())
        for kind, figure in figures.items():
            written.append(str(Path(out_dir, f'{name}_{kind}.png')))
            save(figure, written[-1])
    return written


def read_image(path: str) -> np.ndarray:
    """Read an image as (height, width, 3), RGB, uint8.

    Raises:
        UsageError: the file does not exist or is not an image.
    """
    if not Path(path).is_file():
        raise UsageError(f'The image {path} does not exist; check the path.')
    try:
        return mmcv.imread(path, channel_order='rgb')
    except cv2.error as error:
        raise UsageError(f'The file {path} is not an image that OpenCV can read.') from error


def query_point(path: str, image: np.ndarray, point: Optional[Sequence[int]]) -> tuple[int, int]:
    """Return the point as (x, y), by default the centre of the image.

    Raises:
        UsageError: the point lies outside the image.
    """
    height, width = image.shape[:2]
    if point is None:
        return width // 2, height // 2
    x, y = point
    if not (0 <= x < width and 0 <= y < height):
        raise UsageError(f'--point {x} {y} lies outside {path}, which is {width} pixels wide and '
                         f'{height} pixels high.')
    return x, y


def load_model(cfg: Config, checkpoint: str) -> nn.Module:
    """Build the model of a config and load a checkpoint into it, on a GPU if there is one.

    Raises:
        CheckpointError: the checkpoint cannot be read, belongs to another network, or has no class
            names.
    """
    found = read_checkpoint(checkpoint)
    meta = found.get('meta') if isinstance(found, Mapping) else None
    if not isinstance(meta, Mapping) or 'dataset_meta' not in meta:
        raise CheckpointError(f'The checkpoint {checkpoint} has no class names '
                              '(meta.dataset_meta); use one written by tools/train.py.')
    model = build_model(cfg)
    load_all_weights(model, found, checkpoint)
    # The inference functions of MMDetection and MMSegmentation read these attributes.
    model.cfg, model.dataset_meta = cfg, meta['dataset_meta']
    return model.to('cuda:0' if torch.cuda.is_available() else 'cpu')


def run_inference(cfg: Config, model: nn.Module, path: str) -> tuple[BaseDataElement, Tensor]:
    """Return the prediction for an image, and the model's input, (1, 3, height, width)."""
    if cfg.get('default_scope') == 'mmseg':
        from mmseg.apis import inference_model as infer
    else:
        from mmdet.apis import inference_detector as infer
    batches = []
    hook = model.data_preprocessor.register_forward_hook(
        lambda _, arguments, output: batches.append(output['inputs']))
    try:
        return infer(model, path), batches[0]
    finally:
        hook.remove()


def prediction_figure(cfg: Config, model: nn.Module, image: np.ndarray,
                      result: BaseDataElement) -> Figure:
    """Show an image next to the predictions, as drawn by the config's visualizer."""
    visualizer = VISUALIZERS.build({**cfg.visualizer, 'vis_backends': None})
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample('predictions', image, result, draw_gt=False)
    classes, palette = (model.dataset_meta.get(key) for key in ('classes', 'palette'))
    if 'pred_sem_seg' in result:
        labels, title = result.pred_sem_seg.data, 'predicted classes'
    else:
        labels = result.pred_instances.labels[result.pred_instances.scores > SCORE_THRESHOLD]
        title = f'{len(labels) or "no"} predictions with a score above {SCORE_THRESHOLD}'
    legend = {} if isinstance(palette, str) else {
        classes[label]: palette[label] for label in labels.unique().tolist()}
    return draw_predictions(image, visualizer.get_image(), title, legend)


class StageLayer(NamedTuple):
    """The last ACmix layer of a stage.

    Attributes:
        name: name of the layer in the backbone.
        module: the layer.
        x: input of the layer for one image.
        stride: distance between neighbouring positions of ``x``, in pixels of the model's input.
    """

    name: str
    module: TwoPathLayer
    x: Tensor
    stride: int


class StageLayers:
    """The last ACmix layer of each stage and its input, for one image.

    Args:
        backbone: contains the layers.
        stages: names of the layers by the names of their stages.
        batch: the model's input, (1, 3, height, width).
        image: the original image, (height, width, 3).
        metainfo: MMEngine's meta information of the image; ``img_shape`` is its size after
            resizing, before padding.
    """

    def __init__(self, backbone: nn.Module, stages: dict[str, str], batch: Tensor,
                 image: np.ndarray, metainfo: dict) -> None:
        modules = {stage: backbone.get_submodule(name) for stage, name in stages.items()}
        # A layer behind the last output of the backbone does not run, and has no input.
        inputs = inputs_of(backbone, modules, lambda: backbone(batch))
        self.image = image
        self.input_size = batch.shape[2:]
        self.layers = {
            stage: StageLayer(stages[stage], modules[stage], x,
                              stride(self.input_size, modules[stage].map_size(x)))
            for stage, x in inputs.items()}
        self.scale = [resized / original for resized, original in zip(
            metainfo['img_shape'][1::-1], image.shape[1::-1])]

    def spacing(self, pixels: int) -> tuple[float, float]:
        """Convert a distance in the model's input to pixels of the image along x and y."""
        return tuple(pixels / scale for scale in self.scale)

    def attention_figures(self, point: tuple[int, int]) -> dict[str, Figure]:
        """Draw the attention of one point in each stage whose layer has attention."""
        figures = {}
        for stage, layer in self.layers.items():
            if not layer.module.attends:
                continue
            size = layer.module.map_size(layer.x)
            column, row = (min(int((place + 0.5) * scale / layer.stride), extent - 1)
                           for place, scale, extent in zip(point, self.scale, size[::-1]))
            attention = layer.module.attention_of_point(layer.x, row, column)
            figures[f'attention_{stage.replace(" ", "_")}'] = draw_attention(
                self.image, point, attention, self.spacing(layer.stride * attention.cell),
                f'Attention of one point in {stage} ({layer.name})')
        return figures

    def energy_figure(self) -> dict[str, Figure]:
        """Draw the path energies of the layers that have both paths; empty if there are none."""
        energies, spacings = {}, {}
        for stage, layer in self.layers.items():
            if layer.module.mix != 'acmix':
                continue
            energies[stage] = path_energies(layer.module, layer.x).cpu().numpy()
            # The layer itself may have a stride.
            spacings[stage] = self.spacing(stride(self.input_size, energies[stage].shape[1:]))
        if not energies:
            return {}
        return dict(energy=draw_energies(
            self.image, energies, spacings,
            'Contribution of each path to the output of the last ACmix layer in each stage'))
