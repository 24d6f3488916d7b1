"""The rates of the two paths, layer by layer (arXiv 2111.14556, section 5.4)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from acmix_mm.checkpoints.reading import read_model_weights
from acmix_mm.utils.errors import CheckpointError, UsageError

# The parts of a detector or segmentor in the order in which a picture passes them.
PARTS = ('backbone', 'neck', 'rpn_head', 'roi_head', 'bbox_head', 'mask_head', 'decode_head',
         'auxiliary_head')
HISTORY = re.compile(r'(epoch|iter)_(\d+)\.pth')
# What the names of the four hosts' layers look like.
NETWORKS = {
    'ACmix-Swin': re.compile(r'(stages|layers)\.\d+\.blocks\.\d+\.attn\b'),
    'ACmix-PVT': re.compile(r'layers\.\d+\.1\.\d+\.attn\b'),
    'ACmix-SAN': re.compile(r'layer\d+\.\d+\.sam\b'),
    'ACmix-ResNet': re.compile(r'layer\d+\.\d+\.conv2\b'),
}
STAGE = re.compile(r'(?:backbone\.)?(stages\.|layers\.|layer)(\d+)\.')


class Rates(NamedTuple):
    """The rates of every ACmix layer of one network.

    Attributes:
        source: where they come from, for messages and titles.
        layers: names of the layers, from the input to the output.
        attention: rate1, the paper's α, of each layer; float64.
        convolution: rate2, the paper's β, of each layer; float64.
    """

    source: str
    layers: tuple[str, ...]
    attention: np.ndarray
    convolution: np.ndarray

    @property
    def network(self) -> str:
        """What network the layers are of, for titles."""
        found = [name for name, pattern in NETWORKS.items()
                 if any(pattern.search(layer) for layer in self.layers)]
        return found[0] if found else 'ACmix layers'

    @property
    def bias(self) -> np.ndarray:
        """log|α/β| of each layer, natural: positive where attention weighs more; infinite where
        one rate is zero, and not a number where both are.
        """
        with np.errstate(divide='ignore', invalid='ignore'):
            return np.log(np.abs(self.attention)) - np.log(np.abs(self.convolution))


def rates_of(state_dict: Mapping[str, Tensor], source: str) -> Rates:
    """The rates among the weights of a backbone, or of a whole detector or segmentor.

    Raises:
        UsageError: there are none.
    """
    layers = sorted((key.removesuffix('.rate1') for key in state_dict if key.endswith('.rate1')),
                    key=depth)
    if not layers:
        raise UsageError(f'{source} has no rates: it is of a plain network, or of one with one '
                         "path alone (mix='attn' or mix='conv'); name one with both paths.")
    # Stacked, a GPU hands them over at once.
    firsts = [state_dict[f'{layer}.rate1'].detach().reshape(()) for layer in layers]
    # Where there is one rate, the other is the rest of it.
    seconds = [state_dict.get(f'{layer}.rate2', 1 - first).detach().reshape(())
               for layer, first in zip(layers, firsts)]
    values = torch.stack(firsts + seconds)
    attention, convolution = values.double().cpu().numpy().reshape(2, -1)
    return Rates(source, tuple(layers), attention, convolution)


def depth(layer: str) -> tuple:
    """Sorts names of layers from the input to the output, numbers by their value."""
    part = layer.partition('.')[0]
    words = re.split(r'(\d+)', layer)
    return (PARTS.index(part) if part in PARTS else 0, *words[:1],
            *(int(word) if index % 2 == 0 else word for index, word in enumerate(words[1:])))


def stage_of(layer: str) -> str:
    """What stage a layer is in: 'stage 2', as ``out_indices`` counts, or the name of its group.

    The four hosts' names are known, ``stages.2.…``, ``layers.2.…`` and ``layer2.…``, of which
    ResNet's alone begin at one.
    """
    found = STAGE.match(layer)
    if found:
        first = 1 if found[1] == 'layer' and not layer.endswith('.sam') else 0
        return f'stage {int(found[2]) - first}'
    words = layer.split('.')
    numbers = [index for index, word in enumerate(words) if word.isdecimal()]
    return '.'.join(words[:numbers[-1]] if numbers else words[:-1])


def read_rates(source: str) -> list[Rates]:
    """Read the rates of a checkpoint, or those of a run, checkpoint by checkpoint.

    Args:
        source: a checkpoint, as :func:`acmix_mm.checkpoints.reading.read_checkpoint` takes, or the
            work directory of a run, of which all ``epoch_N.pth`` or ``iter_N.pth`` are read.

    Returns:
        One for a checkpoint; those of a run in the order of its training, all with the same layers.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the folder has none, or has checkpoints of
            different networks.
        UsageError: there are no rates.
    """
    if not Path(source).is_dir():
        return [rates_of(read_model_weights(source).state_dict, source)]
    history = [rates_of(read_model_weights(str(path)).state_dict, str(path))
               for path in checkpoints(source)]
    for rates in history[1:]:
        if rates.layers != history[0].layers:
            raise CheckpointError(f'{rates.source} is of another network than {history[0].source}: '
                                  'one folder is to hold one run; name the checkpoints one by one.')
    return history


def checkpoints(folder: Union[str, Path]) -> list[Path]:
    """The ``epoch_N.pth`` and ``iter_N.pth`` of a folder, in the order of training.

    Raises:
        CheckpointError: it has none.
    """
    found = {path: HISTORY.fullmatch(path.name) for path in Path(folder).iterdir()}
    numbered = sorted(((match[1], int(match[2])), path) for path, match in found.items() if match)
    if not numbered:
        raise CheckpointError(f'The folder {folder} holds no epoch_N.pth or iter_N.pth; name the '
                              'work directory of a run, or a checkpoint.')
    return [path for _, path in numbered]
