"""Diagnostic tasks: data whose solution requires one capability at a time.

The class of a shape is independent of its appearance, of all positions, and of the histogram of
colors of its image. Classes are equally frequent; pixels of anything but the annotated shapes are
ignored. Classes stay the same if an image is flipped horizontally.
"""

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np

from acmix_mm.datasets.shapes import Scene, Shape, Task
from acmix_mm.utils.errors import UsageError

# Orthonormal directions in the plane of colors of equal brightness, BGR.
HUE_PLANE = np.array([[2, -1, -1], [0, 1, -1]]) / np.sqrt([[6], [2]])
# Distance of a color from gray of the same brightness.
SATURATION = 75
BLACK, WHITE = 15, 240


class Diagnostic(Task):
    """A task on discs in front of gray noise."""

    # Compression would let the color of one part of an item show in another.
    encoding = (cv2.IMWRITE_JPEG_QUALITY, 100,
                cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    classes: Sequence[str]

    @property
    def segmentation_classes(self) -> Sequence[str]:
        return self.classes


class Match(Diagnostic):
    """Whether a bright disc has the color of one of the dark discs around it.

    Around each bright disc are four dark ones at distance ``radius``, in any direction: two of
    opposite colors, so that the mean color does not depend on the class, and two of other colors.
    Bright discs come in pairs of the same class. A bright disc is ``matched`` if the opposite
    colors around it are its own and the complementary color; if it is ``unmatched``, these are
    around the other disc of its pair.

    Args:
        radius: distance between the centers of a bright disc and the dark discs around it, in
            pixels.

    Raises:
        UsageError: discs at this distance would overlap.
    """

    question = 'Is the dark disc of its color next to it?'
    classes = ('unmatched', 'matched')
    disc = 4
    smallest = 2 * disc + 2
    num_dark = 4
    bright, dark = 180, 80
    # The smallest difference between colors that differ, in radians.
    contrast = np.pi / 4

    def __init__(self, radius: int = 12) -> None:
        if radius < self.smallest:
            raise UsageError(f'The radius of match must be at least {self.smallest} pixels, got '
                             f'{radius}.')
        self.radius = radius
        # Side of a bright disc with its surroundings.
        self.side = 2 * (radius + self.disc) + 1

    def check(self, image_size: int) -> None:
        if image_size < 2 * self.side:
            raise UsageError(f'Images of {image_size} pixels are too small for a radius of '
                             f'{self.radius}; choose an image_size of at least {2 * self.side}.')

    def draw(self, image_size: int, rng: np.random.Generator) -> Scene:
        image, labels = gray_noise(image_size, rng), np.zeros((image_size, image_size), np.uint8)
        cells = image_size // self.side
        corners = np.stack(np.divmod(rng.permutation(cells ** 2), cells), 1) * (image_size / cells)
        slack = image_size / cells - self.side
        shapes, clues = [], []
        for first, second in zip(corners[::2], corners[1::2]):
            label = int(rng.integers(2))
            between = rng.uniform(self.contrast, np.pi - self.contrast)
            hues = rng.uniform(0, 2 * np.pi) + np.array([0, between])
            centers = [corner + self.side / 2 + rng.uniform(0, slack, 2)
                       for corner in (first, second)]
            found = {}
            for index, center in enumerate(centers):
                around = self.surroundings(center, rng)
                whose = index if label else 1 - index
                opposite = hues[whose] + np.array([0, np.pi])
                for position, hue in zip(around, [*opposite, *self.others(hues, rng)]):
                    fill(image, position, self.disc, color(self.dark, hue))
                found[whose] = around[0]
            for index, center in enumerate(centers):
                bright = color(self.bright, hues[index])
                fill(image, center, self.disc, bright)
                fill(labels, center, self.disc, label + 1)
                shapes.append(circle(label, center, self.disc, bright))
                clues.append(found[index][None])
        return Scene(image, labels, shapes, clues)

    def others(self, hues: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the hues of the other dark discs, which differ from those of both bright ones."""
        drawn = rng.uniform(0, 2 * np.pi, 100)
        similar = np.cos(drawn[:, None] - hues) > np.cos(self.contrast)
        return drawn[~similar.any(1)][:self.num_dark - 2]

    def surroundings(self, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw the centers of the dark discs around a bright one, (num_dark, 2), in any order."""
        gap = 2 * np.arcsin(self.smallest / (2 * self.radius))
        gaps = gap + rng.dirichlet(np.ones(self.num_dark)) * (2 * np.pi - self.num_dark * gap)
        angles = rng.permutation(rng.uniform(0, 2 * np.pi) + np.cumsum(gaps))
        return center + self.radius * np.stack([np.cos(angles), np.sin(angles)], 1)


class Cue(Diagnostic):
    """Whether the mark above a disc is black or white.

    Both marks, a black and a white one, are at ``distance`` from the disc: one of them above it and
    the other below it, at most ``steepest`` from the vertical. No pixel of the disc is nearer.

    Args:
        distance: distance between the edges of the disc and of a mark, in pixels.

    Raises:
        UsageError: the distance is not positive.
    """

    question = 'Which color is the mark above it?'
    classes = ('black', 'white')
    disc, mark = 6, 4
    steepest = np.pi / 3
    brightness = 128

    def __init__(self, distance: int = 24) -> None:
        if distance < 1:
            raise UsageError(f'The distance of cue must be at least 1 pixel, got {distance}.')
        self.distance = distance
        self.between_centers = self.disc + distance + self.mark

    def check(self, image_size: int) -> None:
        # Marks that are farthest from the vertical, with space for the disc to move.
        needed = self.between_centers + 4 * self.disc
        if image_size < needed:
            raise UsageError(f'Images of {image_size} pixels are too small for a distance of '
                             f'{self.distance}; choose an image_size of at least {needed}.')

    def draw(self, image_size: int, rng: np.random.Generator) -> Scene:
        image, labels = gray_noise(image_size, rng), np.zeros((image_size, image_size), np.uint8)
        center, above, below = self.place(image_size, rng)
        label = int(rng.integers(2))
        hued = color(self.brightness, rng.uniform(0, 2 * np.pi))
        fill(image, center, self.disc, hued)
        fill(image, above, self.mark, (BLACK, WHITE)[label])
        fill(image, below, self.mark, (WHITE, BLACK)[label])
        fill(labels, center, self.disc, label + 1)
        return Scene(image, labels, [circle(label, center, self.disc, hued)], [above[None]])

    def place(self, image_size: int, rng: np.random.Generator) -> np.ndarray:
        """Draw the centers of the disc, of the mark above it and of that below it, (3, 2)."""
        margin = self.disc + 1
        while True:
            angles = rng.uniform(-self.steepest, self.steepest, (100, 2))
            directions = np.stack([np.sin(angles), np.cos(angles) * [-1, 1]], -1)
            offsets = self.between_centers * directions
            discs = rng.uniform(margin, image_size - margin, (100, 1, 2))
            centers = np.concatenate([discs, discs + offsets], 1)
            inside = ((centers > margin) & (centers < image_size - margin)).all((1, 2))
            if inside.any():
                return centers[inside][0]


class Count(Diagnostic):
    """How many discs of the image have a white core.

    There are ``number`` + 1 discs, one to ``number`` of which have a white core and a black rim.
    These are the annotated shapes, and their number is their class; the others have a black core
    and a white rim. All cores have the area of their rims.

    Args:
        number: the largest number of discs with a white core.

    Raises:
        UsageError: there is no name for that number.
    """

    question = 'How many discs with a white core are there?'
    names: ClassVar[Sequence[str]] = ('one', 'two', 'three', 'four', 'five', 'six')
    smallest, largest = 4, 6

    def __init__(self, number: int = 3) -> None:
        if not 2 <= number <= len(self.names):
            raise UsageError(f'The number of count must be 2 to {len(self.names)}, got {number}.')
        self.number = number
        self.classes = self.names[:number]

    def spacing(self, image_size: int) -> float:
        """The smallest distance between the centers of two discs."""
        return 0.75 * (image_size - 2 * self.largest - 2) / np.sqrt(self.number + 1)

    def draw(self, image_size: int, rng: np.random.Generator) -> Scene:
        image, labels = gray_noise(image_size, rng), np.zeros((image_size, image_size), np.uint8)
        centers = scatter(self.number + 1, self.spacing(image_size), self.largest + 1, image_size,
                          rng)
        # An image with n annotated discs is drawn 1/n times as often: classes are balanced.
        share = 1 / np.arange(1, self.number + 1)
        count = 1 + int(rng.choice(self.number, p=share / share.sum()))
        white_cores = centers[:count]
        shapes = []
        for index, center in enumerate(centers):
            radius = rng.uniform(self.smallest, self.largest)
            distances = distances_from(center, image_size)
            order = np.argsort(distances, axis=None)[:2 * (np.sum(distances <= radius) // 2)]
            core, rim = np.split(order, 2)
            inner, outer = (WHITE, BLACK) if index < count else (BLACK, WHITE)
            image.reshape(-1, 3)[core] = inner
            image.reshape(-1, 3)[rim] = outer
            if index < count:
                labels.reshape(-1)[order] = count
                shapes.append(circle(count - 1, center, radius, (outer,) * 3))
        return Scene(image, labels, shapes, [white_cores] * count)


# By the names that the tools use.
TASKS: dict[str, type[Task]] = dict(outline=Task, match=Match, cue=Cue, count=Count)
# The argument that sets the difficulty of a task.
DIFFICULTY = dict(match='radius', cue='distance', count='number')


def make_task(name: str, **difficulty: int) -> Task:
    """Return a task.

    Args:
        name: a key of ``TASKS``.
        difficulty: the argument that ``DIFFICULTY`` names for it; it has a default.

    Raises:
        UsageError: the argument is that of another task, or is invalid.
    """
    for argument in difficulty:
        if argument != DIFFICULTY.get(name):
            owner = next(task for task, own in DIFFICULTY.items() if own == argument)
            raise UsageError(f'{argument} is an argument of the task {owner}, not of {name}; omit '
                             'it, or choose that task.')
    return TASKS[name](**difficulty)


def gray_noise(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a background: gray of any brightness, with noise."""
    noise = rng.normal(rng.uniform(100, 150), 6, (image_size, image_size, 1))
    return np.repeat(np.clip(noise, 0, 255).astype(np.uint8), 3, axis=2)


def color(brightness: float, hue: float) -> tuple[int, ...]:
    """Return the color, BGR, of a hue in radians; all hues are equally saturated."""
    direction = np.array([np.cos(hue), np.sin(hue)]) @ HUE_PLANE
    return tuple(int(each) for each in np.round(brightness + SATURATION * direction))


def scatter(count: int, spacing: float, margin: float, image_size: int,
            rng: np.random.Generator) -> np.ndarray:
    """Draw ``count`` positions at least ``spacing`` apart, (count, 2), in random order."""
    while True:
        centers: list[np.ndarray] = []
        for center in rng.uniform(margin, image_size - margin, (50 * count, 2)):
            if all(np.hypot(*(center - other)) >= spacing for other in centers):
                centers.append(center)
            if len(centers) == count:
                # The later ones had less space to choose from.
                return rng.permutation(np.array(centers))


def distances_from(center: np.ndarray, image_size: int) -> np.ndarray:
    """Return the distance of each pixel's center from a position, (image_size, image_size)."""
    rows, columns = np.ogrid[:image_size, :image_size]
    return np.hypot(columns + 0.5 - center[0], rows + 0.5 - center[1])


def fill(image: np.ndarray, center: np.ndarray, radius: float, value: object) -> None:
    """Paint a disc, in place."""
    image[distances_from(center, len(image)) <= radius] = value


def circle(label: int, center: np.ndarray, radius: float, color: tuple[int, ...]) -> Shape:
    """Return a disc as an annotated shape."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    outline = center + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    return Shape(label, outline, color)
