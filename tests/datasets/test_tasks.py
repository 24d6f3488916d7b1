"""What each diagnostic task can be solved with, and what it cannot be solved with.

Solvers see an image as it is stored, within a radius around the shape whose class they tell, and
guess where they see nothing. Chance is tested within ``SIGMAS`` standard deviations.
"""

from typing import NamedTuple

import cv2
import numpy as np
import pytest

from acmix_mm.datasets.shapes import Task, write_shapes
from acmix_mm.datasets.tasks import DIFFICULTY, HUE_PLANE, Count, Cue, Match, make_task
from acmix_mm.utils.errors import UsageError

SIGMAS = 3.5
SIZE = 96
TASKS = dict(outline=Task(), match=Match(12), cue=Cue(24), count=Count(3))
# As many images as give a few hundred shapes.
IMAGES = dict(outline=60, match=100, cue=500, count=300)


class Data(NamedTuple):
    """Shapes of a task: the stored image of each, its center and radius, its label."""

    images: list
    numbers: np.ndarray
    centers: np.ndarray
    radii: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope='module')
def data():
    found = {}
    for name, task in TASKS.items():
        rng = np.random.default_rng(0)
        images, rows = [], []
        for number in range(IMAGES[name]):
            scene = task.draw(192 if name == 'outline' else SIZE, rng)
            stored = cv2.imencode('.jpg', scene.image, task.encoding)[1]
            images.append(cv2.imdecode(stored, cv2.IMREAD_COLOR).astype(float))
            for shape in scene.shapes:
                center = shape.corners.mean(0)
                rows.append((number, center, np.hypot(*(shape.corners[0] - center)), shape.label))
        numbers, centers, radii, labels = map(np.array, zip(*rows))
        found[name] = Data(images, numbers, centers, radii, labels)
    return found


def distances(image, center):
    rows, columns = np.indices(image.shape[:2])
    return np.hypot(columns + 0.5 - center[0], rows + 0.5 - center[1])


def accuracy(data, solve, radius=np.inf):
    """The share of shapes that a solver classifies correctly.

    Args:
        data: the shapes.
        solve: solver; it takes an image, whose pixels out of sight are NaN, and the distance of
            each pixel from the shape, and returns a label, or None where it does not know.
        radius: how far it sees.
    """
    rng = np.random.default_rng(1)
    right = []
    for number, center, label in zip(data.numbers, data.centers, data.labels):
        image = data.images[number]
        away = distances(image, center)
        seen = np.where((away <= radius)[..., None], image, np.nan)
        answer = solve(seen, away)
        right.append(label == (rng.integers(data.labels.max() + 1) if answer is None else answer))
    return np.mean(right)


def is_chance(value, num_classes, num_independent):
    chance = 1 / num_classes
    return abs(value - chance) < SIGMAS * np.sqrt(chance * (1 - chance) / num_independent)


def hues(pixels):
    """Hue and saturation of BGR pixels."""
    x, y = HUE_PLANE @ pixels.T
    return np.arctan2(y, x), np.hypot(x, y)


def angle(first, second):
    return np.abs((first - second + np.pi) % (2 * np.pi) - np.pi)


def own_hue(image, away):
    return hues(image[away < 3].mean(0, keepdims=True))[0]


def solve_match(image, away, reach=np.inf):
    """Whether dark pixels have the hue of the center."""
    seen = image[(away <= reach) & ~np.isnan(image[..., 0])]
    hue, saturation = hues(seen)
    dark = (seen.mean(1) < 100) & (saturation > 40)
    if not dark.any():
        return None
    return int(np.sum(dark & (angle(hue, own_hue(image, away)) < np.pi / 8)) > 10)


def solve_cue(image, away):
    """The color of the upper mark, if one of the two is visible."""
    brightness = image.mean(2)
    center = np.nonzero(away == away.min())[0][0]
    rows = {color: np.nonzero(mask)[0] - center
            for color, mask in enumerate((brightness < 50, brightness > 200))}
    for color, offsets in rows.items():
        if len(offsets) > 10:
            return color if offsets.mean() < 0 else 1 - color
    return None


def solve_count(image, away):
    """The Euler number of what is white, from 2×2 pixels: cores have one, rims have zero."""
    white = np.pad(image.mean(2) > 200, 1)
    corners = np.stack([white[:-1, :-1], white[:-1, 1:], white[1:, :-1], white[1:, 1:]])
    total = corners.sum(0)
    diagonal = (total == 2) & (corners[0] == corners[3])
    return round((np.sum(total == 1) - np.sum(total == 3) - 2 * np.sum(diagonal)) / 4) - 1


