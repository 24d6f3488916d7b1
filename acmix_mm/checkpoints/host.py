"""What each host declares about its checkpoints: how to recognise, rename and measure them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

from torch import Tensor

# Kinds of checkpoints, by the token mixer that their weights belong to.
PLAIN, ACMIX, ATTENTION, CONVOLUTION_PATH, INVOLUTION = (
    'plain', 'ACmix', 'attention only', 'the convolution path only', 'involution')


class HostCheckpoints(ABC):
    """Checkpoints of one host network, plain and ACmix.

    Defining a subclass registers an instance of it in ``HOSTS``. A state dict is recognised by at
    most one host, so the order of registration does not matter.

    Attributes:
        host: name of the host in messages, and key in ``HOSTS``.
        acmix_layer: pattern at the start of the name of every ACmix layer, relative to the
            backbone, in each naming with that layer structure; its group ``stage`` is the stage.
        first_stage: number of the first stage in those names.
        attention_parameters: ends of the names of parameters that only the attention path has.
            Without any, a convolution path alone cannot be told from ACmix.
        mixer_parameters: the kind of checkpoint by the end of the name of a parameter that no other
            kind has, for mixers other than ACmix and its convolution path. The attention of a Swin,
            PVT or SAN has the parameters of the plain host, so it cannot be told from it.
    """

    host: ClassVar[str]
    acmix_layer: ClassVar[re.Pattern[str]]
    first_stage: ClassVar[int] = 0
    attention_parameters: ClassVar[tuple[str, ...]] = ()
    mixer_parameters: ClassVar[dict[str, str]] = {'.span.weight': INVOLUTION}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        HOSTS[cls.host] = cls()

    @abstractmethod
    def to_backbone_keys(self, state_dict: Mapping[str, Tensor],
                         ) -> Optional[tuple[str, dict[str, Tensor]]]:
        """Convert a state dict to the keys of the backbone.

        Returns:
            Whose naming the state dict uses ("Microsoft's"), and the converted state dict; None if
            it does not belong to this host.
        """

    @abstractmethod
    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Infer the constructor arguments of the backbone from the shapes of its weights.

        Args:
            state_dict: weights under the keys of the backbone.

        Raises:
            KeyError: a required weight is missing.
            ValueError: the backbone has no such architecture, or the shapes do not determine it.
        """

    def is_acmix(self, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether weights, under the keys of the backbone, have the parameters of ACmix layers."""
        # Every ACmix layer with a convolution path has the light fully connected layer.
        return self.has_parameter(state_dict, '.fc.weight')

    def kind(self, state_dict: Mapping[str, Tensor]) -> str:
        """The kind of checkpoint that weights, under the keys of the backbone, come from.

        Returns:
            ``PLAIN``, ``ACMIX``, or a description of another token mixer.
        """
        if self.is_acmix(state_dict):
            has_both = not self.attention_parameters or self.has_parameter(
                state_dict, *self.attention_parameters)
            return ACMIX if has_both else CONVOLUTION_PATH
        for end, kind in self.mixer_parameters.items():
            if self.has_parameter(state_dict, end):
                return kind
        return PLAIN

    def has_parameter(self, state_dict: Mapping[str, Tensor], *ends: str) -> bool:
        """Whether a layer in the place of ACmix has a parameter whose name ends so.

        Args:
            state_dict: weights under the keys of the backbone.
            ends: ends of names.
        """
        return any(key.endswith(ends) and self.acmix_layer.search(key) for key in state_dict)


HOSTS: dict[str, HostCheckpoints] = {}


def stage_of_layer(name: str) -> Optional[str]:
    """The stage of a backbone's ACmix layer: 'stage N', numbered as in ``out_indices``.

    Args:
        name: name of the layer in its backbone, or in a model with a ``backbone``.

    Returns:
        None if the name is not one that a host gives to its layers.
    """
    for checkpoints in HOSTS.values():
        if match := checkpoints.acmix_layer.match(name.removeprefix('backbone.')):
            return f'stage {int(match["stage"]) - checkpoints.first_stage}'
    return None


def count_blocks(state_dict: Mapping[str, Tensor], pattern: str, first: int = 0) -> tuple[int, ...]:
    """Count the blocks of each stage.

    Args:
        state_dict: weights of the network.
        pattern: regular expression that matches one key of each block, with ``{}`` for the stage.
        first: number of the first stage.
    """
    counts: list[int] = []
    while blocks := sum(bool(re.fullmatch(pattern.format(len(counts) + first), key))
                        for key in state_dict):
        counts.append(blocks)
    return tuple(counts)
