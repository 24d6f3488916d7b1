"""Checkpoints of ResNets with bottleneck blocks (arXiv 1512.03385), plain and ACmix."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

from torch import Tensor

from acmix_mm.checkpoints.host import ATTENTION, PLAIN, HostCheckpoints, count_blocks

# Blocks of the four stages by depth, as in the code of ACmix's authors.
STAGE_BLOCKS: dict[int, tuple[int, ...]] = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}


class ResNetCheckpoints(HostCheckpoints):
    """Checkpoints for ``ACmixResNet``, whose keys are torchvision's."""

    host = 'ResNet'
    # Not conv2 alone: conv_cfg=dict(type='ACmix') replaces other convolutions in other ResNets.
    acmix_layer = re.compile(r'layer(?P<stage>\d+)\.\d+\.conv')
    first_stage = 1
    attention_parameters = ('.conv_p.weight',)
    mixer_parameters: ClassVar = {**HostCheckpoints.mixer_parameters, '.conv_p.weight': ATTENTION}

    def to_backbone_keys(self, state_dict: Mapping[str, Tensor],
                         ) -> Optional[tuple[str, dict[str, Tensor]]]:
        """Rename timm's stems of three convolutions.

        All other keys of torchvision, timm, MMDetection, MMSegmentation, MMPretrain and the authors
        of ACmix agree.
        """
        if 'layer1.0.conv1.weight' not in state_dict:
            return None
        if 'conv1.weight' in state_dict or 'stem.0.weight' in state_dict:
            return "torchvision's", dict(state_dict)
        if 'conv1.0.weight' not in state_dict:
            return None
        # The last norm of the stem is bn1 in timm.
        return "timm's", {re.sub(r'^bn1\.', 'stem.7.', re.sub(r'^conv1\.', 'stem.', key)): value
                          for key, value in state_dict.items()}

    def kind(self, state_dict: Mapping[str, Tensor]) -> str:
        kind = super().kind(state_dict)
        # Larger convolutions have the names of the plain host's.
        is_larger = kind == PLAIN and any(
            side > 3 for key, value in state_dict.items() for side in value.shape[2:]
            if re.fullmatch(r'layer\d\.\d+\.conv2\.weight', key))
        return 'convolutions larger than 3×3' if is_larger else kind

    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        if 'layer1.0.conv3.weight' not in state_dict:
            raise ValueError('its blocks are not the bottlenecks of ResNet-26, 38, 50 and deeper')
        blocks = count_blocks(state_dict, r'layer{}\.\d+\.conv1\.weight', first=1)
        depths = {known: depth for depth, known in STAGE_BLOCKS.items()}
        deep_stem = 'stem.0.weight' in state_dict
        arguments: dict[str, Any] = dict(
            depth=depths.get(blocks, 50),
            in_channels=state_dict['stem.0.weight' if deep_stem else 'conv1.weight'].shape[1],
            base_channels=len(state_dict['layer1.0.conv1.weight']),
            deep_stem=deep_stem,
            avg_down='layer1.0.downsample.0.weight' not in state_dict)
        stem_channels = len(state_dict['stem.6.weight' if deep_stem else 'conv1.weight'])
        if stem_channels != arguments['base_channels']:
            arguments.update(stem_channels=stem_channels)
        if blocks not in depths:
            arguments.update(stage_blocks=blocks)
        acmix_stages = tuple(stage for stage in range(4)
                             if f'layer{stage + 1}.0.conv2.fc.weight' in state_dict)
        if acmix_stages:
            fc = state_dict[f'layer{acmix_stages[0] + 1}.0.conv2.fc.weight']
            arguments.update(num_heads=fc.shape[1] // 3, acmix_stages=acmix_stages)
        return arguments