def solve_outline(image, away, radius):
    """The symmetry of the gradients on the outline: three directions, or four, or all."""
    brightness = image.mean(2)
    down, right = (sum(weight * np.roll(brightness, shift, axis=1 - axis) for shift, weight in
                       ((-1, 1), (0, 2), (1, 1))) for axis in (0, 1))
    gradient = (np.roll(right, -1, 1) - np.roll(right, 1, 1)
                + 1j * (np.roll(down, -1, 0) - np.roll(down, 1, 0)))[away <= radius + 2]
    gradient = gradient[np.abs(gradient) > 0.4 * np.abs(gradient).max()]
    symmetry = {order: np.abs(np.mean((gradient / np.abs(gradient)) ** order)) for order in (3, 4)}
    return 0 if max(symmetry.values()) < 0.4 else 1 if symmetry[4] > symmetry[3] else 2


@pytest.mark.parametrize(('name', 'solve', 'below', 'above', 'groups'), [
    ('match', solve_match, TASKS['match'].radius - Match.disc - 1,
     TASKS['match'].radius + Match.disc + 1, 2),
    # From the center of the disc; its edge is nearer.
    ('cue', solve_cue, TASKS['cue'].distance + Cue.disc - 1,
     TASKS['cue'].distance + Cue.disc + 2 * Cue.mark + 1, 1),
    ('count', solve_count, TASKS['count'].spacing(SIZE) - Count.largest - 1, np.inf, 3),
])
def test_information_is_at_the_required_reach(name, solve, below, above, groups, data):
    """A solver that does not see as far as that is at chance, one that does is right."""
    found = data[name]
    # Shapes of an image, in match two of them, have dependent classes.
    independent = len(found.labels) / groups
    assert is_chance(accuracy(found, solve, below), found.labels.max() + 1, independent)
    assert accuracy(found, solve, above) >= 0.99


def test_outline_is_solved_by_small_filters(data):
    """Sobel filters suffice; the color of single pixels does not."""
    found = data['outline']
    solved = [solve_outline(found.images[number], distances(found.images[number], center), radius)
              for number, center, radius in zip(found.numbers, found.centers, found.radii)]
    assert np.mean(found.labels == solved) >= 0.98
    assert is_chance(learned(colors_inside(found), found.labels, found.numbers), 3,
                     len(found.labels) / 2)


def test_a_match_elsewhere_is_no_match(data):
    """Somewhere in the image there is a dark disc of every bright disc's color."""
    found = data['match']
    reach = TASKS['match'].radius + Match.disc
    assert accuracy(found, lambda image, away: solve_match(image, away, reach)) >= 0.99
    everywhere = [solve_match(found.images[number], distances(found.images[number], center))
                  for number, center in zip(found.numbers, found.centers)]
    assert set(everywhere) == {1}


def learned(features, labels, numbers):
    """Test accuracy of the better of two classifiers, linear and by the nearest centroid.

    Args:
        features: (shapes, features), of which every second image is for training.
        labels: (shapes,).
        numbers: (shapes,), of the images.
    """
    train = numbers % 2 == 0
    features = (features - features[train].mean(0)) / (features[train].std(0) + 1e-6)
    features = np.append(features, np.ones((len(features), 1)), 1)
    classes = np.arange(labels.max() + 1)
    centroids = np.stack([features[train & (labels == each)].mean(0) for each in classes])
    nearest = np.linalg.norm(features[:, None] - centroids, axis=2).argmin(1)
    kernel = features @ features[train].T
    target = (labels[train, None] == classes) - np.bincount(labels[train]) / train.sum()
    ridge = np.linalg.solve(kernel[train] + features.shape[1] * np.eye(train.sum()), target)
    linear = (kernel @ ridge).argmax(1)
    return max(np.mean((answer == labels)[~train]) for answer in (nearest, linear))


def colors_inside(data):
    return np.array([data.images[number][distances(data.images[number], center) < 4].mean(0)
                     for number, center in zip(data.numbers, data.centers)])


