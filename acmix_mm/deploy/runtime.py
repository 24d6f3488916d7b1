"""Evaluating an exported detector or segmentor with ONNX Runtime, as a model of MMEngine."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor
from torch.nn import functional

from acmix_mm.deploy.masks import paste_masks
from acmix_mm.deploy.preprocessing import GRAPH_TRANSFORMS, check_whole_images
from acmix_mm.engine.config import classes_of, dataset_configs
from acmix_mm.engine.data_only import data_only
from acmix_mm.engine.runner import check_run, test_checked
from acmix_mm.environment import export_unavailable
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError


@data_only()
def test_onnx(cfg: Config, path: str) -> dict[str, float]:
    """Test an exported model as :func:`acmix_mm.engine.runner.test` does a checkpoint.

    Raises:
        UsageError: the file is no model of this kind exported by ``tools/export_onnx.py``, or has
            other classes than the config's dataset; or data or settings are invalid.
    """
    if 'module' in cfg.model:
        raise UsageError('An ONNX file can be tested only without test-time augmentation.')
    is_segmentor = 'decode_head' in cfg.model
    if is_segmentor:
        check_whole_images(cfg)
    check_run(cfg, ('test',))
    model = ONNXSegmentor if is_segmentor else ONNXDetector
    _, entries = model.open(path)
    in_graph = entries['preprocessing']['in_graph']
    for dataset in dataset_configs(cfg, ('test',)):
        classes = classes_of(dataset, cfg.default_scope)
        if classes and entries['classes'] and list(classes) != entries['classes']:
            raise UsageError(f'{path} has the classes {", ".join(entries["classes"])}, but the '
                             f'dataset has {", ".join(classes)}.')
        if in_graph:
            dataset.pipeline = [transform for transform in dataset.pipeline
                                if type_name(transform['type']) not in GRAPH_TRANSFORMS]
    preprocessor = None if in_graph else cfg.model.data_preprocessor
    cfg.model = dict(type=model.__name__, path=path, data_preprocessor=preprocessor)
    cfg.load_from = None
    return test_checked(cfg, [])


class ONNXModel(BaseModel):
    """An exported model, for :class:`mmengine.runner.TestLoop`.

    Args:
        path: file exported by ``tools/export_onnx.py``.
        data_preprocessor: that of the config, or None if the file has its own preprocessing.

    Attributes:
        kind: what the file contains, for messages.
        outputs: the names of the first outputs of such a file.

    Raises:
        UsageError: the file is no such file.
    """

    kind: str
    outputs: Sequence[str]

    def __init__(self, path: str, data_preprocessor: Optional[dict] = None) -> None:
        super().__init__(data_preprocessor)
        self.path = path
        self.session, self.entries = self.open(path)

    @classmethod
    def open(cls, path: str) -> tuple[Any, dict[str, Any]]:
        """Open a file of this kind.

        Returns:
            The session, and the metadata ``classes``, ``preprocessing`` and ``mask_threshold``.

        Raises:
            UsageError: onnxruntime is missing, or the file is no model of this kind exported by
                ``tools/export_onnx.py``.
        """
        reason = export_unavailable()
        if reason is not None:
            raise UsageError(f'Testing an ONNX file {reason}.')
        from acmix_mm.deploy.onnx import open_session
        if not os.path.isfile(path):
            raise UsageError(f'{path} does not exist.')
        try:
            session = open_session(path)
        # onnxruntime has its own classes of errors, without a common base.
        except Exception as error:
            raise UsageError(f'{path} is damaged or not an ONNX file: '
                             f'{" ".join(str(error).split()):.200}') from error
        entries = session.get_modelmeta().custom_metadata_map
        names = [each.name for each in session.get_outputs()]
        if 'preprocessing' not in entries or names[:len(cls.outputs)] != list(cls.outputs):
            raise UsageError(f'{path} is not a {cls.kind} exported by tools/export_onnx.py.')
        return session, dict(classes=json.loads(entries['classes']),
                             preprocessing=json.loads(entries['preprocessing']),
                             mask_threshold=float(entries.get('mask_threshold', 0.5)))

    def run(self, image: Tensor) -> dict[str, np.ndarray]:
        """Run the file on an image, shaped as it takes it; return its outputs by name.

        Raises:
            UsageError: the file takes images of another size.
        """
        given, = self.session.get_inputs()
        expected = [each for each in zip(given.shape, image.shape) if isinstance(each[0], int)]
        if any(side != actual for side, actual in expected):
            raise UsageError(f'{self.path} takes images of a fixed size, {given.shape}, but got '
                             f'{list(image.shape)}; export it without --fixed-size.')
        names = [each.name for each in self.session.get_outputs()]
        array = np.ascontiguousarray(image.cpu().numpy())
        return dict(zip(names, self.session.run(names, {given.name: array})))


@MODELS.register_module()
class ONNXSegmentor(ONNXModel):
    """An exported segmentor; see :class:`ONNXModel`."""

    kind = 'segmentor'
    outputs = ('output',)

    def forward(self, inputs: Tensor, data_samples: Sequence[BaseDataElement],
                mode: str = 'predict') -> Sequence[BaseDataElement]:
        """Classify the pixels of a batch of images.

        Classes are resized to the size of the file's image by nearest neighbours, where
        MMSegmentation resizes logits.

        Args:
            inputs: normalised and padded images, (batch, 3, height, width).
            data_samples: the samples of the images, which get ``pred_sem_seg``.
            mode: only ``'predict'``.
        """
        for image, sample in zip(inputs, data_samples):
            classes = torch.from_numpy(self.run(image[None])['output'])
            left, right, top, bottom = sample.get('img_padding_size', (0, 0, 0, 0))
            height, width = classes.shape[2:]
            classes = classes[..., top:height - bottom, left:width - right]
            resized = functional.interpolate(classes.float(), sample.ori_shape[:2]).long()
            sample.pred_sem_seg = PixelData(data=resized[0])
        return data_samples


@MODELS.register_module()
class ONNXDetector(ONNXModel):
    """An exported detector; see :class:`ONNXModel`."""

    kind = 'detector'
    outputs = ('boxes', 'scores', 'labels')

    def forward(self, inputs: Union[Tensor, Sequence[Tensor]],
                data_samples: Sequence[BaseDataElement],
                mode: str = 'predict') -> Sequence[BaseDataElement]:
        """Detect the objects in a batch of images.

        Args:
            inputs: normalised and padded images, (batch, 3, height, width), or raw ones, each (3,
                height, width), uint8.
            data_samples: the samples of the images, which get ``pred_instances``.
            mode: only ``'predict'``.
        """
        for image, sample in zip(inputs, data_samples):
            height, width = sample.img_shape[:2]
            # The file pads images itself.
            image = image[:, :height, :width]
            if self.entries['preprocessing']['in_graph']:
                given, scale = image.permute(1, 2, 0), (1., 1.)
            else:
                given, scale = image[None], sample.scale_factor
            outputs = self.run(given)
            sample.pred_instances = self.instances(outputs, scale, sample.ori_shape[:2])
        return data_samples

    def instances(self, outputs: Mapping[str, np.ndarray], scale: Sequence[float],
                  size: tuple[int, int]) -> InstanceData:
        """The outputs as predictions for an image of ``size``, (height, width).

        Args:
            outputs: of :meth:`run`.
            scale: the factors (x, y) by which the image has been resized.
            size: that of the image before resizing.
        """
        boxes = outputs['boxes'] / np.asarray([*scale, *scale], np.float32)
        instances = InstanceData(
            bboxes=torch.from_numpy(boxes), scores=torch.from_numpy(outputs['scores']),
            labels=torch.from_numpy(outputs['labels']))
        if 'masks' in outputs:
            instances.masks = torch.from_numpy(paste_masks(
                outputs['masks'], boxes, size, self.entries['mask_threshold']))
        return instances
