"""The two paths of the ACmix layers of a backbone, at work on one picture."""

import math
from collections.abc import Sequence
from typing import Any, Callable

import torch
from torch import Tensor, nn

from acmix_mm.analysis.rates import stage_of
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix

LAYERS = (WindowACmix, ACmixConv2d, ReducedACmix, PatchwiseACmix)
CHANNELS_LAST = (WindowACmix, ReducedACmix)


def last_layers(backbone: nn.Module) -> dict[str, str]:
    """The name of the last ACmix layer of each stage that has one, by the stage's name."""
    return {stage_of(name): name for name, module in backbone.named_modules()
            if isinstance(module, LAYERS)}


def inputs_of(model: nn.Module, layers: dict[str, nn.Module],
              run: Callable[[], Any]) -> dict[str, Tensor]:
    """What each layer takes while ``run`` runs the model, without gradients and in evaluation mode.

    Args:
        model: has the layers.
        layers: the layers, by any names.
        run: calls the model, once.

    Returns:
        The first argument of each layer, by the same names.
    """
    inputs: dict[str, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(
        lambda _, arguments, name=name: inputs.update({name: arguments[0]}))
        for name, layer in layers.items()]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            run()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return inputs


@torch.no_grad()
def path_energies(layer: nn.Module, x: Tensor) -> Tensor:
    """How much each path adds to the output of a layer: root mean square over the channels.

    Args:
        layer: an ACmix layer with both paths, in evaluation mode.
        x: what it takes, for one picture.

    Returns:
        (2, height, width) of the output: of attention and of convolution, each times its rate.
    """
    out = layer(x)
    try:
        layer.mix = 'conv'
        convolution = layer(x)
    finally:
        layer.mix = 'acmix'
    channels = 3 if isinstance(layer, CHANNELS_LAST) else 1
    return torch.stack([each.square().mean(channels)[0].sqrt()
                        for each in (out - convolution, convolution)])


def map_size(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    """(height, width) of what a layer takes."""
    return tuple(x.shape[1:3] if isinstance(layer, CHANNELS_LAST) else x.shape[2:])


def stride(size: Sequence[int], map_size: Sequence[int]) -> int:
    """Pixels from one position of a map to the next, from the sizes of the picture and the map.

    Where the network rounded a size, it is the nearest power of two, as in all networks here.
    """
    return 2**round(math.log2(max(extent / positions for extent, positions in zip(size, map_size))))
