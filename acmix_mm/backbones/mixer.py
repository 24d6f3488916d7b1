"""Other operators in the place of ACmix: what a backbone's argument ``mixer`` builds."""

from collections.abc import Collection
from typing import Any, Optional

from mmcv.cnn import build_conv_layer
from torch import nn

from acmix_mm.layers.padded_conv import one_side


def build_mixer(mixer: dict[str, Any], channels: int, stride: int = 1,
                dilation: int = 1) -> nn.Module:
    """Build an OpenMMLab convolution type that keeps channels, and at stride 1 the size.

    Args:
        mixer: its config, with the type. Where it does not say, ``kernel_size`` is 3, and ``bias``
            is False.
        channels: of the input and of the output.
        stride: distance of output positions.
        dilation: distance of taps.

    Raises:
        ValueError: ``kernel_size`` is even or not square, or the type refuses an argument.
    """
    mixer = {**dict(kernel_size=3, bias=False), **mixer}
    kernel_size = one_side('kernel_size', mixer.pop('kernel_size'))
    if kernel_size % 2 == 0:
        raise ValueError('The kernel_size of a mixer must be odd, so that it keeps the size of '
                         f'the map; got {kernel_size}.')
    return build_conv_layer(mixer, channels, channels, kernel_size, stride=stride,
                            padding=dilation * (kernel_size // 2), dilation=dilation)


def check_one_mixer(mixer: Optional[dict], mix: str, acmix_cfg: Optional[dict]) -> None:
    """Raise ValueError where another mixer than ACmix is given, and options of ACmix as well."""
    if mixer is not None and (mix != 'acmix' or acmix_cfg):
        raise ValueError(f'mixer takes the place of ACmix, of which mix={mix!r} and acmix_cfg='
                         f'{acmix_cfg} say something: give one of the two.')


def has_other_names(module: nn.Module, prefix: str, keys: Collection[str]) -> bool:
    """Whether weights that a checkpoint has for a module are of another kind of module.

    Args:
        module: takes the weights.
        prefix: its name in the checkpoint, with the dot.
        keys: of the checkpoint.
    """
    theirs = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
    return theirs != set(module.state_dict())
