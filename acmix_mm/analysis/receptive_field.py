"""Effective receptive fields of backbones, by gradients (Luo et al., arXiv 1701.04128)."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from acmix_mm.analysis.paths import stride
from acmix_mm.backbones.base import ACmixBackbone
from acmix_mm.backbones.token_mixers import with_mixer
from acmix_mm.checkpoints.reading import explain_load_error, read_weights, weights_only
from acmix_mm.engine.config import build_network
from acmix_mm.engine.runner import checkpoint_sources, load_all_weights
from acmix_mm.utils.errors import CheckpointError, UsageError

# Fraction of the gradient energy that the reported square contains.
ENERGY_SHARE = 0.9


class ReceptiveField(NamedTuple):
    """The effective receptive field of one stage.

    Attributes:
        stage: name of the stage.
        stride: distance between neighbouring positions of the stage's output, in pixels.
        energy: squared gradients from :func:`gradient_energies`, (height, width), float64.
        top: upper edge of the square from :func:`smallest_square`, in pixels.
        left: left edge of the square.
        side: side length of the square.
    """

    stage: str
    stride: int
    energy: np.ndarray
    top: int
    left: int
    side: int

    @property
    def extent(self) -> int:
        """Side of the smallest square with all pixels that have any influence, in pixels."""
        return max(np.ptp(positions) + 1 for positions in self.energy.nonzero())


def gradient_energies(backbone: nn.Module, size: tuple[int, int], samples: int = 8,
                      seed: int = 0) -> list[Tensor]:
    """Compute how strongly each input pixel affects the centre of each backbone output.

    The energy of a pixel is the squared gradient of the output's central position with respect to
    the pixel, summed over the channels of both and averaged over random images. The sum over output
    channels is estimated with one random direction per image. (The paper takes the gradient of the
    plain sum of the channels, which is constant after a layer norm.)

    Args:
        backbone: maps (1, 3, height, width) to one map (1, channels, h, w) per stage. It runs in
            evaluation mode.
        size: (height, width) of the images, which are standard normal noise.
        samples: number of images.
        seed: seed of images and directions.

    Returns:
        For each output a map (height, width), float64.
    """
    generator = torch.Generator().manual_seed(seed)
    was_training = backbone.training
    backbone.eval()
    energies: list[Tensor] = []
    try:
        for _ in range(samples):
            image = torch.randn(1, 3, *size, generator=generator).requires_grad_()
            outputs = backbone(image)
            if not energies:
                energies = [torch.zeros(size, dtype=torch.float64) for _ in outputs]
            for index, (energy, output) in enumerate(zip(energies, outputs)):
                centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2]
                direction = torch.randn(centre.shape, generator=generator)
                gradient, = torch.autograd.grad(centre @ direction, image,
                                                retain_graph=index < len(outputs) - 1)
                energy += gradient[0].double().square().sum(0) / samples
    finally:
        backbone.train(was_training)
    return energies


def smallest_square(energy: Tensor, share: float = ENERGY_SHARE) -> tuple[int, int, int]:
    """Find the smallest square, at any position, that contains ``share`` of the energy of a map.

    Args:
        energy: (height, width), non-negative.
        share: between 0 and 1.

    Returns:
        (top, left, side) in pixels. Among the squares of that side, it is the one with the most
        energy. It may extend beyond the shorter side of a map that is not square.
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
    """Sum the energy in every square of a given side; a shorter map is padded with zeros."""
    bottom, right = (max(side - extent, 0) for extent in energy.shape)
    sums = F.pad(energy, (1, right, 1, bottom)).cumsum(0).cumsum(1)
    return sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]


