"""Checkpoints of ResNets (arXiv 1512.03385), plain and ACmix."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

from torch import Tensor

from acmix_mm.checkpoints.host import ATTENTION, PLAIN, HostCheckpoints, count_blocks

# Blocks of the four stages by depth; 26 and 38 are those of ACmix's authors.
STAGE_BLOCKS: dict[int, tuple[int, ...]] = {
    18: (2, 2, 2, 2), 26: (1, 2, 4, 1), 34: (3, 4, 6, 3), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3),
    101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
# Depths with basic blocks; all others have bottlenecks.
BASIC_DEPTHS = (18, 34)


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
        """Rename timm's and MMPretrain's stems of three convolutions.

        All other keys of torchvision, timm, MMDetection, MMSegmentation, MMPretrain and the authors
        of ACmix agree.
        """
        if 'layer1.0.conv1.weight' not in state_dict:
            return None
        if 'conv1.weight' in state_dict or 'stem.0.weight' in state_dict:
            return "torchvision's", dict(state_dict)
        if 'conv1.0.weight' in state_dict:
            # The last norm of the stem is bn1 in timm.
            return "timm's", {
                re.sub(r'^bn1\.', 'stem.7.', re.sub(r'^conv1\.', 'stem.', key)): value
                for key, value in state_dict.items()}
        if 'stem.0.conv.weight' in state_dict:
            return "MMPretrain's", {
                re.sub(r'^stem\.(\d)\.(conv|bn|gn)(?=\.)', stem_layer, key): value
                for key, value in state_dict.items()}
        return None

    def kind(self, state_dict: Mapping[str, Tensor]) -> str:
        kind = super().kind(state_dict)
        # Larger convolutions have the names of the plain host's.
        is_larger = kind == PLAIN and any(
            side > 3 for key, value in state_dict.items() for side in value.shape[2:]
            if re.fullmatch(r'layer\d\.\d+\.conv2\.weight', key))
        return 'convolutions larger than 3×3' if is_larger else kind

    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        kernel = state_dict.get('layer1.0.conv2.weight')
        if kernel is not None and len(kernel) != kernel.shape[1]:
            raise ValueError('its 3×3 convolutions are grouped, as in ResNeXt, and those of ResNet '
                             'are not')
        is_basic = 'layer1.0.conv3.weight' not in state_dict
        blocks = count_blocks(state_dict, r'layer{}\.\d+\.conv1\.weight', first=1)
        depths = {known: depth for depth, known in STAGE_BLOCKS.items()
                  if (depth in BASIC_DEPTHS) == is_basic}
        deep_stem = 'stem.0.weight' in state_dict
        arguments: dict[str, Any] = dict(
            depth=depths.get(blocks, 18 if is_basic else 50),
            in_channels=state_dict['stem.0.weight' if deep_stem else 'conv1.weight'].shape[1],
            base_channels=len(state_dict['layer1.0.conv1.weight']),
            deep_stem=deep_stem,
            # The convolution of a shortcut follows its pooling.
            avg_down=any(re.fullmatch(r'layer\d+\.0\.downsample\.1\.weight', key)
                         and value.dim() == 4 for key, value in state_dict.items()))
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


def stem_layer(match: re.Match[str]) -> str:
    """The name of a layer of the stem, from those of the module and the layer in MMPretrain."""
    # Each module of MMPretrain is a convolution, a norm and a ReLU.
    return f'stem.{3 * int(match[1]) + (match[2] != "conv")}'
