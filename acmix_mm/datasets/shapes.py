"""Generated datasets of shapes, in COCO's and ADE20K's layouts."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from acmix_mm.utils.errors import UsageError

CLASSES = ('circle', 'square', 'triangle')
# Number of polygon corners of each class, all on a circle.
CORNERS = {'circle': 40, 'square': 4, 'triangle': 3}
# In ADE20K's layout label 0 is ignored, so that the background is a class of its own.
SEGMENTATION_CLASSES = ('background', *CLASSES)


class Shape(NamedTuple):
    """A filled polygon.

    Attributes:
        label: index into the classes of the task.
        corners: (num_corners, 2), x and y in pixels.
        color: BGR.
    """

    label: int
    corners: np.ndarray
    color: tuple[int, int, int]


class Scene(NamedTuple):
    """An image with its annotations.

    Attributes:
        image: (image_size, image_size, 3), uint8, BGR.
        labels: (image_size, image_size), uint8, numbered as in ADE20K's layout: 0 is ignored, and 1
            is the first of the task's ``segmentation_classes``.
        shapes: the annotated shapes.
        clues: for each shape, x and y of what its class follows from; empty if that is the shape
            itself.
    """

    image: np.ndarray
    labels: np.ndarray
    shapes: Sequence[Shape]
    clues: Sequence[np.ndarray] = ()


class Task:
    """What an image shows, and what the class of a shape depends on. This one is ``outline``.

    The class is the outline of the shape: a circle, a square or a triangle.
    :mod:`acmix_mm.datasets.tasks` has others.

    Attributes:
        question: what is asked about each annotated shape.
        classes: names of the classes, COCO's categories.
        segmentation_classes: names of the labels in ADE20K's layout, from 1 on.
        encoding: how OpenCV writes the images.
    """

    question: str = 'What is its outline?'
    classes: Sequence[str] = CLASSES
    segmentation_classes: Sequence[str] = SEGMENTATION_CLASSES
    encoding: Sequence[int] = (cv2.IMWRITE_JPEG_QUALITY, 95)

    def check(self, image_size: int) -> None:
        """Raise UsageError if the task's difficulty does not fit images of this size."""

    def draw(self, image_size: int, rng: np.random.Generator) -> Scene:
        """Draw an image, (image_size, image_size)."""
        return Scene(*draw(image_size, rng))


def write_shapes(root: str, train_images: int = 200, val_images: int = 50, image_size: int = 192,
                 seed: int = 0, task: Task = Task()) -> None:
    """Write the dataset to ``root``; if that fails, nothing is left behind.

    COCO's layout is ``train2017/``, ``val2017/`` and ``annotations/instances_*2017.json``; ADE20K's
    is ``images/{training,validation}/`` and ``annotations/{training,validation}/``. Both contain
    the same images. The same arguments give the same files.

    Args:
        root: folder to create, with its parents.
        train_images: number of training images.
        val_images: number of validation images.
        image_size: height and width of an image in pixels, at least 64.
        seed: seed of the random number generator, not negative.
        task: what the class of a shape depends on.

    Raises:
        UsageError: ``root`` is not empty or cannot be written, or an argument is invalid.
    """
    if image_size < 64:
        raise UsageError(f'image_size must be at least 64 pixels, got {image_size}.')
    if min(train_images, val_images) < 1:
        raise UsageError('train_images and val_images must be at least 1, got '
                         f'{train_images} and {val_images}.')
    if seed < 0:
        raise UsageError(f'seed must not be negative, got {seed}.')
    task.check(image_size)
    target = Path(root)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f'{root} exists and is not empty; remove it, or name another folder.')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=target.name + '.', dir=target.parent))
    except OSError as error:
        reason = error.strerror
        raise UsageError(f'{root} cannot be written ({reason}); name another folder.') from error
    try:
        rng = np.random.default_rng(seed)
        for count, coco_split, ade_split in ((train_images, 'train2017', 'training'),
                                             (val_images, 'val2017', 'validation')):
            write_split(partial, coco_split, ade_split, count, image_size, rng, task)
        partial.chmod(0o755)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial)
        raise


def write_split(root: Path, coco_split: str, ade_split: str, count: int, image_size: int,
                rng: np.random.Generator, task: Task) -> None:
    """Draw ``count`` images and write them and their annotations in both layouts."""
    folders = [root / coco_split, root / 'images' / ade_split, root / 'annotations' / ade_split]
    for folder in folders:
        folder.mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        image, labels, shapes, _ = task.draw(image_size, rng)
        name = f'{index:05d}'
        for folder in folders[:2]:
            cv2.imwrite(str(folder / f'{name}.jpg'), image, task.encoding)
        cv2.imwrite(str(folders[2] / f'{name}.png'), labels)
        images.append(dict(id=index, file_name=f'{name}.jpg', height=image_size, width=image_size))
        for shape in shapes:
            low, high = shape.corners.min(0), shape.corners.max(0)
            annotations.append(dict(
                id=len(annotations) + 1,
                image_id=index,
                category_id=shape.label + 1,
                iscrowd=0,
                area=float(cv2.contourArea(shape.corners.astype(np.float32))),
                bbox=np.round([*low, *(high - low)], 2).tolist(),
                segmentation=[np.round(shape.corners, 2).ravel().tolist()]))
    categories = [dict(id=label + 1, name=name) for label, name in enumerate(task.classes)]
    (root / 'annotations' / f'instances_{coco_split}.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def draw(image_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[Shape]]:
    """Draw an image of two to six shapes that do not overlap.

    Returns:
        The image, (image_size, image_size, 3), uint8, BGR; its labels, (image_size, image_size),
        uint8, numbered as in ADE20K's layout; and the shapes.
    """
    background = rng.integers(0, 90, 3)
    noise = rng.normal(0, 12, (image_size, image_size, 3))
    image = np.clip(background + noise, 0, 255).astype(np.uint8)
    labels = np.ones((image_size, image_size), np.uint8)
    shapes, occupied = [], []
    num_shapes = rng.integers(2, 7)
    for _ in range(20 * num_shapes):
        if len(shapes) == num_shapes:
            break
        radius = rng.uniform(0.06, 0.2) * image_size
        center = rng.uniform(radius + 1, image_size - radius - 1, 2)
        if any(np.hypot(*(center - other)) < radius + other_radius + 2
               for other, other_radius in occupied):
            continue
        occupied.append((center, radius))
        label = int(rng.integers(len(CLASSES)))
        corners = CORNERS[CLASSES[label]]
        angles = rng.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(corners) / corners
        outline = center + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
        color = rng.integers(130, 256, 3)
        shape = Shape(label, outline, tuple(int(channel) for channel in color))
        # cv2 takes fixed-point coordinates, here with 4 fractional bits.
        points = np.round(outline * 16).astype(np.int32)
        cv2.fillPoly(image, [points], shape.color, cv2.LINE_AA, shift=4)
        cv2.fillPoly(labels, [points], SEGMENTATION_CLASSES.index(CLASSES[label]) + 1, shift=4)
        shapes.append(shape)
    return image, labels, shapes