def config_receptive_fields(cfg: Config, size: tuple[int, int], samples: int,
                            checkpoint: Optional[str] = None) -> list[ReceptiveField]:
    """Measure the receptive field of each stage of a config's backbone.

    Args:
        cfg: a detection or segmentation config.
        size: (height, width) of the random images.
        samples: number of random images.
        checkpoint: trained weights of the backbone, or of a whole detector or segmentor. If None,
            the backbone is initialised as for training, from its ``init_cfg`` or from scratch.

    Raises:
        UsageError: the config has no backbone, or the backbone returns no feature maps or does not
            depend on the image.
        CheckpointError: the checkpoint cannot be read, or belongs to another network.
    """
    backbone = build_backbone(cfg, checkpoint)
    try:
        energies = gradient_energies(backbone, size, samples)
        with torch.no_grad():
            sizes = [output.shape[2:] for output in backbone(torch.zeros(1, 3, *size))]
    except (RuntimeError, IndexError) as error:
        raise UsageError(f'The backbone of {cfg.filename} does not return feature maps for an '
                         f'image of {size[0]}×{size[1]}: {error!r:.200}') from error
    fields = []
    for index, energy, output in zip(sorted(backbone.out_indices), energies, sizes):
        if not energy.sum() > 0:
            raise UsageError(f'The centre of stage {index} of {cfg.filename} does not depend on '
                             'the image: its gradient is zero everywhere.')
        fields.append(ReceptiveField(f'stage {index}', stride(size, output), energy.numpy(),
                                     *smallest_square(energy)))
    return fields


def build_backbone(cfg: Config, checkpoint: Optional[str]) -> nn.Module:
    """Build a config's backbone with the weights that :func:`config_receptive_fields` describes."""
    if not (cfg.get('model') or {}).get('backbone'):
        raise UsageError(f'The config {cfg.filename} has no model with a backbone.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    torch.manual_seed(0)
    backbone = build_network(cfg.model.backbone)
    if checkpoint and not isinstance(backbone, ACmixBackbone):
        # MMEngine's init_cfg would accept a checkpoint in which nothing fits.
        load_all_weights(backbone, read_weights(checkpoint).state_dict, checkpoint)
        return backbone
    if checkpoint:
        backbone.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    try:
        with weights_only():
            backbone.init_weights()
    except OSError as error:
        sources = ' or '.join(checkpoint_sources(cfg.model.backbone))
        raise CheckpointError(explain_load_error(sources, error)) from error
    return backbone


def mixer_variants(cfg: Config,
                   mixers: Optional[Sequence[str]]) -> list[tuple[Optional[str], Config]]:
    """Return (mixer, config) for each of ``mixers``, or (None, ``cfg``) if ``mixers`` is None.

    Raises:
        UsageError: the backbone does not support a mixer.
    """
    if mixers is None:
        return [(None, cfg)]
    variants = [(mixer, deepcopy(cfg)) for mixer in mixers]
    for mixer, variant in variants:
        variant.model.backbone = with_mixer(cfg.model.backbone, mixer)
    return variants


def unique_names(paths: Sequence[str]) -> list[str]:
    """Shorten paths to file names without suffix, with as many folders as make them unique."""
    parts = [Path(path).with_suffix('').parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def network_label(name: str, mixer: Optional[str], checkpoint: Optional[str]) -> str:
    """Label a network by the name of its config, its mixer and its checkpoint."""
    words = [name]
    if mixer is not None:
        words.append(mixer)
    if checkpoint is not None:
        words.append('/'.join(Path(checkpoint).parts[-2:]))
    return ', '.join(words)


def receptive_field_report(columns: Sequence[tuple[str, Sequence[ReceptiveField]]]) -> str:
    """List the sides of the squares, and of those with all of the energy, one line per network."""
    lines = [f'Side of the smallest square containing {ENERGY_SHARE:.0%} (all) of the gradient '
             'energy, in pixels']
    lines += [f'{name}: ' + ', '.join(
        f'{field.side} ({field.extent}) in {field.stage}, stride {field.stride}'
        for field in fields) for name, fields in columns]
    return '\n'.join(lines)
