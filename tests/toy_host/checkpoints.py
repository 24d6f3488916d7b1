"""Checkpoints of the toy host, plain and ACmix."""

import re
from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor

from acmix_mm.checkpoints.host import HostCheckpoints, count_blocks


class ToyCheckpoints(HostCheckpoints):
    """One naming: that of the backbone."""

    host = 'Toy'
    acmix_layer = re.compile(r'toy_stages\.(?P<stage>\d+)\.\d+\.mixer\b')

    def to_backbone_keys(self, state_dict: Mapping[str, Tensor],
                         ) -> Optional[tuple[str, dict[str, Tensor]]]:
        if 'toy_stages.0.0.mixer.qkv.weight' not in state_dict:
            return None
        return "the toy authors'", dict(state_dict)

    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict(embed_dims=len(state_dict['toy_transitions.0.weight']),
                    depths=count_blocks(state_dict, r'toy_stages\.{}\.\d+\.norm\.weight'))
