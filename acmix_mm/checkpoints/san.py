"""Checkpoints of SANs, patch-wise self-attention networks (arXiv 2004.13621), plain and ACmix."""

import re
from collections.abc import Mapping
from typing import Any, Optional

from torch import Tensor

from acmix_mm.checkpoints.host import HostCheckpoints, count_blocks

# Blocks of the five stages by depth, as in the code of SAN's authors.
STAGE_BLOCKS: dict[int, tuple[int, ...]] = {
    10: (2, 1, 2, 4, 1), 15: (3, 2, 3, 5, 2), 19: (3, 3, 4, 6, 3)}


class SANCheckpoints(HostCheckpoints):
    """Checkpoints for ``ACmixSAN``, whose keys are those of SAN's authors."""

    host = 'SAN'
    acmix_layer = re.compile(r'layer(?P<stage>\d+)\.\d+\.sam\b')
    attention_parameters = ('.conv_w.0.weight',)

    def to_backbone_keys(self, state_dict: Mapping[str, Tensor],
                         ) -> Optional[tuple[str, dict[str, Tensor]]]:
        if {'conv_in.weight', 'layer0.0.sam.conv1.weight'} <= set(state_dict):
            return "the SAN authors'", dict(state_dict)
        return None

    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        blocks = count_blocks(state_dict, r'layer{}\.\d+\.bn1\.weight')
        if len(blocks) != 5:
            raise ValueError(f'a SAN has five stages, and it has {len(blocks)}')
        depths = {known: depth for depth, known in STAGE_BLOCKS.items()}
        base_channels, in_channels = state_dict['conv_in.weight'].shape[:2]
        arguments: dict[str, Any] = dict(
            depth=depths.get(blocks, 10), in_channels=in_channels, base_channels=base_channels)
        if blocks not in depths:
            arguments.update(stage_blocks=blocks)
        return arguments
