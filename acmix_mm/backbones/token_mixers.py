"""Token mixers: the operators that can take the place of ACmix in a backbone, by name.

``conv`` is a 3×3 convolution, and ``conv7`` a 7×7 convolution, whose kernel has the size of a
typical window of local attention. ``attn`` is the attention of the host: over a sliding window in
ResNet, shifted windows in Swin, a reduced map in PVT, patches in SAN. ``acmix`` is attention and
convolution on shared projections (arXiv 2111.14556), and ``acmix-conv`` the convolution path of
ACmix alone. ``involution`` is 7×7 involution (arXiv 2103.06255).

The others attend to other positions than the host's attention: in ``global`` to all, in ``random``
to random blocks, and in ``bigbird`` to a window, random blocks and global tokens (arXiv
2007.14062). In ``attn-global`` and ``acmix-global`` the last block of each stage is global, and all
others are local (as in ViTDet, arXiv 2203.16527).
"""

import itertools
from collections.abc import Collection, Sequence
from copy import deepcopy
from typing import Any, Optional, Union

from mmcv.cnn import build_conv_layer
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.backbones.base import BACKBONES, ACmixBackbone
from acmix_mm.layers.attention_pattern import PATTERN_TYPES, PatternType
from acmix_mm.layers.padded_conv import one_side
from acmix_mm.utils.config import type_name
from acmix_mm.utils.errors import UsageError

# Arguments that select a mixer: the paths of ACmix, which all hosts have, and others.
PATHS: dict[str, dict[str, Any]] = {
    'attn': dict(mix='attn'), 'acmix': dict(mix='acmix'), 'acmix-conv': dict(mix='conv')}
OPERATORS: dict[str, dict[str, Any]] = {
    'conv7': dict(mixer=dict(type='Conv2d', kernel_size=7)),
    'involution': dict(mixer=dict(type='Involution', kernel_size=7)),
    'global': dict(mixer=dict(type='GlobalAttention')),
    'random': dict(mixer=dict(type='RandomAttention')),
    'bigbird': dict(mixer=dict(type='BigBirdAttention')),
    'attn-global': dict(mix='attn', last_mixer=dict(type='GlobalAttention')),
    'acmix-global': dict(mix='acmix', last_mixer=dict(type='GlobalACmix')),
}
MIXERS: tuple[str, ...] = ('conv', *PATHS, *OPERATORS)


def mixer_options(backbone: Union[str, type, None], mixer: str) -> dict[str, Any]:
    """Arguments that select a token mixer, to be merged into a backbone's config.

    Args:
        backbone: type of the backbone, ``'ACmixResNet'`` or the class. Its config must use
            ``mix='acmix'``, the default; :func:`with_mixer` replaces any other mixer.
        mixer: one of ``MIXERS``.

    Raises:
        UsageError: the mixer or the backbone is unknown, or the backbone does not support the
            mixer.
    """
    if mixer not in MIXERS:
        raise UsageError(f'There is no mixer {mixer!r}; name one of {", ".join(MIXERS)}.')
    name = backbone and type_name(backbone)
    network = MODELS.get(name) if name else None
    if not (isinstance(network, type) and issubclass(network, ACmixBackbone)):
        hosts = ', '.join(host.__name__ for host in BACKBONES.values())
        raise UsageError(f'The backbone {name} has no mixer to exchange; use a config with '
                         f'one that has: {hosts}.')
    options = network.mixers
    if mixer not in options:
        raise UsageError(f'The backbone {name} does not support the mixer {mixer}; it supports '
                         f'{", ".join(options)}.')
    return deepcopy(options[mixer])


def with_mixer(backbone: ConfigDict, mixer: str) -> ConfigDict:
    """Return a copy of a backbone's config with another token mixer.

    Raises:
        UsageError: as in :func:`mixer_options`.
    """
    options = mixer_options(backbone.type, mixer)
    backbone = deepcopy(backbone)
    for key in ('mix', 'mixer', 'last_mixer'):
        backbone.pop(key, None)
    if not backbone.get('acmix_stages', True):
        del backbone['acmix_stages']
    if 'mixer' in options:
        backbone.pop('acmix_cfg', None)
    backbone.update(options)
    return backbone


