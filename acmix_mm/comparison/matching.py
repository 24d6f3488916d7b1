"""Matching the cost of networks with different token mixers, by width and depth.

The cost of the whole model is matched, since that is what is trained and deployed. Its parameters
or multiply-adds may differ by at most ``TOLERANCE`` of those of the reference's *backbone*:
relative to the model, a large head would hide a difference between two backbones.
"""

import functools
import itertools
from collections.abc import Collection
from copy import deepcopy
from typing import Any, Callable, NamedTuple

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS

from acmix_mm.analysis.complexity import build_to_count, count_on_shapes
from acmix_mm.analysis.flops import total
from acmix_mm.backbones.token_mixers import with_mixer
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError

TOLERANCE = 0.02
# Of the whole model. Latency grows in steps and its measurements differ by a few percent.
LATENCY_TOLERANCE = 0.05
# How many blocks may be added or removed in total, in the order of the attempts.
BLOCKS_CHANGED = (0, 2, 4)
# How many widths to try on either side of the target, and by what factor a width may change.
WIDTHS_NEARBY = 2
LARGEST_FACTOR = 3


class BackboneSize(NamedTuple):
    """Width, and number of blocks of each stage."""

    width: int
    blocks: tuple[int, ...]


class Counts(NamedTuple):
    """Parameters, and multiply-adds for one image, of a model and of its backbone."""

    params: int
    flops: int
    backbone_params: int
    backbone_flops: int


