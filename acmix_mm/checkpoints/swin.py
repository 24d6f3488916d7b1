"""Checkpoints of Swin Transformers (arXiv 2103.14030), plain and ACmix."""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

from torch import Tensor

from acmix_mm.checkpoints.host import ATTENTION, HostCheckpoints, count_blocks

# Microsoft's names and those of the backbone, replaced in this order.
MICROSOFT = (('layers.', 'stages.'), ('.attn.', '.attn.w_msa.'),
             ('.mlp.fc1.', '.ffn.layers.0.0.'), ('.mlp.fc2.', '.ffn.layers.1.'),
             ('patch_embed.proj.', 'patch_embed.projection.'))


class SwinCheckpoints(HostCheckpoints):
    """Checkpoints for ``ACmixSwinTransformer``, whose keys are MMDetection's."""

    host = 'Swin'
    acmix_layer = re.compile(r'(?:stages|layers)\.(?P<stage>\d+)\.blocks\.\d+\.attn\b')
    attention_parameters = ('.relative_position_bias_table', '.conv_p.weight')
    mixer_parameters: ClassVar = {**HostCheckpoints.mixer_parameters, '.conv_p.weight': ATTENTION,
                                  '.conv.weight': 'convolution in place of attention'}

    def to_backbone_keys(self, state_dict: Mapping[str, Tensor],
                         ) -> Optional[tuple[str, dict[str, Tensor]]]:
        """Convert Microsoft's and timm's keys and patch merging.

        MMSegmentation and MMPretrain use MMDetection's keys, and the authors of ACmix use
        Microsoft's. timm moved each patch merging from the end of a stage to the start of the next.
        """
        if {'patch_embed.projection.weight', 'stages.0.blocks.0.norm1.weight'} <= set(state_dict):
            return "MMDetection's", dict(state_dict)
        if not {'patch_embed.proj.weight', 'layers.0.blocks.0.norm1.weight'} <= set(state_dict):
            return None
        merging = [key for key in state_dict if '.downsample.' in key]
        merges_first = bool(merging) and not any(key.startswith('layers.0.') for key in merging)
        converted = {}
        for key, value in state_dict.items():
            if merges_first:
                key = re.sub(r'^layers\.(\d+)(?=\.downsample\.)',
                             lambda match: f'layers.{int(match[1]) - 1}', key)
            for old, new in MICROSOFT:
                key = key.replace(old, new)
            if '.downsample.' in key:
                value = reorder_patch_merging(value)
            converted[key] = value
        return "timm's" if merges_first else "Microsoft's", converted

    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        embed_dims, in_channels, patch_size = state_dict['patch_embed.projection.weight'].shape[:3]
        depths = count_blocks(state_dict, r'stages\.{}\.blocks\.\d+\.norm1\.weight')
        tables = [state_dict[f'stages.{stage}.blocks.0.attn.w_msa.relative_position_bias_table']
                  for stage in range(len(depths))]
        hidden = state_dict['stages.0.blocks.0.ffn.layers.0.0.weight'].shape[0]
        arguments = dict(
            in_channels=in_channels,
            embed_dims=embed_dims,
            patch_size=patch_size,
            window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,
            mlp_ratio=hidden / embed_dims,
            depths=depths,
            num_heads=tuple(table.shape[1] for table in tables),
            strides=(patch_size, *(2 for _ in depths[1:])),
            out_indices=tuple(range(len(depths))),
            qkv_bias='stages.0.blocks.0.attn.w_msa.qkv.bias' in state_dict,
            patch_norm='patch_embed.norm.weight' in state_dict)
        if 'absolute_pos_embed' in state_dict:
            side = math.isqrt(state_dict['absolute_pos_embed'].shape[1])
            arguments.update(use_abs_pos_embed=True, pretrain_img_size=side * patch_size)
        return arguments


def reorder_patch_merging(weight: Tensor) -> Tensor:
    """Reorder the inputs, in the last axis, of Microsoft's patch merging to MMDetection's order.

    Microsoft concatenates the four pixels of a patch column by column, each with all its channels;
    MMDetection orders by channel first, then row by row.
    """
    return weight.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-2, -1).flatten(-3)
