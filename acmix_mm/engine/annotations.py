"""Checks of COCO annotation files, before anything is built from them."""

import json
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from acmix_mm.utils.errors import UsageError, suggestion, summary

# The entries that MMDetection reads, by list, and their types.
ID, NUMBER = (int, str), (int, float)
ENTRIES: dict[str, dict[str, Any]] = dict(
    categories=dict(id=ID, name=str),
    images=dict(id=ID, file_name=str, height=NUMBER, width=NUMBER),
    annotations=dict(id=ID, image_id=ID, category_id=ID, bbox=list, area=NUMBER))


class Annotations(NamedTuple):
    """What is needed of a valid COCO annotation file.

    Attributes:
        categories: names of the categories, in the order of the file, which numbers the labels.
        unmasked: by category, the id of an annotation without a segmentation, if there is one.
        has_boxes: whether the file has annotations, rather than images alone.
    """

    categories: tuple[str, ...]
    unmasked: dict[str, Any]
    has_boxes: bool


def read_annotations(path: Path) -> Annotations:
    """Read and check a COCO annotation file. A file that does not change is read once.

    Raises:
        UsageError: the file cannot be read, or is not a COCO annotation file.
    """
    try:
        return read_version(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UsageError(f'{path} cannot be read ({error.strerror}).') from error


@lru_cache
def read_version(path: Path, time: int) -> Annotations:
    """Implement :func:`read_annotations` for a file that was last changed at a time."""
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        reason = f'it is not valid JSON ({error})' if text else 'it is empty'
        raise UsageError(f'{path} is not a COCO annotation file: {reason}.') from error
    problem = next(problems(content), None)
    if problem:
        raise UsageError(f'{path} is not a valid COCO annotation file: {problem}.')
    names = {each['id']: each['name'] for each in content['categories']}
    unmasked = {names[each['category_id']]: each['id'] for each in content.get('annotations', [])
                if not each.get('segmentation')}
    return Annotations(tuple(names.values()), unmasked, 'annotations' in content)


def problems(content: Any) -> Iterator[str]:
    """Describe what is wrong with the content of a COCO annotation file, from the outside in.

    Each description assumes that there are none before it.
    """
    if not isinstance(content, dict):
        yield f'it holds a {type(content).__name__} instead of an object with {", ".join(ENTRIES)}'
    # The files of images to be tested by a server have no annotations.
    content = dict(dict(annotations=[]), **content)
    for name, keys in ENTRIES.items():
        if not isinstance(content.get(name), list):
            yield f'it has no list {name!r}'
        for index, entry in enumerate(content[name]):
            if not isinstance(entry, dict):
                yield f'{name}[{index}] is not an object'
            for key, kind in keys.items():
                if key not in entry:
                    yield f'{name}[{index}] has no {key!r}'
                if not isinstance(entry[key], kind):
                    yield f'{name}[{index}][{key!r}] has the wrong type: {entry[key]!r}'
        ids = {each['id'] for each in content[name]}
        if len(ids) < len(content[name]):
            yield f'the ids of {name} are not unique'
    names = [each['name'] for each in content['categories']]
    for duplicate in repeated(names):
        yield f'two categories have the name {duplicate!r}'
    category_ids = {each['id'] for each in content['categories']}
    images = {each['id']: each for each in content['images']}
    for each in content['annotations']:
        if each['image_id'] not in images:
            yield (f'annotation {each["id"]} refers to image_id {each["image_id"]!r}, '
                   'which no image has')
        if each['category_id'] not in category_ids:
            yield (f'annotation {each["id"]} refers to category_id {each["category_id"]!r}, '
                   'which no category has')
        if not is_box(each['bbox']):
            yield (f'annotation {each["id"]} has the bbox {each["bbox"]!r} instead of [x, y, width,'
                   ' height]')
        mask, image = each.get('segmentation'), images[each['image_id']]
        size = [image['height'], image['width']]
        if isinstance(mask, dict) and mask.get('size') != size:
            yield (f'annotation {each["id"]} has a mask of the size {mask.get("size")}, but its '
                   f'image {image["file_name"]} has the size {size} (height, width)')


def is_box(box: list) -> bool:
    """Whether a list consists of four finite numbers."""
    return len(box) == 4 and all(
        isinstance(value, NUMBER) and math.isfinite(value) for value in box)


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once."""
    return sorted({name for name in names if names.count(name) > 1})


def check_annotations(path: Path, classes: Sequence[str], needs_boxes: bool,
                      needs_masks: bool) -> None:
    """Check a COCO annotation file against the classes of its dataset.

    MMDetection silently drops classes that the file does not have.

    Args:
        path: the file.
        classes: classes of the dataset.
        needs_boxes: whether the dataset is trained on or evaluated.
        needs_masks: whether its masks are.

    Raises:
        UsageError: the file is invalid, a class is misspelt, or a mask is missing.
    """
    found = read_annotations(path)
    if needs_boxes and not found.has_boxes:
        raise UsageError(f'{path} is not a valid COCO annotation file: it has no list '
                         "'annotations'.")
    unknown = [name for name in classes if name not in found.categories]
    unused = [name for name in found.categories if name not in classes]
    listed = ' '.join(found.categories)
    if len(unknown) == len(classes):
        raise UsageError(f'None of the classes of the dataset ({summary(classes)}) is a category '
                         f'of {path}, which has {listed}; name your own classes with --classes '
                         'NAME ….')
    if unknown and unused:
        raise UsageError(f'The classes of the dataset contain {summary(unknown)}, but the '
                         f'categories of {path} are {listed}{suggestion(unknown[0], unused)}; name '
                         'your own classes with --classes NAME ….')
    if unknown:
        warnings.warn(f'{path} has no category {summary(unknown)}.', stacklevel=2)
    without = [found.unmasked[name] for name in classes if name in found.unmasked]
    if needs_masks and without:
        raise UsageError(f'Annotation {without[0]} of {path} has no segmentation, but the config '
                         'trains or evaluates masks; add the masks, or use a config for boxes '
                         'alone.')


def check_class_names(classes: Any) -> None:
    """Check the classes of a dataset.

    Raises:
        UsageError: they are not a list of different names.
    """
    if not isinstance(classes, (list, tuple)) or not all(isinstance(each, str) for each in classes):
        raise UsageError(f'The classes of a dataset must be a list of names, got {classes!r}; a '
                         "single class is written ('NAME',).")
    duplicates = repeated(classes)
    if duplicates:
        raise UsageError(f'The classes of a dataset must differ, got {", ".join(duplicates)} more '
                         'than once.')
