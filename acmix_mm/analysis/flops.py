"""Parameters and multiply-adds of a network, by operator class.

The ACmix layers and involution report multiply-adds from the papers' equations (see
:meth:`acmix_mm.layers.base.OperatorLayer.multiply_adds`), not from the operations of a backend: a
query has kernel_size² neighbours, or those of its window, of the reduced map or of a pattern of the
whole map, and pairs that a backend computes and then masks do not count. As in the authors' code
for Swin, the convolution path counts in two steps, although some backends run both as one
convolution: k² multiply-adds for each channel of queries, keys and values in the fc, and k⁴ for
each output channel in the shifts. Involution counts kernel_size² for each output, and the two
convolutions that generate its kernels.
Everything else is counted by torch's ``FlopCounterMode``. One multiplication and one addition count
as one; norms, activations, pooling, interpolation, biases and softmax do not count.

This module only needs torch.
"""

from collections.abc import Mapping
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.layers.base import OPERATOR_CLASSES, REST, OperatorLayer


class Count(NamedTuple):
    """Number of parameters, and of multiply-adds in one forward pass."""

    parameters: int
    multiply_adds: int


def count(model: nn.Module, run: Callable[[], Any]) -> dict[str, Count]:
    """Count a network by operator class.

    ``projections`` are ACmix's q, k, v and output projections, and the reduction of keys and values
    in a PVT; ``attention`` is the rest of the attention path; ``convolution path`` is fc and
    shifts; ``rest`` is the rates and everything outside ACmix layers, including involution.

    Args:
        model: the network; may be on ``meta``.
        run: runs the forward pass.

    Returns:
        For each of ``OPERATOR_CLASSES``, the parameters of ``model`` and the multiply-adds of
        ``run``.
    """
    multiply_adds = dict.fromkeys(OPERATOR_CLASSES, 0)
    flops_before = 0
    flops_inside = 0

    def enter(layer: OperatorLayer, inputs: tuple[Tensor, ...]) -> None:
        nonlocal flops_before
        flops_before = counter.get_total_flops()

    def leave(layer: OperatorLayer, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal flops_inside
        # What torch counted inside the layer is replaced by what the layer reports.
        flops_inside += counter.get_total_flops() - flops_before
        for name, number in layer.multiply_adds(inputs[0], out).items():
            multiply_adds[name] += number

    handles = []
    for layer in operator_layers(model):
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    multiply_adds[REST] += (counter.get_total_flops() - flops_inside) // 2
    parameters = count_parameters(model)
    return {name: Count(parameters[name], multiply_adds[name]) for name in OPERATOR_CLASSES}


def total(counts: Mapping[str, Count]) -> Count:
    """Sum over the operator classes."""
    return Count(*map(sum, zip(*counts.values())))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of a network by operator class."""
    parameters = dict.fromkeys(OPERATOR_CLASSES, 0)
    for layer in operator_layers(model):
        for name, parameter in layer.named_parameters():
            operator_class = layer.parameter_classes.get(name.split('.')[0], REST)
            parameters[operator_class] += parameter.numel()
    everything = sum(parameter.numel() for parameter in model.parameters())
    parameters[REST] += everything - sum(parameters.values())
    return parameters


def operator_layers(model: nn.Module) -> list[OperatorLayer]:
    """The layers of a network that report their cost."""
    return [module for module in model.modules() if isinstance(module, OperatorLayer)]
