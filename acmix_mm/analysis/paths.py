"""The two paths of the ACmix layers of a backbone, run on one image."""

import math
from collections.abc import Sequence
from typing import Any, Callable

import torch
from torch import Tensor, nn

from acmix_mm.analysis.rates import stage_of
from acmix_mm.layers.base import TwoPathLayer


def last_layers(backbone: nn.Module) -> dict[str, str]:
    """Map each stage that has ACmix layers to the name of the last one."""
    return {stage_of(name): name for name, module in backbone.named_modules()
            if isinstance(module, TwoPathLayer)}


def inputs_of(model: nn.Module, layers: dict[str, nn.Module],
              run: Callable[[], Any]) -> dict[str, Tensor]:
    """Record the inputs of layers while ``run`` runs the model without gradients in eval mode.

    Args:
        model: contains the layers.
        layers: the layers, by any names.
        run: calls the model once.

    Returns:
        The first argument of each layer that is called, by the same names.
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


def path_energies(layer: TwoPathLayer, x: Tensor) -> Tensor:
    """Root mean square over the channels of what each path contributes to a layer's output.

    Args:
        layer: has both paths and is in evaluation mode.
        x: its input for one image.

    Returns:
        (2, height, width) of the output: attention and convolution, each scaled by its rate.
    """
    channels = 3 if layer.channels_last else 1
    return torch.stack([path.square().mean(channels)[0].sqrt() for path in layer.path_outputs(x)])


def stride(size: Sequence[int], map_size: Sequence[int]) -> int:
    """Stride of a map in pixels, from the sizes of the image and the map.

    Networks may round sizes up, so this is the nearest power of two, as all strides here are.
    """
    return 2**round(math.log2(max(extent / positions for extent, positions in zip(size, map_size))))
