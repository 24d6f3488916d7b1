"""The effective receptive field of a backbone, by gradients (Luo et al., arXiv 1701.04128)."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The part of the energy that the square of :func:`square` holds.
SHARE = 0.9


class Field(NamedTuple):
    """The effective receptive field of one stage.

    Attributes:
        stage: its name.
        stride: pixels from one position of its output to the next.
        energy: squared gradients, (height, width), of :func:`receptive_fields`.
        top: upper edge of the square of :func:`square`, in pixels.
        left: its left edge.
        side: its side.
    """

    stage: str
    stride: int
    energy: np.ndarray
    top: int
    left: int
    side: int


def receptive_fields(backbone: nn.Module, size: tuple[int, int], samples: int = 8,
                     seed: int = 0) -> list[Tensor]:
    """How much every pixel moves the centre of each output of a backbone.

    At a pixel it is the mean, over random pictures, of the squared gradient: that of the output's
    central position with respect to the pixel, summed over the channels of both. The sum over the
    output's channels is estimated by gradients along random directions, one for each picture. (The
    plain sum of the channels, of which the paper takes the gradient, is constant behind a layer
    norm.)

    Args:
        backbone: maps (1, 3, height, width) to one map (1, channels, h, w) for each stage; it is
            run in evaluation mode.
        size: height and width of the pictures, of independent standard normal values.
        samples: how many pictures.
        seed: of pictures and directions.

    Returns:
        For each output (height, width), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = backbone.training
    backbone.eval()
    fields: list[Tensor] = []
    try:
        for _ in range(samples):
            image = torch.randn(1, 3, *size, generator=generator).requires_grad_()
            outputs = backbone(image)
            if not fields:
                fields = [torch.zeros(size, dtype=torch.float64) for _ in outputs]
            for index, (field, output) in enumerate(zip(fields, outputs)):
                centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2]
                direction = torch.randn(centre.shape, generator=generator)
                gradient, = torch.autograd.grad(centre @ direction, image,
                                                retain_graph=index < len(outputs) - 1)
                field += gradient[0].double().square().sum(0) / samples
    finally:
        backbone.train(was_training)
    return fields


def square(energy: Tensor, share: float = SHARE) -> tuple[int, int, int]:
    """The smallest square, wherever it lies, that holds ``share`` of the energy of a map.

    Args:
        energy: (height, width), not negative.
        share: between 0 and 1.

    Returns:
        The upper and the left edge and the side, in pixels. Of squares of that side it is the one
        with the most energy; it may reach over the edges of the map where the map is not square.
    """
    wanted = share * energy.sum() * (1 - 1e-9)
    low, high = 1, max(energy.shape)
    while low < high:
        side = (low + high) // 2
        if window_sums(energy, side).max() >= wanted:
            high = side
        else:
            low = side + 1
    sums = window_sums(energy, low)
    top, left = divmod(int(sums.argmax()), sums.shape[1])
    return top, left, low


def window_sums(energy: Tensor, side: int) -> Tensor:
    """The energy in every square of one side; a map that is shorter is padded with zeros."""
    bottom, right = (max(side - extent, 0) for extent in energy.shape)
    sums = F.pad(energy, (1, right, 1, bottom)).cumsum(0).cumsum(1)
    return (sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side])
