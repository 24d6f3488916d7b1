"""Parameters and multiply-adds of a network, by operator class, whichever forms its operators run.

Inside the four ACmix layers and involution multiply-adds follow from the papers' equations (arXiv
2111.14556, section 4.1, the hosts' papers, and arXiv 2103.06255, section 3.1), and not from the
arithmetic of a form: a query has kernel_size² neighbours, or those of its window or of the reduced
map, and pairs that a tiled form multiplies and masks do not count. The convolution path counts as
the authors' code for Swin counts it, in two steps: k² for each channel of queries, keys and values
in the fc, and k⁴ for each output channel in the shifts, though some forms run both as one
convolution. Involution counts kernel_size² for each output, beside the two convolutions that make
its kernels. Outside the layers torch's ``FlopCounterMode`` counts. One multiplication and one
addition are one; norms, activations, pooling, interpolation, biases and softmax are none.

It needs torch alone.
"""

from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.layers import (
    ACmixConv2d,
    Involution2d,
    PatchwiseACmix,
    ReducedACmix,
    WindowACmix,
)

PROJECTIONS, ATTENTION, CONVOLUTION, REST = CLASSES = (
    'projections', 'attention', 'convolution path', 'rest')

# Of what class a parameter of an ACmix layer is, by the first part of its name; the rates are rest.
CLASS_OF_PARAMETER = {
    **dict.fromkeys(('conv1', 'conv2', 'conv3', 'qkv', 'proj', 'attn', 'sr', 'norm'), PROJECTIONS),
    **dict.fromkeys(('conv_p', 'conv_w', 'relative_position_bias_table'), ATTENTION),
    **dict.fromkeys(('fc', 'dep_conv'), CONVOLUTION),
}


class Count(NamedTuple):
    """How many parameters, and multiply-adds of one forward pass."""

    parameters: int
    multiply_adds: int


