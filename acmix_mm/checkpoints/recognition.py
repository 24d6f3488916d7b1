"""Weights that exist, of ACmix networks and of their plain hosts, under the names used here.

One file for each host tells its namings apart and renames.
"""

import re
from typing import NamedTuple, Optional

from torch import Tensor

from acmix_mm.checkpoints import pvt, resnet, san, swin
from acmix_mm.checkpoints.reading import Weights, read_weights
from acmix_mm.utils.errors import CheckpointError

# The light fully connected layer, which every ACmix layer with a convolution path has.
OF_ACMIX = re.compile(r'\.(w_msa|attn|sam|conv2)\.fc\.weight$')
HOSTS = {
    'Swin': swin.to_backbone_names,
    'PVT': pvt.to_backbone_names,
    'ResNet': resnet.to_backbone_names,
    'SAN': san.to_backbone_names,
}


class Pretrained(NamedTuple):
    """Weights whose network has been recognised.

    Attributes:
        host: the name of the host in ``HOSTS``.
        is_acmix: whether they have ACmix's own parameters, or are of the plain host.
        naming: whose names the checkpoint used.
        weights: where they come from, and the weights under the names of the backbones here.
    """

    host: str
    is_acmix: bool
    naming: str
    weights: Weights

    @property
    def source(self) -> str:
        return self.weights.source

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.state_dict

    def __str__(self) -> str:
        kind = f'{"ACmix-" if self.is_acmix else "plain "}{self.host}'
        return ', '.join(filter(None, [kind, f'{self.naming} naming', self.weights.part]))


def read_pretrained(source: str, host: Optional[str] = None) -> Pretrained:
    """Load the weights of a checkpoint and recognise, from their keys, what they are of.

    Args:
        source: as :func:`acmix_mm.checkpoints.reading.read_checkpoint` takes.
        host: the host in ``HOSTS`` whose weights alone are of use.

    Raises:
        CheckpointError: it cannot be read, or is of no network or another one than asked for.
    """
    weights = read_weights(source)
    for name, to_backbone_names in HOSTS.items():
        renamed = to_backbone_names(weights.state_dict)
        if renamed is None:
            continue
        naming, state_dict = renamed
        is_acmix = any(map(OF_ACMIX.search, state_dict))
        found = Pretrained(name, is_acmix, naming, weights._replace(state_dict=state_dict))
        if host not in (None, name):
            raise CheckpointError(f'The checkpoint {source} is of another network ({found}): what '
                                  f'is needed here is one of a {host}, plain or ACmix.')
        return found
    raise CheckpointError(f'The checkpoint {source} is of none of the networks that are known here '
                          f'({", ".join(HOSTS)}; plain or ACmix): its keys are '
                          f'{", ".join(list(weights.state_dict)[:6])}, …')
