"""Checkpoints of Pyramid Vision Transformers, plain and ACmix."""

import re
from functools import partial
from typing import Optional

import torch
from torch import Tensor


def to_backbone_names(state_dict: dict[str, Tensor]) -> Optional[tuple[str, dict[str, Tensor]]]:
    """Whose naming a PVT state dict has, and its weights in ``ACmixPyramidVisionTransformer``'s.

    That is MMDetection's and MMSegmentation's. The authors keep the query's projection apart from
    the other two, and the feed-forward layers as linear ones. None if it is not of a PVT.
    """
    if 'layers.0.0.projection.weight' in state_dict:
        return "MMDetection's", dict(state_dict)
    if not {'patch_embed1.proj.weight', 'block1.0.attn.q.weight'} <= set(state_dict):
        return None
    first_block = int('pos_embed1' in state_dict)
    has_conv_ffn = any('.dwconv.' in key for key in state_dict)
    renamed = {}
    for key, value in state_dict.items():
        if '.attn.kv.' in key:
            continue
        if '.attn.q.' in key:
            value = torch.cat([value, state_dict[key.replace('.q.', '.kv.')]])
        elif re.search(r'\.mlp\.fc[12]\.weight$', key):
            value = value[..., None, None]
        key = re.sub(r'^pos_embed(\d)$', partial(stage_name, '.1.0.pos_embed'), key)
        key = re.sub(r'^patch_embed(\d)', partial(stage_name, '.0'), key)
        key = re.sub(r'^norm(\d)', partial(stage_name, '.2'), key)
        key = re.sub(r'^block(\d)\.(\d+)', lambda match: stage_name(
            f'.1.{int(match[2]) + first_block}', match), key)
        for old, new in (('.proj.', '.attn.out_proj.' if '.attn.' in key else '.projection.'),
                         ('.attn.q.', '.attn.attn.in_proj_'),
                         ('.mlp.fc1.', '.ffn.layers.0.'), ('.mlp.dwconv.dwconv.', '.ffn.layers.1.'),
                         ('.mlp.fc2.', f'.ffn.layers.{4 if has_conv_ffn else 3}.')):
            key = key.replace(old, new)
        renamed[key] = value
    return "the PVT authors'", renamed


def stage_name(rest: str, match: re.Match) -> str:
    """``layers.S`` and ``rest``, for the stage, counted from one, in a match's first group."""
    return f'layers.{int(match[1]) - 1}{rest}'
