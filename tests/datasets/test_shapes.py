"""Tests of the generated dataset."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from acmix_mm.datasets import shapes as module
from acmix_mm.datasets.shapes import CLASSES, SEGMENTATION_CLASSES, write_shapes
from acmix_mm.utils.errors import UsageError


def contents(root):
    return {path.relative_to(root): path.read_bytes()
            for path in root.glob('**/*') if path.is_file()}


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        write_shapes(str(tmp_path / name), train_images=3, val_images=2, image_size=64, seed=seed)
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert contents(tmp_path / 'a') != contents(tmp_path / 'c')


def test_files_of_outline_have_not_changed(tmp_path):
    """They are those that the first version wrote, byte by byte."""
    write_shapes(str(tmp_path / 'data'), train_images=2, val_images=1, image_size=64, seed=3)
    digest = hashlib.sha256()
    for path, content in sorted(contents(tmp_path / 'data').items()):
        digest.update(str(path).encode() + content)
    assert digest.hexdigest() == (
        '3f0ee62d0b3c107a8597e783d7f465c0f1224676e619c907708cd7aec5b1e0f7')


@pytest.mark.parametrize(('coco_split', 'ade_split', 'count'), [
    ('train2017', 'training', 8), ('val2017', 'validation', 4),
])
def test_layouts_agree(shapes, coco_split, ade_split, count):
    """COCO's masks, drawn into a label map, give ADE20K's labels."""
    coco = COCO(str(shapes / 'annotations' / f'instances_{coco_split}.json'))
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert len(coco.getImgIds()) == count
    for image in coco.loadImgs(coco.getImgIds()):
        name = image['file_name']
        first = (shapes / coco_split / name).read_bytes()
        assert first == (shapes / 'images' / ade_split / name).read_bytes()
        labels = cv2.imread(str(shapes / 'annotations' / ade_split / name.replace('jpg', 'png')),
                            cv2.IMREAD_UNCHANGED)
        assert labels.shape == (96, 96)
        drawn = np.ones_like(labels)
        annotations = coco.loadAnns(coco.getAnnIds(image['id']))
        assert 1 <= len(annotations) <= 6
        for annotation in annotations:
            class_name = CLASSES[annotation['category_id'] - 1]
            mask = coco.annToMask(annotation).astype(bool)
            drawn[mask] = SEGMENTATION_CLASSES.index(class_name) + 1
            assert mask.sum() == pytest.approx(annotation['area'], rel=0.2, abs=12)
        # pycocotools and OpenCV rasterise outlines differently.
        assert (drawn != labels).mean() < 0.03


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr(module.json, 'dumps', fail)
    with pytest.raises(OSError, match='disk full'):
        write_shapes(str(tmp_path / 'shapes'), train_images=1, val_images=1, image_size=64)
    assert not list(tmp_path.iterdir())


def test_does_not_overwrite_files(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(UsageError, match='is not empty; remove it, or name another'):
        write_shapes(str(tmp_path))
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == '["notes.txt"]'
