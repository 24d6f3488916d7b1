"""The networks of the paper: published counts next to ours."""

from functools import partial
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn

from acmix_mm.analysis.flops import Count, count, operator_layers, total
from acmix_mm.backbones.base import BACKBONES, ACmixBackbone, PaperNetwork
from acmix_mm.layers.base import OperatorLayer
from acmix_mm.utils.markdown import table

NUM_CLASSES = 1000
IMAGE_SIZE = 224

# Every network of the paper with its backbone, in the order of the paper's table.
NETWORKS: tuple[tuple[type[ACmixBackbone], PaperNetwork], ...] = tuple(
    (backbone, network) for backbone in BACKBONES.values() for network in backbone.paper_networks)

NOTES = '''\
Counted with a classifier of 1000 classes, for one image of 224×224. Multiply-adds are those of
matrix products, convolutions and attention, with the fc and the shifts of the convolution path as
two steps. "+ elementwise" adds what the tool of SAN's authors also counts: two for each output of a
norm, and one for each ReLU, pooled value, shortcut and bias.

Where the counts differ from the published ones:

- **ResNet.** The published parameters exceed those of the authors' own code, which our counts match
  exactly. The paper does not say how multiply-adds were counted. With elementwise operations,
  ResNet-26 and ResNet-50 are 1 to 3 % lower. One more multiply-add for each of the 49 copies of a
  key to which the published code adds positions would give 2.27G, 2.94G and 3.62G, but that is a
  guess that was made to fit.
- **SAN.** No code was published, and no variant that we tried has both published counts. The
  parameters of this one are 1 to 2 % lower. With elementwise operations SAN-10 rounds to 2.0G, and
  to 1.9G if the fc and the shifts are counted as one convolution (1.92G).
- **PVT.** No code was published. Both counts round to the published figures.
- **Swin.** The published parameters exceed those of the authors' own code, which our counts match
  exactly. The multiply-adds of Swin-T are 1 % above the published figure.'''


class PaperCount(NamedTuple):
    """Counts of a network and its classifier.

    Attributes:
        count: parameters and multiply-adds.
        elementwise: elementwise operations, or None if the published counts do not include them.
    """

    count: Count
    elementwise: Optional[int]


def count_network(backbone: type[ACmixBackbone], network: PaperNetwork) -> PaperCount:
    """Count a network and its classifier for one image of 224×224, on ``meta``."""
    last = len(backbone.stage_blocks_of(backbone.arguments(network.arguments))) - 1
    model = backbone(**network.arguments, out_indices=(last,)).eval().to('meta')
    image = torch.empty(1, 3, IMAGE_SIZE, IMAGE_SIZE, device='meta')
    elementwise: list[int] = []
    if backbone.counts_elementwise:
        # Operator layers report their own operations, and do not call all of their submodules.
        inside = {module for layer in operator_layers(model) for module in layer.modules()
                  if module is not layer}
        for module in model.modules():
            if module not in inside:
                module.register_forward_hook(
                    lambda *call: elementwise.append(elementwise_operations(*call)))
    parameters, multiply_adds = total(count(model, partial(model, image)))
    width = model.stage_info[last].channels
    parameters += (width + 1) * NUM_CLASSES + 2 * width * backbone.classifier_norm
    multiply_adds += width * NUM_CLASSES
    return PaperCount(Count(parameters, multiply_adds), sum(elementwise) if elementwise else None)


def elementwise_operations(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> int:
    """Count a module's elementwise operations as the SAN authors' tool does.

    The ReLU after each norm is counted with the norm.
    """
    if isinstance(module, nn.BatchNorm2d):
        return 3 * out.numel()
    if isinstance(module, nn.MaxPool2d):
        return inputs[0].numel()
    if isinstance(module, OperatorLayer):
        return module.elementwise_operations(inputs[0], out)
    return out.numel() if getattr(module, 'adds_shortcut', False) else 0


def published_counts_table() -> str:
    """Compare published and our counts as Markdown, with notes on the differences."""
    rows = [('network', 'parameters, published', "authors' code", 'counted',
             'multiply-adds, published', 'counted', '+ elementwise')]
    for backbone, network in NETWORKS:
        (parameters, multiply_adds), elementwise = count_network(backbone, network)
        code = network.code_parameters
        rows.append((
            network.name, f'{network.parameters}M', f'{code}M' if code else '–',
            f'{parameters / 1e6:.2f}M', f'{network.multiply_adds}G', f'{multiply_adds / 1e9:.2f}G',
            '–' if elementwise is None else f'{(multiply_adds + elementwise) / 1e9:.2f}G'))
    return f'{table(rows)}\n\n{NOTES}'
