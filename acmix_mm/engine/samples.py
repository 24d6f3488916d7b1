"""Checks of images and masks while they are loaded; errors name the file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

import cv2
import numpy as np
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import Dataset

from acmix_mm.utils.errors import DataError


class CheckedPipeline(Compose):
    """A pipeline that checks what it loads, and whose errors name unreadable files.

    Args:
        pipeline: the pipeline of a dataset; its transforms are shared.
        num_classes: number of classes of semantic label maps; None if they are not checked.
        ignore_index: label to ignore.
    """

    def __init__(self, pipeline: Compose, num_classes: Optional[int], ignore_index: int) -> None:
        super().__init__(pipeline.transforms)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def __call__(self, data: dict) -> Optional[dict]:
        """Apply the transforms one by one.

        Raises:
            DataError: a file cannot be read, or does not match the others.
        """
        files = [data.get(key) for key in ('img_path', 'seg_map_path')]
        result: Optional[dict] = data
        for transform in self.transforms:
            try:
                result = transform(result)
            except Exception as error:
                for path in files:
                    reason = reason_unreadable(path)
                    if reason:
                        raise DataError(f'{path} {reason}.') from error
                raise
            if result is None:
                return None
            if isinstance(transform, LoadImageFromFile):
                check_image_size(result)
            elif isinstance(transform, LoadAnnotations) and self.num_classes is not None:
                check_label_map(result, self.num_classes, self.ignore_index)
        return result


def reason_unreadable(path: Any) -> Optional[str]:
    """Explain why a local image file cannot be read; None if it can, or is not a local file."""
    if not isinstance(path, str) or '://' in path:
        return None
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return 'does not exist'
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    if not content:
        return 'is empty'
    if cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) is None:
        return 'is damaged or not an image'
    return None


def check_image_size(data: Mapping[str, Any]) -> None:
    """Check that an image has the size that the annotation file states.

    Raises:
        DataError: it has another size, so that its boxes would be misplaced.
    """
    stated = (data.get('height'), data.get('width'))
    actual = data['ori_shape']
    if None not in stated and stated != actual:
        raise DataError(f'{data["img_path"]} is an image of {actual[0]}×{actual[1]} (height × '
                        f'width), but the annotation file says {stated[0]}×{stated[1]}; correct '
                        'the annotation file.')


def check_label_map(data: Mapping[str, Any], num_classes: int, ignore_index: int) -> None:
    """Check the size and the labels of a semantic label map.

    Raises:
        DataError: the map has colours, or the size is not that of the image, or a label is not less
            than the number of classes.
    """
    labels, path = data.get('gt_seg_map'), data.get('seg_map_path')
    if labels is None:
        return
    if labels.ndim != 2:
        raise DataError(f'{path} has {labels.shape[2]} channels: a mask has one channel, with the '
                        'index of the class of each pixel; convert it from colours to indices.')
    if labels.shape != data['ori_shape']:
        height, width = data['ori_shape']
        raise DataError(f'{path} is a mask of {labels.shape[0]}×{labels.shape[1]} (height × width),'
                        f' but its image {data["img_path"]} has {height}×{width}.')
    beyond = np.unique(labels[(labels >= num_classes) & (labels != ignore_index)])
    if len(beyond):
        # With reduce_zero_label, the file numbers the classes from 1.
        first = int(bool(data.get('reduce_zero_label')))
        raise DataError(
            f'{path} has labels beyond the {num_classes} classes: '
            f'{", ".join(str(label + first) for label in beyond.tolist())}; labels range from '
            f'{first} to {num_classes - 1 + first}, and {ignore_index} is ignored. Correct the '
            'mask, or name all classes with --classes NAME ….')


def check_samples(dataset: Dataset) -> None:
    """Make a dataset, and the datasets that it wraps, check what they load."""
    for each in with_pipeline(dataset):
        # Only MMSegmentation's datasets have these; their label maps are those of semantic classes.
        is_semantic = hasattr(each, 'reduce_zero_label')
        classes = each.metainfo.get('classes') if is_semantic else None
        each.pipeline = CheckedPipeline(
            each.pipeline, len(classes) if classes else None, getattr(each, 'ignore_index', 255))


def forget_images(dataset: Dataset) -> None:
    """Empty the caches of transforms that combine images, such as ``CachedMosaic``."""
    for each in with_pipeline(dataset):
        for transform in each.pipeline.transforms:
            if hasattr(transform, 'results_cache'):
                transform.results_cache.clear()


def with_pipeline(dataset: Dataset) -> Iterator[Any]:
    """A dataset and the datasets that it wraps, of these the ones with a pipeline."""
    for wrapped in [*getattr(dataset, 'datasets', []), getattr(dataset, 'dataset', None)]:
        if wrapped is not None:
            yield from with_pipeline(wrapped)
    if isinstance(getattr(dataset, 'pipeline', None), Compose):
        yield dataset


class CheckSamplesHook(Hook):
    """Checks the images and masks of all datasets of a run while they are loaded."""

    priority = 'VERY_HIGH'

    def before_run(self, runner: Runner) -> None:
        # The public attributes would build the loops that this run does not need.
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            if isinstance(loop, BaseLoop):
                check_samples(loop.dataloader.dataset)
