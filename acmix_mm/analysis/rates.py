"""The rates of the two paths, layer by layer (arXiv 2111.14556, section 5.4)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from acmix_mm.checkpoints.host import HOSTS, stage_of_layer
from acmix_mm.checkpoints.reading import read_model_weights
from acmix_mm.utils.errors import CheckpointError, UsageError

# The parts of a detector or segmentor, in the order in which they process an image.
PARTS = ('backbone', 'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head',
         'auxiliary_head')
CHECKPOINT_NAME = re.compile(r'(epoch|iter)_(\d+)\.pth')


class Rates(NamedTuple):
    """The rates of every ACmix layer of a network.

    Attributes:
        source: origin of the rates, for messages and titles.
        layers: names of the layers, from input to output.
        attention: rate1 of each layer, the paper's α; float64.
        convolution: rate2 of each layer, the paper's β; float64.
    """

    source: str
    layers: tuple[str, ...]
    attention: np.ndarray
    convolution: np.ndarray

    @property
    def network(self) -> str:
        """Name of the network, for titles."""
        found = (f'ACmix-{host}' for host, checkpoints in HOSTS.items()
                 if any(map(checkpoints.acmix_layer.search, self.layers)))
        return next(found, 'ACmix layers')

    @property
    def log_ratio(self) -> np.ndarray:
        """Natural logarithm of |α/β| for each layer, positive where attention has more weight.

        It is infinite where one rate is zero, and NaN where both are.
        """
        with np.errstate(divide='ignore', invalid='ignore'):
            return np.log(np.abs(self.attention)) - np.log(np.abs(self.convolution))


def rates_of(state_dict: Mapping[str, Tensor], source: str) -> Rates:
    """Collect the rates in the weights of a backbone, or of a whole detector or segmentor.

    Raises:
        UsageError: the weights contain no rates.
    """
    layers = sorted((key.removesuffix('.rate1') for key in state_dict if key.endswith('.rate1')),
                    key=layer_order)
    if not layers:
        raise UsageError(f'{source} has no rates: it is a baseline network, or has a single path '
                         "(mix='attn' or mix='conv'); use a network with both paths.")
    firsts = [state_dict[f'{layer}.rate1'].detach().reshape(()) for layer in layers]
    # A layer that has only rate1 weights the convolution path by its complement.
    seconds = [state_dict.get(f'{layer}.rate2', 1 - first).detach().reshape(())
               for layer, first in zip(layers, firsts)]
    # Stacked first, so that a GPU transfers all values at once.
    values = torch.stack(firsts + seconds)
    attention, convolution = values.double().cpu().numpy().reshape(2, -1)
    return Rates(source, tuple(layers), attention, convolution)


def layer_order(layer: str) -> tuple:
    """Sort key that orders layer names from input to output, with numbers compared by value."""
    part = layer.partition('.')[0]
    words = re.split(r'(\d+)', layer)
    return (PARTS.index(part) if part in PARTS else 0, *words[:1],
            *(int(word) if index % 2 == 0 else word for index, word in enumerate(words[1:])))


def stage_of(layer: str) -> str:
    """Name the stage of a backbone's layer, 'stage 2', or else the group that a layer is part of.

    The group is the module in front of the last number: ``neck.fpn_convs`` for
    ``neck.fpn_convs.0.conv``.
    """
    words = layer.split('.')
    numbers = [index for index, word in enumerate(words) if word.isdecimal()]
    group = words[:numbers[-1]] if numbers else words[:-1]
    return stage_of_layer(layer) or '.'.join(group)


def read_rates(source: str) -> list[Rates]:
    """Read the rates of a checkpoint, or of every checkpoint of a training run.

    Args:
        source: a checkpoint, as accepted by
            :func:`acmix_mm.checkpoints.reading.read_checkpoint`, or the work directory of a run,
            of which all ``epoch_N.pth`` or ``iter_N.pth`` are read.

    Returns:
        One element for a checkpoint; for a run one per checkpoint, in the order of training, all
        with the same layers.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the folder has no checkpoints, or
            checkpoints of different networks.
        UsageError: a checkpoint contains no rates.
    """
    if not Path(source).is_dir():
        return [rates_of(read_model_weights(source).state_dict, source)]
    history = [rates_of(read_model_weights(str(path)).state_dict, str(path))
               for path in run_checkpoints(source)]
    for rates in history[1:]:
        if rates.layers != history[0].layers:
            raise CheckpointError(f'{rates.source} and {history[0].source} belong to different '
                                  'networks: a folder must contain a single run; pass the '
                                  'checkpoints one by one.')
    return history


def run_checkpoints(folder: Union[str, Path]) -> list[Path]:
    """List the ``epoch_N.pth`` and ``iter_N.pth`` in a folder, in the order of training.

    Raises:
        CheckpointError: there are none.
    """
    found = {path: CHECKPOINT_NAME.fullmatch(path.name) for path in Path(folder).iterdir()}
    numbered = sorted(((match[1], int(match[2])), path) for path, match in found.items() if match)
    if not numbered:
        raise CheckpointError(f'The folder {folder} contains no epoch_N.pth or iter_N.pth; pass '
                              'the work directory of a run, or a checkpoint.')
    return [path for _, path in numbered]
