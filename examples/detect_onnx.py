"""Detect the objects in an image: needs only onnxruntime, numpy and Pillow.

    python tools/export_onnx.py CONFIG CHECKPOINT detector.onnx --with-preprocessing
    python examples/detect_onnx.py detector.onnx photo.jpg found.png    # and found.json
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

COLORS = ('crimson', 'seagreen', 'royalblue', 'darkorange', 'purple', 'teal')


def detect(model: str, source: str, target: str, min_score: float = 0.5) -> None:
    """Draw the objects of an image into a copy of it, and list them in a JSON file."""
    problem = f'{model} is not a usable detector'
    try:
        session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
        entries = session.get_modelmeta().custom_metadata_map
        classes = json.loads(entries['classes'])
        if not json.loads(entries['preprocessing'])['in_graph']:
            raise ValueError('it was exported without --with-preprocessing')
        problem = f'{source} cannot be read as an image'
        image = ImageOps.exif_transpose(Image.open(source)).convert('RGB')
        problem = f'{model} cannot run on {source}'
        boxes, scores, labels, *masks = session.run(None, {'image': np.array(image)[:, :, ::-1]})

        objects, draw = [], ImageDraw.Draw(image)
        for index in np.flatnonzero(scores >= min_score):
            box, label, score = boxes[index].tolist(), int(labels[index]), float(scores[index])
            color, name = COLORS[label % len(COLORS)], classes[label] if classes else str(label)
            objects.append(dict(name=name, score=score, box=box))
            if masks:
                mask = paste(masks[0][index], box, image.size) >= float(entries['mask_threshold'])
                image.paste(color, mask=Image.fromarray(np.uint8(110 * mask)))
                objects[-1]['segmentation'] = dict(size=mask.shape, counts=run_lengths(mask))
            draw.rectangle(box, outline=color, width=2)
            draw.text(box[:2], f'{name} {score:.2f}', fill='white')

        problem = f'{target} cannot be written'
        write(Path(target), image, objects)
    except Exception as error:  # onnxruntime's errors have no common base
        sys.exit(f'{problem}: {error}')


def paste(mask: np.ndarray, box: list[float], size: tuple[int, int]) -> np.ndarray:
    """Stretch a mask over its box in an image of ``size``, (width, height)."""
    left, top, right, bottom = box
    down, across = mask.shape / np.maximum([bottom - top, right - left], 1e-6)
    # From pixels of the image to those of the mask, which falls to zero beyond its outer pixels.
    affine = across, 0, 1 - left * across, 0, down, 1 - top * down
    return np.asarray(Image.fromarray(np.pad(mask, 1)).transform(
        size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


def run_lengths(mask: np.ndarray) -> list[int]:
    """Encode a mask as COCO does: runs down the columns, the first one of background."""
    changes = np.flatnonzero(np.diff(mask.ravel('F'), prepend=False))
    return np.diff(changes, prepend=0, append=mask.size).tolist()


def write(target: Path, image: Image.Image, contents: object) -> None:
    """Write an image and, next to it, a JSON file: both or none."""
    files = target, target.with_suffix('.json')
    if any(file.is_dir() for file in files):
        raise IsADirectoryError('there is a directory of this name')
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        image.save(Path(folder, target.name))
        Path(folder, files[1].name).write_text(json.dumps(contents))
        for file in files:
            Path(folder, file.name).replace(file)


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    detect(*sys.argv[1:])