def count(model: nn.Module, run: Callable[[], Any]) -> dict[str, Count]:
    """Count a network by operator class.

    ``projections`` are ACmix's q, k and v, the one out of attention, and the reduction in front of
    keys and values in PVT; ``attention`` is all else of the attention path; ``convolution path`` is
    fc and shifts; ``rest`` is their rates and everything outside ACmix layers, involution included.

    Args:
        model: on any device; on ``meta`` nothing is computed.
        run: makes the forward pass.

    Returns:
        For each of ``CLASSES``, parameters of ``model`` and multiply-adds of what ``run`` runs.
    """
    multiply_adds = dict.fromkeys(CLASSES, 0)
    flops_before = 0
    flops_inside = 0

    def enter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal flops_before
        flops_before = counter.get_total_flops()

    def leave(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal flops_inside
        # What the form at work takes is put aside for what the equations say.
        flops_inside += counter.get_total_flops() - flops_before
        for name, number in FORMULAS[type(layer)](layer, inputs[0], out).items():
            multiply_adds[name] += number

    handles = []
    for layer in counted_layers(model).values():
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    multiply_adds[REST] += (counter.get_total_flops() - flops_inside) // 2
    parameters = count_parameters(model)
    return {name: Count(parameters[name], multiply_adds[name]) for name in CLASSES}


def total(counts: Mapping[str, Count]) -> Count:
    """Sum over the operator classes."""
    return Count(*map(sum, zip(*counts.values())))


def counted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a network that have a formula, by name."""
    return {name: module for name, module in model.named_modules() if type(module) in FORMULAS}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """The parameters of a network, by operator class."""
    parameters = dict.fromkeys(CLASSES, 0)
    for layer in counted_layers(model).values():
        for name, parameter in layer.named_parameters():
            parameters[CLASS_OF_PARAMETER.get(name.split('.')[0], REST)] += parameter.numel()
    everything = sum(parameter.numel() for parameter in model.parameters())
    parameters[REST] += everything - sum(parameters.values())
    return parameters


def convolution_path(layer: nn.Module, channels: int, outputs: int) -> int:
    """Multiply-adds of fc and shifts; moving a map takes none.

    Args:
        layer: one with ``fc`` and ``dep_conv``.
        channels: of queries, keys and values together, over all positions that the fc mixes.
        outputs: positions that give an output.
    """
    num_shifts = len(layer.fc.matrix)
    kernels = layer.dep_conv.kernels
    shifts = 0 if kernels is None else num_shifts**2 * len(kernels) * outputs
    return num_shifts * channels + shifts


def count_acmix_conv(layer: ACmixConv2d, x: Tensor, out: Tensor) -> dict[str, int]:
    """Each output position attends to attn_kernel_size² others; see :func:`count` for the rest.

    x: (batch, in_channels, height, width); out: (batch, out_channels, out height, out width).
    """
    positions, outputs = x[:, 0].numel(), out[:, 0].numel()
    channels = layer.out_channels
    counts = {PROJECTIONS: 3 * positions * layer.in_channels * channels}
    if layer.mix != 'conv':
        encoding = 2 * (channels // layer.num_heads) * x[0, 0].numel()
        counts[ATTENTION] = 2 * outputs * layer.attn_kernel_size**2 * channels + encoding
    if layer.mix != 'attn':
        counts[CONVOLUTION] = convolution_path(layer, 3 * positions * channels, outputs)
    return counts


def count_window_acmix(layer: WindowACmix, x: Tensor, out: Tensor) -> dict[str, int]:
    """Each position attends to those of its window; attention's map is padded to whole windows.

    x and out: (batch, height, width, embed_dims).
    """
    batch, height, width, channels = x.shape
    window = (layer.window_size,) * 2
    if max(height, width) <= layer.window_size:
        window = (height, width)
    padded = batch * (-(-height // window[0]) * window[0]) * (-(-width // window[1]) * window[1])
    counts = {PROJECTIONS: 3 * padded * channels**2}
    if layer.mix != 'conv':
        counts[PROJECTIONS] += padded * channels**2
        counts[ATTENTION] = 2 * padded * window[0] * window[1] * channels
    if layer.mix != 'attn':
        positions = batch * height * width
        counts[CONVOLUTION] = convolution_path(layer, 3 * positions * channels, positions)
    return counts


def count_reduced_acmix(layer: ReducedACmix, x: Tensor, out: Tensor) -> dict[str, int]:
    """Each position attends to all cells of its picture's reduced map.

    The fc is linear, and mixes keys and values before they are spread over their cells.

    x and out: (batch, height, width, embed_dims).
    """
    batch, height, width, channels = x.shape
    positions = batch * height * width
    cells = max(height // layer.sr_ratio, 1) * max(width // layer.sr_ratio, 1)
    counts = {PROJECTIONS: (positions + 2 * batch * cells) * channels**2}
    if layer.sr_ratio > 1:
        counts[PROJECTIONS] += batch * cells * layer.sr_ratio**2 * channels**2
    if layer.mix != 'conv':
        counts[PROJECTIONS] += positions * channels**2
        counts[ATTENTION] = 2 * positions * cells * channels
    if layer.mix != 'attn':
        mixed = (positions + 2 * batch * cells) * channels
        counts[CONVOLUTION] = convolution_path(layer, mixed, positions)
    return counts


def count_patchwise_acmix(layer: PatchwiseACmix, x: Tensor, out: Tensor) -> dict[str, int]:
    """Two linear layers on each position and the keys around it make the weights of the values.

    x: (batch, in_channels, height, width); out: (batch, out_channels, height, width).
    """
    positions, channels = out[:, 0].numel(), out.shape[1]
    projected = positions * (2 * layer.rel_channels + channels)
    counts = {PROJECTIONS: x.shape[1] * projected}
    if layer.mix != 'conv':
        linear = sum(module.weight.numel() for module in layer.conv_w
                     if isinstance(module, nn.Conv2d))
        counts[ATTENTION] = positions * (linear + layer.kernel_size**2 * channels)
    if layer.mix != 'attn':
        counts[CONVOLUTION] = convolution_path(layer, projected, positions)
    return counts


def count_involution(layer: Involution2d, x: Tensor, out: Tensor) -> dict[str, int]:
    """Each output position makes kernel_size² weights for each group, and applies them.

    x: (batch, channels, height, width); out: (batch, channels, out height, out width).
    """
    generation = layer.reduce[0].weight.numel() + layer.span.weight.numel()
    application = layer.kernel_size[0]**2 * out.shape[1]
    return {REST: out[:, 0].numel() * (generation + application)}


FORMULAS = {
    ACmixConv2d: count_acmix_conv,
    WindowACmix: count_window_acmix,
    ReducedACmix: count_reduced_acmix,
    PatchwiseACmix: count_patchwise_acmix,
    Involution2d: count_involution,
}
