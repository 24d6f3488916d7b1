"""Evaluating an exported detector with ONNX Runtime, as a model of MMEngine."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor

from acmix_mm.deploy.masks import paste_masks
from acmix_mm.deploy.preprocessing import GRAPH_TRANSFORMS
from acmix_mm.engine.config import classes_of, dataset_configs
from acmix_mm.engine.data_only import data_only
from acmix_mm.engine.runner import check_run, test_checked
from acmix_mm.environment import export_unavailable
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError


@data_only()
def test_onnx(cfg: Config, path: str) -> dict[str, float]:
    """Test an exported detector as :func:`acmix_mm.engine.runner.test` does a checkpoint.

    Raises:
        UsageError: the file is no detector exported by ``tools/export_onnx.py``, or has other
            classes than the config's dataset; or data or settings are invalid.
    """
    if cfg.default_scope != 'mmdet' or 'tta_cfg' in cfg.model:
        raise UsageError('An ONNX file can be tested with the config of a detector, and without '
                         'test-time augmentation.')
    check_run(cfg, ('test',))
    _, entries = open_detector(path)
    in_graph = entries['preprocessing']['in_graph']
    for dataset in dataset_configs(cfg, ('test',)):
        classes = classes_of(dataset, cfg.default_scope)
        if classes and entries['classes'] and list(classes) != entries['classes']:
            raise UsageError(f'{path} detects the classes {", ".join(entries["classes"])}, but the '
                             f'dataset has {", ".join(classes)}.')
        if in_graph:
            dataset.pipeline = [transform for transform in dataset.pipeline
                                if type_name(transform['type']) not in GRAPH_TRANSFORMS]
    preprocessor = None if in_graph else cfg.model.data_preprocessor
    cfg.model = dict(type='ONNXDetector', path=path, data_preprocessor=preprocessor)
    cfg.load_from = None
    return test_checked(cfg, [])


def open_detector(path: str) -> tuple[Any, dict[str, Any]]:
    """Open an exported detector.

    Returns:
        The session, and the metadata ``classes``, ``preprocessing`` and ``mask_threshold``.

    Raises:
        UsageError: onnxruntime is missing, or the file is no detector exported by
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
    if 'preprocessing' not in entries or names[:3] != ['boxes', 'scores', 'labels']:
        raise UsageError(f'{path} is not a detector exported by tools/export_onnx.py.')
    return session, dict(classes=json.loads(entries['classes']),
                         preprocessing=json.loads(entries['preprocessing']),
                         mask_threshold=float(entries.get('mask_threshold', 0.5)))


@MODELS.register_module()
class ONNXDetector(BaseModel):
    """An exported detector, for :class:`mmengine.runner.TestLoop`.

    Args:
        path: file exported by ``tools/export_onnx.py``.
        data_preprocessor: that of the config, or None if the file has its own preprocessing.

    Raises:
        UsageError: the file is no such file.
    """

    def __init__(self, path: str, data_preprocessor: Optional[dict] = None) -> None:
        super().__init__(data_preprocessor)
        self.path = path
        self.session, self.entries = open_detector(path)

    def forward(self, inputs: Union[Tensor, Sequence[Tensor]],
                data_samples: Sequence[DetDataSample],
                mode: str = 'predict') -> Sequence[DetDataSample]:
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
            image = image[:, :height, :width].cpu()
            if self.entries['preprocessing']['in_graph']:
                given, scale = image.permute(1, 2, 0), (1., 1.)
            else:
                given, scale = image[None], sample.scale_factor
            outputs = self.run(np.ascontiguousarray(given.numpy()))
            sample.pred_instances = self.instances(outputs, scale, sample.ori_shape[:2])
        return data_samples

    def run(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Run the file on an image; return its outputs by name.

        Raises:
            UsageError: the file takes images of another size.
        """
        given, = self.session.get_inputs()
        expected = [each for each in zip(given.shape, image.shape) if isinstance(each[0], int)]
        if any(side != actual for side, actual in expected):
            raise UsageError(f'{self.path} takes images of a fixed size, {given.shape}, but got '
                             f'{list(image.shape)}; export it without --fixed-size.')
        names = [each.name for each in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {given.name: image})))

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
