"""One network with several mixers, and the width and depth at which each costs the same.

What is matched is the whole model, which is what one trains, deploys and times. It may be off by at
most ``TOLERANCE`` of the reference's *backbone*: measured against the model, a large head would
hide a difference between two backbones.
"""

import functools
import inspect
import itertools
from collections.abc import Collection
from copy import deepcopy
from typing import Any, Callable, NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from acmix_mm.analysis.complexity import build_to_count, count_on_shapes
from acmix_mm.analysis.flops import total
from acmix_mm.backbones.resnet import STAGE_BLOCKS as RESNET_BLOCKS
from acmix_mm.backbones.san import STAGE_BLOCKS as SAN_BLOCKS
from acmix_mm.backbones.token_mixers import with_mixer
from acmix_mm.utils.errors import UsageError

TOLERANCE = 0.02
# Blocks of each stage where a backbone leaves them to its depth.
BLOCKS_OF_DEPTH = {'ACmixResNet': RESNET_BLOCKS, 'ACmixSAN': SAN_BLOCKS}
# How many blocks in all may be added or removed, in the order in which that is tried; how many
# widths on both sides; and by what factor a width may change.
BLOCKS_CHANGED = (0, 2, 4)
WIDTHS_NEARBY = 2
LARGEST_FACTOR = 3
# Side of the picture that shows how many channels a backbone gives.
PROBE_SIZE = 64


class Skeleton(NamedTuple):
    """What of a backbone can grow and shrink.

    Attributes:
        width: name of the argument that all stages' channels are proportional to.
        blocks: name of the argument with the blocks of each stage.
        step: from the backbone's arguments, what a width must be a multiple of.
    """

    width: str
    blocks: str
    step: Callable[[dict[str, Any]], int]


def head_step(arguments: dict[str, Any]) -> int:
    """The smallest width of which every stage, twice as wide as the one before, cuts into heads."""
    heads = arguments['num_heads']
    return next(width for width in itertools.count(1)
                if all(width * 2**stage % number == 0 for stage, number in enumerate(heads)))


def resnet_step(arguments: dict[str, Any]) -> int:
    """The number of heads; a mixer that has none takes any width."""
    has_heads = arguments['mixer'] is None and arguments['acmix_stages']
    return arguments['num_heads'] if has_heads else 1


SKELETONS = {
    'ACmixResNet': Skeleton('base_channels', 'stage_blocks', resnet_step),
    'ACmixSwinTransformer': Skeleton('embed_dims', 'depths', head_step),
    # Its width is that of a head.
    'ACmixPyramidVisionTransformer': Skeleton('embed_dims', 'num_layers', lambda given: 1),
    'ACmixSAN': Skeleton('base_channels', 'stage_blocks', lambda given: 32),
}


class Size(NamedTuple):
    """Width, and blocks of each stage."""

    width: int
    blocks: tuple[int, ...]


class Counts(NamedTuple):
    """Parameters, and multiply-adds on one picture, of a model and of its backbone."""

    params: int
    flops: int
    backbone_params: int
    backbone_flops: int


