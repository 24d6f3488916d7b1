"""The operators that a comparison puts into the same skeleton, by one name each for all backbones.

``conv`` is a plain 3×3 convolution, and ``conv7`` one of 7×7, the usual reach of local attention;
``attn`` is the attention of the host (a sliding window in a ResNet, shifted windows in a Swin, a
reduced map in a PVT, patches in a SAN), ``acmix`` both on shared projections (arXiv 2111.14556),
and ``acmix-conv`` ACmix's convolution path alone; ``involution`` of 7×7 (arXiv 2103.06255) stands
between convolution and attention. PVT and SAN have the three of ACmix.
"""

from copy import deepcopy
from typing import Any

from mmengine.config import ConfigDict

from acmix_mm.utils.errors import UsageError

MIXES = {'attn': dict(mix='attn'), 'acmix': dict(mix='acmix'), 'acmix-conv': dict(mix='conv')}
SEVEN = {
    'conv7': dict(mixer=dict(type='Conv2d', kernel_size=7)),
    'involution': dict(mixer=dict(type='Involution', kernel_size=7)),
}

# What differs in the config of a backbone; every other argument is the same.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    'ACmixResNet': {'conv': dict(acmix_stages=()), **MIXES, **SEVEN},
    'ACmixSwinTransformer': {
        'conv': dict(mixer=dict(type='Conv2d', kernel_size=3)), **MIXES, **SEVEN},
    'ACmixPyramidVisionTransformer': MIXES,
    'ACmixSAN': MIXES,
}
MIXERS: tuple[str, ...] = tuple(OPTIONS['ACmixResNet'])


def mixer_options(backbone: str, mixer: str) -> dict[str, Any]:
    """What to put into the config of a backbone that mixes by ``acmix``, to exchange its mixer.

    Args:
        backbone: its type, a key of ``OPTIONS``.
        mixer: one of ``MIXERS``.

    Raises:
        UsageError: there is no such mixer, or not in this backbone.
    """
    if mixer not in MIXERS:
        raise UsageError(f'There is no mixer {mixer!r}; name one of {", ".join(MIXERS)}.')
    if backbone not in OPTIONS:
        raise UsageError(f'The backbone {backbone} has no mixer to exchange; take a config with '
                         f'one that has: {", ".join(OPTIONS)}.')
    if mixer not in OPTIONS[backbone]:
        raise UsageError(f'The backbone {backbone} does not take the mixer {mixer}; it takes '
                         f'{", ".join(OPTIONS[backbone])}.')
    return deepcopy(OPTIONS[backbone][mixer])


def with_mixer(backbone: ConfigDict, mixer: str) -> ConfigDict:
    """The config of a backbone with a mixer, and what belongs to it, in place of its own.

    Raises:
        UsageError: as :func:`mixer_options`.
    """
    options = mixer_options(backbone.type, mixer)
    backbone = deepcopy(backbone)
    for key in ('mix', 'mixer'):
        backbone.pop(key, None)
    if not backbone.get('acmix_stages', True):
        del backbone['acmix_stages']
    if 'mixer' in options:
        backbone.pop('acmix_cfg', None)
    backbone.update(options)
    return backbone
