"""What takes the place of the mixer in a backbone, by name, for comparing one with another."""

from typing import Any

from acmix_mm.errors import UsageError

MIXERS: tuple[str, ...] = ('conv', 'attn', 'acmix', 'acmix-conv')
BY_MIX: dict[str, dict[str, Any]] = {
    'attn': dict(mix='attn'), 'acmix': dict(), 'acmix-conv': dict(mix='conv')}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    'ACmixResNet': dict(conv=dict(acmix_stages=()), **BY_MIX),
    'ACmixSwinTransformer': BY_MIX,
}


def mixer_options(backbone: str, mixer: str) -> dict[str, Any]:
    """What to put into the config of a backbone, so that it uses a mixer.

    Args:
        backbone: type of the backbone.
        mixer: one of ``MIXERS``.

    Raises:
        UsageError: the backbone is not ours, or does not have the mixer.
    """
    if backbone not in OPTIONS:
        raise UsageError(f'{backbone} has no mixer to choose; these have: {", ".join(OPTIONS)}.')
    if mixer not in OPTIONS[backbone]:
        raise UsageError(f'{backbone} has no mixer {mixer}; it has '
                         f'{", ".join(OPTIONS[backbone])}.')
    return OPTIONS[backbone][mixer]
