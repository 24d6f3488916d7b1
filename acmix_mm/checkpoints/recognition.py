"""Recognising which network the weights of a checkpoint belong to."""

from typing import NamedTuple, Optional

from torch import Tensor

from acmix_mm.checkpoints.host import ACMIX, CONVOLUTION_PATH, HOSTS, PLAIN
from acmix_mm.checkpoints.reading import Weights, read_weights
from acmix_mm.utils.errors import CheckpointError


class Pretrained(NamedTuple):
    """Weights whose network has been recognised.

    Attributes:
        host: name of the host in ``HOSTS``.
        kind: ``PLAIN``, ``ACMIX``, or a description of another token mixer; see
            :meth:`acmix_mm.checkpoints.host.HostCheckpoints.kind`.
        naming: whose naming the checkpoint uses.
        weights: the weights, under the keys of the backbone, and their source.
    """

    host: str
    kind: str
    naming: str
    weights: Weights

    @property
    def is_acmix(self) -> bool:
        """Whether the weights include the convolution path of ACmix."""
        return self.kind in (ACMIX, CONVOLUTION_PATH)

    @property
    def source(self) -> str:
        return self.weights.source

    @property
    def state_dict(self) -> dict[str, Tensor]:
        return self.weights.state_dict

    def with_state_dict(self, state_dict: dict[str, Tensor]) -> 'Pretrained':
        """The same network with other weights, under the keys of the backbone."""
        return self._replace(weights=self.weights._replace(state_dict=state_dict))

    def __str__(self) -> str:
        network = {PLAIN: f'plain {self.host}', ACMIX: f'ACmix-{self.host}'}.get(
            self.kind, f'{self.host} with {self.kind}')
        return ', '.join(filter(None, [network, f'{self.naming} naming', self.weights.part]))


def read_pretrained(source: str, host: Optional[str] = None) -> Pretrained:
    """Read the weights of a checkpoint and recognise their network by its keys.

    Args:
        source: see :func:`acmix_mm.checkpoints.reading.read_checkpoint`.
        host: name in ``HOSTS`` of the only host to accept; any if None.

    Raises:
        CheckpointError: the checkpoint cannot be read, or holds an unknown network or one of
            another host.
    """
    weights = read_weights(source)
    for checkpoints in HOSTS.values():
        converted = checkpoints.to_backbone_keys(weights.state_dict)
        if converted is None:
            continue
        naming, state_dict = converted
        found = Pretrained(checkpoints.host, checkpoints.kind(state_dict), naming,
                           weights._replace(state_dict=state_dict))
        if host not in (None, found.host):
            raise CheckpointError(f'The checkpoint {source} is of another network ({found}): this '
                                  f'model needs one of a {host}, plain or ACmix.')
        return found
    raise CheckpointError(f'The checkpoint {source} is of no known network '
                          f'({", ".join(HOSTS)}; plain or ACmix): its keys are '
                          f'{", ".join(list(weights.state_dict)[:6])}, …')
