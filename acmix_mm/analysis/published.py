"""The ten networks of the paper: what was published of them, and what they count here."""

from functools import partial
from typing import Any, NamedTuple, Optional

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from acmix_mm.analysis.flops import Count, count, total
from acmix_mm.backbones.resnet import ACmixBottleneck
from acmix_mm.backbones.san import ACmixSANBlock
from acmix_mm.layers.base import OperatorLayer

NUM_CLASSES = 1000
IMAGE_SIZE = 224


class Published(NamedTuple):
    """A network of the authors' table of ImageNet results (arXiv 2111.14556).

    Attributes:
        name: of the host and ACmix.
        backbone: how to build it here.
        width: channels that go into the classifier.
        parameters: in millions.
        multiply_adds: in billions, at 224×224.
        code_parameters: in millions, counted on the authors' code; None where they published none.
        elementwise: whether the host's authors count more than products.
        last_norm: whether the classifier brings a norm that the backbone here has not.
    """

    name: str
    backbone: dict[str, Any]
    width: int
    parameters: float
    multiply_adds: float
    code_parameters: Optional[float] = None
    elementwise: bool = False
    last_norm: bool = False


def resnet(depth: int, *figures: float) -> Published:
    backbone = dict(type='ACmixResNet', depth=depth, out_indices=(3,))
    return Published(f'ACmix-ResNet-{depth}', backbone, 2048, *figures, elementwise=True)


def san(depth: int, *figures: float) -> Published:
    backbone = dict(type='ACmixSAN', depth=depth, out_indices=(4,))
    return Published(f'ACmix-SAN-{depth}', backbone, 2048, *figures, elementwise=True)


def pvt(size: str, depths: tuple[int, ...], *figures: float) -> Published:
    backbone = dict(type='ACmixPyramidVisionTransformer', num_layers=depths)
    return Published(f'ACmix-PVT-{size}', backbone, 512, *figures, last_norm=True)


def swin(size: str, depths: tuple[int, ...], *figures: float) -> Published:
    backbone = dict(type='ACmixSwinTransformer', depths=depths, out_indices=(3,))
    return Published(f'ACmix-Swin-{size}', backbone, 768, *figures)


NETWORKS = (
    resnet(26, 10.6, 2.3, 10.49),
    resnet(38, 14.6, 2.9, 14.41),
    resnet(50, 18.6, 3.6, 18.33),
    san(10, 12.1, 1.9),
    san(15, 16.6, 2.7),
    san(19, 21.2, 3.4),
    pvt('T', (2, 2, 2, 2), 13, 2.0),
    pvt('S', (3, 4, 6, 3), 25, 3.9),
    swin('T', (2, 2, 6, 2), 30, 4.6, 28.65),
    swin('S', (2, 2, 18, 2), 51, 9.0, 50.35),
)

NOTES = '''\
Counted with a classifier of 1000 classes, on one picture of 224×224. Multiply-adds are those of
matrix products, convolutions and attention, fc and shifts in two steps. "+ elementwise" adds what
the tool of SAN's authors counts as well: two for each output of a norm, one for a ReLU, a pooled
value, a shortcut and a bias.

Where a row is off:
- ResNet: the published parameters exceed those of the authors' own code, which come out here to the
  digit. How the multiply-adds were counted is not published: with elementwise work ResNet-26 and
  ResNet-50 are 1 to 3 % lower. One more for each of the 49 copies of a key, to which the published
  code adds positions, would give 2.27G, 2.94G and 3.62G, but that is a guess, made to fit.
- SAN: no code was published, and no form that was tried has both published counts. The parameters
  of this one are 1 to 2 % lower; with elementwise work SAN-10 rounds to 2.0G, and to 1.9G where fc
  and shifts count as the one convolution that they make together (1.92G).
- PVT: no code was published; both round to the published figures.
- Swin: the published parameters exceed those of the authors' own code, which come out here to the
  digit. Swin-T's multiply-adds are 1 % above the published figure.'''


class Row(NamedTuple):
    """A network's counts, its classifier included; ``elementwise`` is None where none is due."""

    count: Count
    elementwise: Optional[int]


def count_network(network: Published) -> Row:
    """Build a network and count it on shapes alone."""
    model = MODELS.build(network.backbone).eval().to('meta')
    image = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device='meta')
    elementwise = []
    if network.elementwise:
        for name, module in model.named_modules():
            # What is inside conv_w is counted with its layer, which does not call all of it.
            if 'conv_w' not in name:
                module.register_forward_hook(
                    lambda *call: elementwise.append(elementwise_work(*call)))
    parameters, multiply_adds = total(count(model, partial(model, image)))
    parameters += (network.width + 1) * NUM_CLASSES + 2 * network.width * network.last_norm
    multiply_adds += network.width * NUM_CLASSES
    return Row(Count(parameters, multiply_adds), sum(elementwise) if elementwise else None)


def elementwise_work(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> int:
    """What the tool of SAN's authors counts beside products, of one module in a ResNet or SAN.

    A ReLU goes with the norm in front of it.
    """
    if isinstance(module, nn.BatchNorm2d):
        return 3 * out.numel()
    if isinstance(module, nn.MaxPool2d):
        return inputs[0].numel()
    if isinstance(module, (ACmixBottleneck, ACmixSANBlock)):
        return out.numel()
    if isinstance(module, OperatorLayer):
        return module.elementwise_operations(inputs[0], out)
    return 0


def zoo_table() -> str:
    """Published against counted, as Markdown, with the reasons where a row is off."""
    lines = ["| | parameters, published | authors' code | counted | "
             'multiply-adds, published | counted | + elementwise |', '|---' * 7 + '|']
    for network in NETWORKS:
        (parameters, multiply_adds), elementwise = count_network(network)
        code = network.code_parameters
        with_elementwise = (multiply_adds + (elementwise or 0)) / 1e9
        lines.append(
            f'| {network.name} | {network.parameters}M | {f"{code}M" if code else "–"} | '
            f'{parameters / 1e6:.2f}M | {network.multiply_adds}G | {multiply_adds / 1e9:.2f}G | '
            f'{"–" if elementwise is None else f"{with_elementwise:.2f}G"} |')
    return '\n'.join([*lines, '', NOTES])
