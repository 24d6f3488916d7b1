"""Checkpoints of SANs (patch-wise self-attention networks), plain and ACmix."""

from typing import Optional

from torch import Tensor


def to_backbone_names(state_dict: dict[str, Tensor]) -> Optional[tuple[str, dict[str, Tensor]]]:
    """Whose naming a SAN state dict has, and its weights in ``ACmixSAN``'s, which is the authors'.

    None if it is not of a SAN.
    """
    if {'conv_in.weight', 'layer0.0.sam.conv1.weight'} <= set(state_dict):
        return "the SAN authors'", dict(state_dict)
    return None
