"""Checkpoints of ResNets with bottlenecks, plain and ACmix."""

import re
from typing import Optional

from torch import Tensor

# timm's three-layer stem; what follows it there, bn1, is the last of its norms.
TIMM_STEM = (('conv1.', 'stem.'), ('bn1.', 'stem.7.'))


def to_backbone_names(state_dict: dict[str, Tensor]) -> Optional[tuple[str, dict[str, Tensor]]]:
    """Whose naming a ResNet state dict has, and its weights in ``ACmixResNet``'s.

    Torchvision, timm, MMDetection, MMSegmentation, MMPretrain and the authors of ACmix name alike,
    but for stems of three convolutions, which timm names otherwise. None if it is not of a ResNet.
    """
    if 'layer1.0.conv1.weight' not in state_dict:
        return None
    if 'conv1.weight' in state_dict or 'stem.0.weight' in state_dict:
        return "torchvision's", dict(state_dict)
    if 'conv1.0.weight' not in state_dict:
        return None
    renamed = {}
    for key, value in state_dict.items():
        for old, new in TIMM_STEM:
            key = re.sub(rf'^{re.escape(old)}', new, key)
        renamed[key] = value
    return "timm's", renamed