def global_statistics(data):
    """Mean, deviation and histograms of each shape's image, its position, area and own color."""
    def of_image(image):
        bins = (image // 64).astype(int)
        joint = np.bincount((bins @ [16, 4, 1]).ravel(), minlength=64)
        single = [np.histogram(channel, 16, (0, 256))[0] for channel in image.reshape(-1, 3).T]
        return np.concatenate([image.mean((0, 1)), image.std((0, 1)), joint, *single])

    of_images = np.array([of_image(image) for image in data.images])[data.numbers]
    position = data.centers / SIZE - 0.5
    own = colors_inside(data)
    # The class of a shape of one color follows from other statistics than that of another color.
    hue = hues(own)[0][:, None]
    products = np.hstack([of_images * np.cos(hue), of_images * np.sin(hue)])
    return np.hstack([of_images, products, own, position, position ** 2, data.radii[:, None] ** 2])


@pytest.mark.parametrize(('name', 'groups'), [('match', 2), ('cue', 1), ('count', 3)])
def test_global_statistics_do_not_tell_the_class(name, groups, data):
    found = data[name]
    score = learned(global_statistics(found), found.labels, found.numbers)
    # Half of the shapes are for testing.
    assert is_chance(score, found.labels.max() + 1, len(found.labels) / groups / 2)


def windows(data, radius):
    """The mean color of squares of 3×3 pixels around each shape, up to a radius."""
    pad = int(radius)
    found = []
    for number, center in zip(data.numbers, data.centers):
        padded = np.pad(data.images[number], ((pad, pad), (pad, pad), (0, 0)))
        left, top = center.astype(int)
        side = 2 * pad // 3 * 3
        window = padded[top:top + side, left:left + side]
        found.append(window.reshape(side // 3, 3, side // 3, 3, 3).mean((1, 3)).ravel())
    return np.array(found)


@pytest.mark.parametrize(('name', 'radius', 'groups'), [
    ('match', (TASKS['match'].radius - Match.disc) / np.sqrt(2), 2),
    ('cue', (TASKS['cue'].distance + Cue.disc) / np.sqrt(2), 1),
    ('count', (TASKS['count'].spacing(SIZE) - Count.largest) / np.sqrt(2), 3),
])
def test_the_surroundings_do_not_tell_the_class(name, radius, groups, data):
    """A classifier of all pixels in the largest square below the required reach is at chance."""
    found = data[name]
    score = learned(windows(found, radius), found.labels, found.numbers)
    assert is_chance(score, found.labels.max() + 1, len(found.labels) / groups / 2)


def test_the_classifier_finds_what_is_visible(data):
    """With the marks in sight, the same classifier solves cue."""
    found = data['cue']
    colors = windows(found, TASKS['cue'].between_centers + Cue.mark)
    assert learned(colors, found.labels, found.numbers) > 0.9


def test_static_filters_do_not_find_a_match(data):
    """Responses of filters around a bright disc, their magnitudes and products with its color."""
    found = data['match']
    colors = windows(found, TASKS['match'].radius + Match.disc + 1)
    rings = colors.reshape(len(colors), -1, 3).mean(1)
    own = colors_inside(found)
    products = (own[:, :, None] * rings[:, None]).reshape(len(own), -1)
    features = np.hstack([colors, np.abs(colors - 128), own, products])
    assert is_chance(learned(features, found.labels, found.numbers), 2, len(found.labels) / 4)


@pytest.mark.parametrize('name', ['match', 'cue', 'count'])
def test_classes_are_balanced(name, data):
    labels = data[name].labels
    for label in range(labels.max() + 1):
        assert is_chance(np.mean(labels == label), labels.max() + 1, len(labels) / 3)


@pytest.mark.parametrize('name', ['match', 'cue', 'count'])
def test_layouts_agree(name, tmp_path):
    """COCO's outlines, filled, are ADE20K's labels; classes are the same, all else is ignored."""
    coco = pytest.importorskip('pycocotools.coco')
    task = TASKS[name]
    write_shapes(str(tmp_path / 'data'), 3, 2, SIZE, task=task)
    annotations = coco.COCO(str(tmp_path / 'data/annotations/instances_train2017.json'))
    names = [each['name'] for each in annotations.loadCats(annotations.getCatIds())]
    assert names == list(task.segmentation_classes) == list(task.classes)
    for number in range(3):
        path = tmp_path / f'data/annotations/training/{number:05d}.png'
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        drawn = np.zeros_like(labels)
        for shape in annotations.loadAnns(annotations.getAnnIds(number)):
            drawn[annotations.annToMask(shape).astype(bool)] = shape['category_id']
        assert drawn.any()
        # pycocotools rasterises outlines differently.
        assert np.isin(labels, [0, *np.unique(drawn)]).all()
        assert (labels != drawn).sum() < 0.25 * (drawn > 0).sum()


@pytest.mark.parametrize(('name', 'value', 'image_size', 'message'), [
    ('match', 9, 96, 'radius of match must be at least 10 pixels, got 9'),
    ('match', 20, 96, 'too small for a radius of 20; choose an image_size of at least 98'),
    ('cue', 0, 96, 'distance of cue must be at least 1 pixel, got 0'),
    ('cue', 63, 96, 'too small for a distance of 63; choose an image_size of at least 97'),
    ('count', 1, 96, 'number of count must be 2 to 6, got 1'),
    ('count', 7, 96, 'number of count must be 2 to 6, got 7'),
])
def test_difficulty_is_checked(name, value, image_size, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        write_shapes(str(tmp_path / 'data'), image_size=image_size,
                     task=make_task(name, **{DIFFICULTY[name]: value}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('name', 'value', 'image_size'), [
    ('match', 10, 64), ('match', 19, 96), ('cue', 1, 64), ('cue', 30, 64), ('cue', 62, 96),
    ('count', 2, 64), ('count', 6, 64),
])
def test_hardest_cases_can_be_drawn(name, value, image_size):
    task = make_task(name, **{DIFFICULTY[name]: value})
    task.check(image_size)
    scene = task.draw(image_size, np.random.default_rng(0))
    for shape in scene.shapes:
        assert (shape.corners > 0).all()
        assert (shape.corners < image_size - 1).all()


def test_argument_of_another_task():
    with pytest.raises(UsageError, match='distance is an argument of the task cue, not of match'):
        make_task('match', distance=24)
