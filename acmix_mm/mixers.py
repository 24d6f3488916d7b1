"""The operators that a comparison puts into the same skeleton, by one name each for all backbones.

``conv`` is a plain 3×3 convolution, ``attn`` the local attention of the host (a sliding window in
a ResNet, shifted windows in a Swin), ``acmix`` both on shared projections (arXiv 2111.14556),
``acmix-conv`` ACmix's convolution path alone, and ``involution`` (arXiv 2103.06255) stands between
convolution and attention.
"""

import copy
from typing import Any

from .errors import UsageError

INVOLUTION = dict(type='Involution', kernel_size=7)

# What differs in the config of a backbone; every other argument is the same.
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    'ACmixResNet': {
        'conv': dict(acmix_stages=()),
        'attn': dict(mix='attn'),
        'acmix': dict(mix='acmix'),
        'acmix-conv': dict(mix='conv'),
        'involution': dict(mixer=INVOLUTION),
    },
    'ACmixSwinTransformer': {
        'conv': dict(mixer=dict(type='Conv2d', kernel_size=3)),
        'attn': dict(mix='attn'),
        'acmix': dict(mix='acmix'),
        'acmix-conv': dict(mix='conv'),
        'involution': dict(mixer=INVOLUTION),
    },
}
MIXERS: tuple[str, ...] = tuple(OPTIONS['ACmixResNet'])


def mixer_options(backbone: str, mixer: str) -> dict[str, Any]:
    """What to put into the config of a backbone that mixes by ``acmix``, to exchange its mixer.

    Args:
        backbone: its type, ``'ACmixResNet'`` or ``'ACmixSwinTransformer'``.
        mixer: one of ``MIXERS``.

    Raises:
        UsageError: there is no such mixer, or the backbone's cannot be exchanged.
    """
    if mixer not in MIXERS:
        raise UsageError(f'There is no mixer {mixer!r}; name one of {", ".join(MIXERS)}.')
    if backbone not in OPTIONS:
        raise UsageError(f'The mixer of a {backbone} cannot be exchanged by name; take a config '
                         f'with one of these backbones: {", ".join(OPTIONS)}.')
    return copy.deepcopy(OPTIONS[backbone][mixer])
