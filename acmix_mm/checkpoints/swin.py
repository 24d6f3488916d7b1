"""Checkpoints of Swin Transformers, plain and ACmix."""

import re
from typing import Optional

from torch import Tensor


def to_backbone_names(state_dict: dict[str, Tensor]) -> Optional[tuple[str, dict[str, Tensor]]]:
    """Whose naming a Swin state dict has, and its weights in ``ACmixSwinTransformer``'s.

    That is MMDetection's, MMSegmentation's and MMPretrain's. Microsoft and the authors of ACmix
    name alike; timm moved each patch merging from the end of a stage to the start of the next.
    The patch merging of all these joins the four pixels of a patch column by column and pixel by
    pixel, MMDetection's row by row and channel by channel. None if it is not of a Swin.
    """
    if {'patch_embed.projection.weight', 'stages.0.blocks.0.norm1.weight'} <= set(state_dict):
        return "MMDetection's", dict(state_dict)
    if not {'patch_embed.proj.weight', 'layers.0.blocks.0.norm1.weight'} <= set(state_dict):
        return None
    merges_first = not any(key.startswith('layers.0.downsample.') for key in state_dict) and any(
        '.downsample.' in key for key in state_dict)
    renamed = {}
    for key, value in state_dict.items():
        if merges_first:
            key = re.sub(r'^layers\.(\d+)(?=\.downsample\.)',
                         lambda match: f'layers.{int(match[1]) - 1}', key)
        for old, new in (('layers.', 'stages.'), ('.attn.', '.attn.w_msa.'),
                         ('.mlp.fc1.', '.ffn.layers.0.0.'), ('.mlp.fc2.', '.ffn.layers.1.'),
                         ('patch_embed.proj.', 'patch_embed.projection.')):
            key = key.replace(old, new)
        if '.downsample.' in key:
            by_pixel = value.unflatten(-1, (2, 2, -1))
            value = by_pixel.transpose(-3, -2).flatten(-3, -2).transpose(-2, -1).flatten(-2)
        renamed[key] = value
    return "timm's" if merges_first else "Microsoft's", renamed
