"""Pasting the masks of detections into the image, with NumPy alone."""

import numpy as np


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int],
                threshold: float = 0.5) -> np.ndarray:
    """Resize each mask to its box and place it in the image, as MMDetection does.

    Args:
        masks: probabilities, (n, mask height, mask width).
        boxes: (n, 4), x1, y1, x2, y2 in pixels.
        size: (height, width) of the image.
        threshold: probability from which on a pixel belongs to the mask; an exported file has that
            of its config as ``mask_threshold`` in its metadata.

    Returns:
        (n, height, width), bool.
    """
    pasted = np.zeros((len(masks), *size), dtype=bool)
    for mask, (left, top, right, bottom), out in zip(masks, boxes, pasted):
        rows, columns = (
            slice(max(int(np.floor(low)) - 1, 0), max(min(int(np.ceil(high)) + 1, extent), 0))
            for low, high, extent in ((top, bottom, size[0]), (left, right, size[1])))
        down = interpolation(rows, top, bottom, mask.shape[0])
        across = interpolation(columns, left, right, mask.shape[1])
        out[rows, columns] = down @ mask @ across.T >= threshold
    return pasted


def interpolation(pixels: slice, low: float, high: float, bins: int) -> np.ndarray:
    """The weight of each of the ``bins`` between ``low`` and ``high`` for each pixel, float32.

    Beyond the outer bins, the mask is zero.
    """
    centre = np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5)
    with np.errstate(divide='ignore', invalid='ignore'):
        relative = (centre - low) / (high - low)
    # Each pixel of an empty box reads the middle of the mask.
    position = np.where(np.isinf(relative), 0.5, relative) * bins - 0.5
    return np.maximum(1 - np.abs(position[:, None] - np.arange(bins)), 0).astype(np.float32)
