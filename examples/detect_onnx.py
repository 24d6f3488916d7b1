"""Detect the objects in an image: needs only onnxruntime, numpy and Pillow.

    python tools/export_onnx.py CONFIG CHECKPOINT detector.onnx --with-preprocessing
    python examples/detect_onnx.py detector.onnx photo.jpg found.png    # and found.json
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps

COLORS = ('crimson', 'seagreen', 'royalblue', 'darkorange', 'purple', 'teal')


def detect(model: str, source: str, target: str, min_score: float = 0.5) -> None:
    """Draw the objects of an image into a copy of it, and list them in a JSON file."""
    try:
        session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
        entries = session.get_modelmeta().custom_metadata_map
        if not json.loads(entries['preprocessing'])['in_graph']:
            raise ValueError('it was exported without --with-preprocessing')
        classes = json.loads(entries['classes'])
        names = [output.name for output in session.get_outputs()]
        names.index('boxes')
    except Exception as error:  # onnxruntime's errors have no common base
        sys.exit(f'{model} is not a usable detector: {error}')
    try:
        image = ImageOps.exif_transpose(Image.open(source)).convert('RGB')
    except (OSError, SyntaxError) as error:
        sys.exit(f'{source} cannot be read as an image: {error}')
    found = dict(zip(names, session.run(names, {'image': np.asarray(image)[:, :, ::-1]})))

    objects, draw = [], ImageDraw.Draw(image)
    for index in np.flatnonzero(found['scores'] >= min_score):
        box, label = found['boxes'][index], int(found['labels'][index])
        color, name = COLORS[label % len(COLORS)], classes[label] if classes else str(label)
        if 'masks' in found:
            left, top, right, bottom = map(round, box.tolist())
            mask = Image.fromarray(found['masks'][index]).resize(
                (max(right - left, 1), max(bottom - top, 1)), Image.Resampling.BILINEAR)
            shade = np.where(np.asarray(mask) >= float(entries['mask_threshold']), 110, 0)
            image.paste(color, (left, top), Image.fromarray(shade.astype(np.uint8)))
        draw.rectangle(box.tolist(), outline=color, width=2)
        draw.text(box[:2].tolist(), f'{name} {found["scores"][index]:.2f}', fill='white')
        objects.append(dict(name=name, score=float(found['scores'][index]), box=box.tolist()))
    write(target, image, objects)


def write(target: str, image: Image.Image, contents: object) -> None:
    """Write an image and, next to it, a JSON file: both or none."""
    files = [Path(target), Path(target).with_suffix('.json')]
    partial = [file.with_name(f'.partial-{file.name}') for file in files]
    try:
        image.save(partial[0])
        partial[1].write_text(json.dumps(contents, indent=1))
        for source, file in zip(partial, files):
            os.replace(source, file)
    except (OSError, ValueError) as error:
        sys.exit(f'{target} cannot be written: {error}')
    finally:
        for file in partial:
            file.unlink(missing_ok=True)


if __name__ == '__main__':
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    detect(*sys.argv[1:])
