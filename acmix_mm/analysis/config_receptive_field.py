"""Effective receptive fields of the backbones of configs, and of their variants."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Optional

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from acmix_mm.analysis.paths import stride
from acmix_mm.analysis.receptive_field import SHARE, Field, receptive_fields, square
from acmix_mm.backbones.token_mixers import with_mixer
from acmix_mm.checkpoints.reading import explain_load_error, read_weights, weights_only
from acmix_mm.engine.config import build_network
from acmix_mm.engine.runner import checkpoint_sources, load_all_weights
from acmix_mm.utils.errors import CheckpointError, UsageError


def fields_of(cfg: Config, size: tuple[int, int], samples: int,
              checkpoint: Optional[str] = None) -> list[Field]:
    """Measure the backbone of a config, stage by stage.

    Args:
        cfg: a detection or segmentation config.
        size: height and width of the random pictures.
        samples: how many of them.
        checkpoint: trained weights of the backbone, or of a whole detector or segmentor; if None
            it starts as a training would, from its ``init_cfg`` or from scratch.

    Raises:
        UsageError: the config has no backbone, or one that gives no maps or does not see the
            picture.
        CheckpointError: the checkpoint cannot be had, or is of another network.
    """
    backbone = build_backbone(cfg, checkpoint)
    try:
        energies = receptive_fields(backbone, size, samples)
        with torch.no_grad():
            sizes = [output.shape[2:] for output in backbone(torch.zeros(1, 3, *size))]
    except (RuntimeError, IndexError) as error:
        raise UsageError(f'The backbone of {cfg.filename} does not give maps of a picture of '
                         f'{size[0]}×{size[1]}: {error!r:.200}') from error
    fields = []
    for index, energy, output in zip(sorted(backbone.out_indices), energies, sizes):
        if not energy.sum() > 0:
            raise UsageError(f'The centre of stage {index} of {cfg.filename} does not depend on '
                             'the picture: its gradient is zero everywhere.')
        fields.append(Field(f'stage {index}', stride(size, output), energy.numpy(),
                            *square(energy)))
    return fields


def build_backbone(cfg: Config, checkpoint: Optional[str]) -> nn.Module:
    """The backbone of a config with the weights that :func:`fields_of` says."""
    if not (cfg.get('model') or {}).get('backbone'):
        raise UsageError(f'The config {cfg.filename} has no model with a backbone.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    torch.manual_seed(0)
    arguments = dict(cfg.model.backbone)
    converts = arguments['type'].startswith('ACmix')
    if checkpoint and converts:
        arguments['init_cfg'] = dict(type='Pretrained', checkpoint=checkpoint)
    backbone = build_network(arguments)
    if checkpoint and not converts:
        # MMEngine would take whatever fits, were it nothing.
        load_all_weights(backbone, read_weights(checkpoint).state_dict, checkpoint)
        return backbone
    try:
        with weights_only():
            backbone.init_weights()
    except OSError as error:
        sources = ' or '.join(checkpoint_sources(arguments))
        raise CheckpointError(explain_load_error(sources, error)) from error
    return backbone


def variants(cfg: Config, mixers: Optional[Sequence[str]]) -> list[tuple[Optional[str], Config]]:
    """A config alone, or what each of ``mixers`` makes of it, beside its mixer.

    Raises:
        UsageError: the backbone does not have the mixer.
    """
    if mixers is None:
        return [(None, cfg)]
    made = [(mixer, deepcopy(cfg)) for mixer in mixers]
    for mixer, variant in made:
        variant.model.backbone = with_mixer(cfg.model.backbone, mixer)
    return made


def short_names(paths: Sequence[str]) -> list[str]:
    """Names of files without their endings, with as many folders as it takes to tell them apart."""
    parts = [Path(path).with_suffix('').parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(each[-length:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def label(name: str, mixer: Optional[str], checkpoint: Optional[str]) -> str:
    """What a network is called beside others: its config's name, its mixer, the weights."""
    words = [name]
    if mixer is not None:
        words.append(mixer)
    if checkpoint is not None:
        words.append('/'.join(Path(checkpoint).parts[-2:]))
    return ', '.join(words)


def report(columns: Sequence[tuple[str, Sequence[Field]]]) -> str:
    """The sides of the squares, a line for each network."""
    lines = [f"Side of the smallest square with {SHARE:.0%} of the gradient's energy, in pixels"]
    lines += [f'{name}: ' + ', '.join(
        f'{field.side} in {field.stage} (stride {field.stride})' for field in fields)
        for name, fields in columns]
    return '\n'.join(lines)