class Family:
    """The networks of a config with one mixer, by size.

    Args:
        model: config of a detector or segmentor with one of our backbones; it is not changed.
        mixer: one of ``MIXERS``.
        shape: (height, width) of the picture that multiply-adds are counted on.

    Attributes:
        own_size: that of the config.

    Raises:
        UsageError: the backbone is not ours, or does not have the mixer.
    """

    def __init__(self, model: ConfigDict, mixer: str, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.model = deepcopy(model)
        self.model.backbone = with_mixer(model.backbone, mixer)
        self.skeleton = SKELETONS[model.backbone.type]
        self.own_size = own_size(self.model.backbone)
        self.channels: dict[int, list[int]] = {}
        self.counted: dict[tuple[str, Size], int] = {}

    def config(self, size: Size) -> ConfigDict:
        """The model's config in a size, all that reads the backbone's maps fitted to them.

        Raises:
            UsageError: what reads them cannot be fitted.
        """
        model = deepcopy(self.model)
        if size == self.own_size:
            return model
        model.backbone[self.skeleton.width] = size.width
        model.backbone[self.skeleton.blocks] = list(size.blocks)
        if size.width != self.own_size.width:
            fit_channels(model, self.channels_of(self.own_size), self.channels_of(size))
        return model

    def channels_of(self, size: Size) -> list[int]:
        if size.width not in self.channels:
            backbone = {**self.model.backbone, self.skeleton.width: size.width}
            self.channels[size.width] = map_channels(backbone)
        return self.channels[size.width]

    def count(self, quantity: str, size: Size, part: str = 'model') -> int:
        """Parameters (``'params'``) or multiply-adds (``'flops'``) of model or ``'backbone'``."""
        key = quantity, size, part
        if key not in self.counted:
            config = self.config(size)
            with torch.device('meta'):
                network = build_to_count(config if part == 'model' else config.backbone)
            if quantity == 'params':
                counted = sum(parameter.numel() for parameter in network.parameters())
            else:
                counted = total(count_on_shapes(network, self.shape)).multiply_adds
            self.counted[key] = counted
        return self.counted[key]

    def counts(self, size: Size) -> Counts:
        """Everything of one size."""
        return Counts(*(self.count(quantity, size, part) for part in ('model', 'backbone')
                        for quantity in ('params', 'flops')))

    def sizes(self, quantity: str, width: int, most: int) -> dict[Size, float]:
        """Sizes of one width, at most so many blocks added or removed, and what they count.

        The count is linear in the blocks of each stage, so that one more of each tells the rest.
        """
        blocks = self.own_size.blocks
        plain = self.count(quantity, Size(width, blocks))
        if most == 0:
            return {Size(width, blocks): plain}
        backbones = [self.count(quantity, Size(width, each), 'backbone') for each in (
            blocks, *(added(blocks, stage) for stage in range(len(blocks))))]
        of_block = [each - backbones[0] for each in backbones[1:]]
        found = {}
        for change in changes(len(blocks), most):
            size = Size(width, tuple(map(sum, zip(blocks, change))))
            if min(size.blocks) >= 1:
                found[size] = plain + sum(a * b for a, b in zip(change, of_block))
        return found

    def widths_near(self, quantity: str, target: float) -> list[int]:
        """Widths around a target, blocks as they are, the nearest first."""
        below = self.last_width_within(quantity, target)
        near = self.widths[max(below - WIDTHS_NEARBY, 0):below + WIDTHS_NEARBY + 2]
        return sorted(near, key=lambda width: abs(
            self.count(quantity, Size(width, self.own_size.blocks)) - target))

    @functools.cached_property
    def widths(self) -> list[int]:
        """Every width that the backbone can be built with, up to a factor of the own one."""
        step, own = self.skeleton.step(arguments(self.model.backbone)), self.own_size.width
        return [width for width in range(step, LARGEST_FACTOR * own + 1, step)
                if width * LARGEST_FACTOR >= own and self.takes(width)]

    def takes(self, width: int) -> bool:
        """Whether the backbone can have a width: a mixer may divide channels as well."""
        try:
            with torch.device('meta'):
                MODELS.build({**self.model.backbone, self.skeleton.width: width, 'init_cfg': None})
        except (AssertionError, ValueError):
            return False
        return True

    def last_width_within(self, quantity: str, target: float) -> int:
        """Index of the largest width, blocks as they are, that does not exceed a target; or 0."""
        low, high = 0, len(self.widths)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.count(quantity, Size(self.widths[middle], self.own_size.blocks)) <= target
            low, high = (middle, high) if fits else (low, middle)
        return low


def match(family: Family, quantity: str, target: float, tolerance: float,
          besides: Collection[Size] = ()) -> Size:
    """The size of a family whose parameters or multiply-adds come to a target.

    A network that is within tolerance stays as it is. Then width alone is tried, and then, from the
    width that comes nearest on, a few blocks more or less. If nothing is within tolerance, it is
    the nearest.

    Args:
        family: networks of one mixer.
        quantity: ``'params'`` or ``'flops'``.
        target: what the whole model should have.
        tolerance: how far it may be off.
        besides: sizes that are not wanted.
    """
    own = family.own_size
    if own not in besides and abs(family.count(quantity, own) - target) <= tolerance:
        return own
    off: dict[Size, float] = {}
    for most in BLOCKS_CHANGED:
        for width in family.widths_near(quantity, target):
            found = {size: abs(counted - target)
                     for size, counted in family.sizes(quantity, width, most).items()
                     if size not in besides}
            close = [size for size in found if found[size] <= tolerance]
            if close:
                return min(close, key=lambda size: (blocks_changed(family, size), found[size]))
            off.update(found)
    return min(off, key=off.__getitem__)


def match_by_measuring(family: Family, ratio_to_target: Callable[[Size], float],
                       attempts: int = 8) -> Size:
    """The size of a family at which something measured comes to a target.

    Multiply-adds tell which size to try next, in proportion to what was measured last.

    Args:
        family: networks of one mixer.
        ratio_to_target: measures a size, and returns the ratio.
        attempts: how many sizes to measure; if none is within ``TOLERANCE``, it is the nearest.
    """
    size = family.own_size
    measured: dict[Size, float] = {}
    while True:
        measured[size] = ratio_to_target(size)
        if abs(measured[size] - 1) <= TOLERANCE or len(measured) == attempts:
            return min(measured, key=lambda size: abs(measured[size] - 1))
        aim = family.count('flops', size) / measured[size]
        size = match(family, 'flops', aim, aim * TOLERANCE / 2, measured)


def arguments(backbone: dict[str, Any]) -> dict[str, Any]:
    """Every argument of a backbone's config, defaults included."""
    parameters = inspect.signature(MODELS.get(backbone['type'])).parameters
    return {**{name: each.default for name, each in parameters.items()}, **backbone}


def own_size(backbone: dict[str, Any]) -> Size:
    given = arguments(backbone)
    skeleton = SKELETONS[backbone['type']]
    blocks = given[skeleton.blocks]
    if blocks is None:
        blocks = BLOCKS_OF_DEPTH[backbone['type']][given['depth']][:given.get('num_stages')]
    return Size(given[skeleton.width], tuple(blocks))


def map_channels(backbone: dict[str, Any]) -> list[int]:
    """The channels of each map that a backbone gives, by running it on shapes alone."""
    with torch.device('meta'):
        network = MODELS.build({**backbone, 'init_cfg': None}).eval()
        maps = network(torch.empty(1, 3, PROBE_SIZE, PROBE_SIZE))
    return [each.shape[1] for each in maps]


def fit_channels(model: ConfigDict, before: list[int], after: list[int]) -> None:
    """Tell all that reads a backbone's maps how many channels they have now.

    That is the first neck or, without one, the decode heads and auxiliary heads.

    Raises:
        UsageError: nothing reads them by ``in_channels``, or something does not read what the
            backbone gave.
    """
    def channels(reader: ConfigDict, given: list[int]) -> Any:
        index = reader.get('in_index', -1)
        if not isinstance(reader.in_channels, (list, tuple)):
            return given[index]
        return [given[each] for each in (index if isinstance(index, (list, tuple))
                                         else range(len(given)))]

    parts = ('neck',) if model.get('neck') else ('decode_head', 'auxiliary_head')
    readers = []
    for name in parts:
        part = model.get(name) or []
        part = part if isinstance(part, (list, tuple)) else [part]
        readers += [(name, each) for each in (part[:1] if name == 'neck' else part)]
    if not readers:
        raise UsageError('The width of this backbone cannot be changed: the model has neither a '
                         'neck nor a decode head that reads its maps; pass --match none.')
    for name, reader in readers:
        found = reader.get('in_channels')
        expected = None if found is None else channels(reader, before)
        if found is None or (list(found) if isinstance(found, tuple) else found) != expected:
            raise UsageError(f'The width of this backbone cannot be changed: model.{name}.'
                             f'in_channels is {found}, and the backbone gives {before}; pass '
                             '--match none.')
        reader.in_channels = channels(reader, after)


def added(blocks: tuple[int, ...], stage: int) -> tuple[int, ...]:
    """Blocks of each stage with one more in one of them."""
    return (*blocks[:stage], blocks[stage] + 1, *blocks[stage + 1:])


def changes(stages: int, most: int) -> list[tuple[int, ...]]:
    """Every way to add and remove at most so many blocks in all."""
    return [change for change in itertools.product(range(-most, most + 1), repeat=stages)
            if sum(map(abs, change)) <= most]


def blocks_changed(family: Family, size: Size) -> int:
    return sum(abs(a - b) for a, b in zip(size.blocks, family.own_size.blocks))


def describe(family: Family, size: Size) -> str:
    """In words, what a size changes in the config."""
    own, skeleton = family.own_size, family.skeleton
    parts = []
    if size.width != own.width:
        parts.append(f'{skeleton.width} {own.width} → {size.width}')
    if size.blocks != own.blocks:
        parts.append(f'{skeleton.blocks} {own.blocks} → {size.blocks}')
    return ', '.join(parts) or 'nothing'