def pattern_type(mixer: Optional[dict[str, Any]]) -> Optional[PatternType]:
    """The type of a mixer whose attention reads a pattern of the whole map; None for others."""
    # An object in place of a name is that of another mixer.
    name = None if mixer is None else mixer['type']
    return PATTERN_TYPES.get(name.rpartition('.')[2]) if isinstance(name, str) else None


def mixers_of_blocks(stage_blocks: Sequence[int], mixer: Optional[dict[str, Any]],
                     last_mixer: Optional[dict[str, Any]]) -> list[list[Optional[dict[str, Any]]]]:
    """The config of the mixer of each block, by stage.

    The seed of a random pattern increases by one from block to block, so that each draws its own.

    Args:
        stage_blocks: number of blocks of each stage.
        mixer: config for all blocks; None for the host's own mixer.
        last_mixer: config for the last block of each stage; None for that of the others.

    Raises:
        ValueError: a mixer is not the config of a layer.
    """
    for name, given in (('mixer', mixer), ('last_mixer', last_mixer)):
        if given is not None and not (isinstance(given, dict) and 'type' in given):
            raise ValueError(f"{name} must be the config of a layer, as in {name}="
                             f"dict(type='GlobalAttention'); got {given!r}.")
    mixers = [[mixer] * (blocks - 1) + [last_mixer or mixer] for blocks in stage_blocks]
    number = itertools.count()
    return [[with_seed(each, next(number)) for each in stage] for stage in mixers]


def with_seed(mixer: Optional[dict[str, Any]], number: int) -> Optional[dict[str, Any]]:
    """Add the number of a block to the seed of its mixer, if it has one."""
    kind = pattern_type(mixer)
    if mixer is None or kind is None or 'seed' not in kind.options:
        return mixer
    return {**mixer, 'seed': mixer.get('seed', 0) + number}


def build_mixer(mixer: dict[str, Any], channels: int, stride: int = 1,
                dilation: int = 1) -> nn.Module:
    """Build a token mixer: a convolution layer, padded so that stride 1 keeps the size of the map.

    Args:
        mixer: config of an OpenMMLab convolution type. ``kernel_size`` defaults to 3, and ``bias``
            to False.
        channels: channels of the input and of the output.
        stride: stride of the layer.
        dilation: dilation of the layer.

    Raises:
        ValueError: ``kernel_size`` is not odd, positive and square, or the type rejects an
            argument.
    """
    mixer = {**dict(kernel_size=3, bias=False), **mixer}
    kernel_size = one_side('kernel_size', mixer.pop('kernel_size'))
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError('The kernel_size of a mixer must be odd and positive, so that it keeps '
                         f'the size of the map; got {kernel_size}.')
    return build_conv_layer(mixer, channels, channels, kernel_size, stride=stride,
                            padding=dilation * (kernel_size // 2), dilation=dilation)


def check_one_mixer(mixer: Optional[dict], mix: str, acmix_cfg: Optional[dict]) -> None:
    """Raise ValueError if ``mixer`` is combined with arguments of ACmix, which it replaces."""
    if mixer is not None and (mix != 'acmix' or acmix_cfg):
        raise ValueError(f'mixer replaces ACmix, so it cannot be combined with mix={mix!r} and '
                         f'acmix_cfg={acmix_cfg}; give one of the two.')


def has_other_names(module: nn.Module, prefix: str, keys: Collection[str]) -> bool:
    """Whether a checkpoint's weights for a module belong to another kind of module.

    Args:
        module: the module to load.
        prefix: name of the module in the checkpoint, with the dot.
        keys: all keys of the checkpoint.
    """
    theirs = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return theirs != set(module.state_dict())
