"""Segment an image: needs only onnxruntime, numpy and Pillow.

    python tools/export_onnx.py CONFIG CHECKPOINT segmentor.onnx
    python examples/segment_onnx.py segmentor.onnx photo.jpg found.png    # and found.json
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def segment(model: str, source: str, target: str) -> None:
    """Colour a copy of an image by class, and write the share of each class to a JSON file."""
    problem = f'{model} is not a usable segmentor'
    try:
        session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
        entries = session.get_modelmeta().custom_metadata_map
        steps, classes = (json.loads(entries[key]) for key in ('preprocessing', 'classes'))
        if [each.name for each in session.get_outputs()] != ['output']:
            raise ValueError('it has other outputs')
        problem = f'{source} cannot be read as an image'
        image = ImageOps.exif_transpose(Image.open(source)).convert('RGB')

        problem = f'{model} cannot run on {source}'
        size = steps['scale'] or image.size
        if steps['keep_ratio']:
            factor = min(max(size) / max(image.size), min(size) / min(image.size))
            size = [int(side * factor + 0.5) for side in image.size]
        # Files for images of one size have numbers in place of the names of these axes.
        expected = session.get_inputs()[0].shape[:1:-1]
        smallest = int(entries['smallest_width']), int(entries['smallest_height'])
        size = [fixed if isinstance(fixed, int) else max(side, least)
                for fixed, side, least in zip(expected, size, smallest)]
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float32)
        pixels = pixels if steps['order'] == 'RGB' else pixels[:, :, ::-1]
        pixels = (pixels - np.float32(steps['mean'])) / np.float32(steps['std'])
        labels, = session.run(None, {'input': pixels.transpose(2, 0, 1)[None]})
        labels = np.asarray(Image.fromarray(labels[0, 0].astype(np.uint8)).resize(
            image.size, Image.Resampling.NEAREST))

        shares = {classes[label] if classes else str(label): (labels == label).mean().item()
                  for label in np.unique(labels)}
        palette = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
        problem = f'{target} cannot be written'
        write(Path(target), Image.blend(image, Image.fromarray(palette[labels]), 0.5), shares)
    except Exception as error:  # onnxruntime's errors have no common base
        sys.exit(f'{problem}: {error}')


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
    segment(*sys.argv[1:])