class Family:
    """The networks of a config with one token mixer, by size.

    Args:
        model: config of a detector or segmentor with an ACmix backbone; it is not modified.
        mixer: one of ``MIXERS``.
        shape: (height, width) of the image for which multiply-adds are counted.

    Attributes:
        host: class of the backbone.
        own_size: size in the config.

    Raises:
        UsageError: the backbone is not an ACmix backbone, or does not support the mixer.
    """

    def __init__(self, model: ConfigDict, mixer: str, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.model = deepcopy(model)
        self.model.backbone = with_mixer(model.backbone, mixer)
        self.host = MODELS.get(type_name(model.backbone.type))
        self.arguments = self.host.arguments(self.model.backbone)
        self.own_size = BackboneSize(self.arguments[self.host.width_argument],
                                     self.host.stage_blocks_of(self.arguments))
        self.channels: dict[int, list[int]] = {}
        self.counted: dict[tuple[str, BackboneSize, str], int] = {}

    def config(self, size: BackboneSize) -> ConfigDict:
        """The model's config in another size, with the channels of necks and heads adapted.

        Raises:
            UsageError: they cannot be adapted.
        """
        model = deepcopy(self.model)
        if size == self.own_size:
            return model
        model.backbone[self.host.width_argument] = size.width
        model.backbone[self.host.blocks_argument] = list(size.blocks)
        if size.width != self.own_size.width:
            fit_channels(model, self.channels_of(self.own_size.width), self.channels_of(size.width))
        return model

    def channels_of(self, width: int) -> list[int]:
        """Channels of the backbone's outputs.

        Raises:
            ValueError: the backbone does not support the width.
        """
        if width not in self.channels:
            with torch.device('meta'):
                network = MODELS.build(
                    {**self.model.backbone, self.host.width_argument: width, 'init_cfg': None})
            self.channels[width] = [network.stage_info[index].channels
                                    for index in sorted(network.out_indices)]
        return self.channels[width]

    def count(self, quantity: str, size: BackboneSize, part: str = 'model') -> int:
        """Count one size.

        Args:
            quantity: ``'params'`` or ``'flops'`` (multiply-adds).
            size: size of the backbone.
            part: ``'model'`` or ``'backbone'``.
        """
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

    def counts(self, size: BackboneSize) -> Counts:
        """All counts of one size."""
        return Counts(*(self.count(quantity, size, part) for part in ('model', 'backbone')
                        for quantity in ('params', 'flops')))

    def sizes(self, quantity: str, width: int, most: int) -> dict[BackboneSize, float]:
        """Count all sizes of one width with at most ``most`` blocks added or removed.

        The counts are linear in the number of blocks of each stage, so counting one more block in
        each stage gives all others. If the last block of each stage has another mixer, this holds
        from two blocks on, because the first one has the stride.
        """
        blocks = self.own_size.blocks
        unchanged = self.count(quantity, BackboneSize(width, blocks))
        if most == 0:
            return {BackboneSize(width, blocks): unchanged}
        fewest = 2 if self.arguments.get('last_mixer') else 1

        def count_stage(stage: int, number: int) -> int:
            size = BackboneSize(width, (*blocks[:stage], number, *blocks[stage + 1:]))
            return self.count(quantity, size, 'backbone')

        def count_blocks(stage: int, number: int) -> int:
            if number < fewest:
                return count_stage(stage, number)
            start = max(blocks[stage], fewest)
            counted = count_stage(stage, start)
            if number == start:
                return counted
            return counted + (number - start) * (count_stage(stage, start + 1) - counted)

        backbone = self.count(quantity, BackboneSize(width, blocks), 'backbone')
        found = {}
        for change in changes(len(blocks), most):
            size = BackboneSize(width, tuple(map(sum, zip(blocks, change))))
            if min(size.blocks) >= 1:
                found[size] = unchanged + sum(
                    count_blocks(stage, number) - backbone
                    for stage, number in enumerate(size.blocks))
        return found

    def widths_near(self, quantity: str, target: float) -> list[int]:
        """Widths near a target count with unchanged blocks, the nearest first."""
        below = self.last_width_within(quantity, target)
        near = self.widths[max(below - WIDTHS_NEARBY, 0):below + WIDTHS_NEARBY + 2]
        return sorted(near, key=lambda width: abs(self.count_width(quantity, width) - target))

    def count_width(self, quantity: str, width: int) -> int:
        """Count the model with another width and unchanged blocks."""
        return self.count(quantity, BackboneSize(width, self.own_size.blocks))

    @functools.cached_property
    def widths(self) -> list[int]:
        """All widths that the backbone supports, up to a factor of its own width."""
        step, own = self.host.width_step(self.arguments), self.own_size.width
        return [width for width in range(step, LARGEST_FACTOR * own + 1, step)
                if width * LARGEST_FACTOR >= own and self.supports(width)]

    def supports(self, width: int) -> bool:
        """Whether the backbone supports a width, whose channels mixers may have to divide."""
        try:
            self.channels_of(width)
        except (AssertionError, ValueError):
            return False
        return True

    def last_width_within(self, quantity: str, target: float) -> int:
        """Index of the largest width that does not exceed a target with unchanged blocks, or 0."""
        low, high = 0, len(self.widths)
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.count_width(quantity, self.widths[middle]) <= target
            low, high = (middle, high) if fits else (low, middle)
        return low

    def blocks_changed(self, size: BackboneSize) -> int:
        """How many blocks a size adds and removes in total."""
        return sum(abs(a - b) for a, b in zip(size.blocks, self.own_size.blocks))

    def describe(self, size: BackboneSize) -> str:
        """Describe what a size changes in the config."""
        parts = [f'{name} {own} → {new}' for name, own, new in zip(
            (self.host.width_argument, self.host.blocks_argument), self.own_size, size)
            if own != new]
        return ', '.join(parts) or 'nothing'


def match(family: Family, quantity: str, target: float, tolerance: float,
          exclude: Collection[BackboneSize] = ()) -> BackboneSize:
    """Find the size of a family whose parameters or multiply-adds match a target.

    A network within the tolerance keeps its size. Otherwise only the width is changed at first,
    and then, starting with the nearest width, a few blocks. If nothing is within the tolerance, the
    nearest size is returned.

    Args:
        family: networks with one mixer.
        quantity: ``'params'`` or ``'flops'``.
        target: count of the whole model.
        tolerance: largest allowed difference.
        exclude: sizes that must not be returned.
    """
    own = family.own_size
    if own not in exclude and abs(family.count(quantity, own) - target) <= tolerance:
        return own
    differences: dict[BackboneSize, float] = {}
    for most in BLOCKS_CHANGED:
        for width in family.widths_near(quantity, target):
            found = {size: abs(counted - target)
                     for size, counted in family.sizes(quantity, width, most).items()
                     if size not in exclude}
            close = [size for size in found if found[size] <= tolerance]
            if close:
                return min(close, key=lambda size: (family.blocks_changed(size), found[size]))
            differences.update(found)
    return min(differences, key=differences.__getitem__)


def match_by_measuring(family: Family, ratio_to_target: Callable[[BackboneSize], float],
                       attempts: int = 12) -> BackboneSize:
    """Find the size of a family whose measured cost matches a target.

    The next size to measure has multiply-adds that are scaled by the last ratio.

    Args:
        family: networks with one mixer.
        ratio_to_target: measures a size and returns its cost relative to the target.
        attempts: how many sizes to measure; if none is within ``TOLERANCE``, the nearest is
            returned.
    """
    size = family.own_size
    measured: dict[BackboneSize, float] = {}
    while True:
        measured[size] = ratio_to_target(size)
        if abs(measured[size] - 1) <= TOLERANCE or len(measured) == attempts:
            return min(measured, key=lambda size: abs(measured[size] - 1))
        aim = family.count('flops', size) / measured[size]
        size = match(family, 'flops', aim, aim * TOLERANCE / 2, measured)


def fit_channels(model: ConfigDict, before: list[int], after: list[int]) -> None:
    """Adapt the ``in_channels`` of all modules that read the outputs of a backbone.

    These are the first neck or, without a neck, the decode heads and auxiliary heads.

    Args:
        model: config of the model; modified in place.
        before: channels of the outputs before the change.
        after: channels of the outputs after the change.

    Raises:
        UsageError: no module has ``in_channels``, or they are not those of the backbone.
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
                         'neck nor a decode head that reads its outputs; pass --match none.')
    for name, reader in readers:
        found = reader.get('in_channels')
        expected = None if found is None else channels(reader, before)
        if found is None or (list(found) if isinstance(found, tuple) else found) != expected:
            raise UsageError(f'The width of this backbone cannot be changed: model.{name}.'
                             f'in_channels is {found}, but the backbone has {before}; pass '
                             '--match none.')
        reader.in_channels = channels(reader, after)


def changes(stages: int, most: int) -> list[tuple[int, ...]]:
    """All ways to add and remove at most ``most`` blocks in total, by stage."""
    return [change for change in itertools.product(range(-most, most + 1), repeat=stages)
            if sum(map(abs, change)) <= most]
