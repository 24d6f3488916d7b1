"""Checkpoints of Pyramid Vision Transformers (arXiv 2102.12122), plain and ACmix."""

import math
import re
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from acmix_mm.checkpoints.host import HostCheckpoints, count_blocks


class PVTCheckpoints(HostCheckpoints):
    """Checkpoints for ``ACmixPyramidVisionTransformer``, whose keys are MMDetection's."""

    host = 'PVT'
    acmix_layer = re.compile(r'layers\.(?P<stage>\d+)\.1\.\d+\.attn\b')
    attention_parameters = ('.out_proj.weight',)

    def to_backbone_keys(self, state_dict: Mapping[str, Tensor],
                         ) -> Optional[tuple[str, dict[str, Tensor]]]:
        """Convert the keys of the authors of PVT.

        MMSegmentation uses MMDetection's keys. The authors project queries apart from keys and
        values, and their feed-forward layers are linear layers instead of 1×1 convolutions.
        """
        if 'layers.0.0.projection.weight' in state_dict:
            return "MMDetection's", dict(state_dict)
        if not {'patch_embed1.proj.weight', 'block1.0.attn.q.weight'} <= set(state_dict):
            return None
        # MMDetection counts the position embedding as the first block of a stage.
        first_block = int('pos_embed1' in state_dict)
        # The depth-wise convolution of PVT v2 moves the second linear layer.
        fc2 = 4 if any('.dwconv.' in key for key in state_dict) else 3
        converted = {}
        for key, value in state_dict.items():
            if '.attn.kv.' in key:
                continue
            if '.attn.q.' in key:
                value = torch.cat([value, state_dict[key.replace('.q.', '.kv.')]])
            elif re.search(r'\.mlp\.fc[12]\.weight$', key):
                value = value[..., None, None]
            converted[to_backbone_key(key, first_block, fc2)] = value
        return "the PVT authors'", converted

    def backbone_arguments(self, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Infer the arguments of a PVT v1; the shapes of a PVT v2 do not determine its strides."""
        if 'layers.0.1.0.pos_embed' not in state_dict:
            raise ValueError('it has no position embeddings, like PVT v2, whose strides do not '
                             'follow from its weights; name it in the init_cfg of an '
                             'ACmixPyramidVisionTransformerV2 with the arguments of its host')
        num_layers = count_blocks(state_dict, r'layers\.{}\.1\.\d+\.norm1\.weight')
        patches = [state_dict[f'layers.{stage}.0.projection.weight']
                   for stage in range(len(num_layers))]
        blocks = [f'layers.{stage}.1.1' for stage in range(len(num_layers))]
        reductions = [state_dict.get(f'{block}.attn.sr.weight') for block in blocks]
        widths = [len(patch) for patch in patches]
        patch_sizes = tuple(patch.shape[2] for patch in patches)
        side = math.isqrt(state_dict['layers.0.1.0.pos_embed'].shape[1])
        return dict(
            pretrain_img_size=side * patch_sizes[0],
            in_channels=patches[0].shape[1],
            embed_dims=widths[0],
            num_stages=len(num_layers),
            num_layers=num_layers,
            # In all published models the first stage has one head, and heads have the same width.
            num_heads=tuple(width // widths[0] for width in widths),
            patch_sizes=patch_sizes,
            strides=patch_sizes,
            paddings=(0,) * len(num_layers),
            sr_ratios=tuple(1 if weight is None else weight.shape[2] for weight in reductions),
            out_indices=tuple(range(len(num_layers))),
            mlp_ratios=tuple(len(state_dict[f'{block}.ffn.layers.0.weight']) // width
                             for block, width in zip(blocks, widths)),
            qkv_bias='layers.0.1.1.attn.attn.in_proj_bias' in state_dict)


def to_backbone_key(key: str, first_block: int, fc2: int) -> str:
    """Rename one key of the authors of PVT.

    Args:
        key: the key.
        first_block: index of the first block of a stage in MMDetection's PVT.
        fc2: index of the second linear layer in MMDetection's feed-forward network.
    """
    if match := re.match(r'(pos_embed|patch_embed|norm|block)(\d)(?:\.(\d+))?', key):
        part, stage, block = match.groups()
        within_stage = {'patch_embed': '0', 'pos_embed': '1.0.pos_embed', 'norm': '2',
                        'block': f'1.{int(block or 0) + first_block}'}[part]
        # The authors count stages from 1.
        key = f'layers.{int(stage) - 1}.{within_stage}{key[match.end():]}'
    for old, new in (('.proj.', '.attn.out_proj.' if '.attn.' in key else '.projection.'),
                     ('.attn.q.', '.attn.attn.in_proj_'),
                     ('.mlp.fc1.', '.ffn.layers.0.'), ('.mlp.dwconv.dwconv.', '.ffn.layers.1.'),
                     ('.mlp.fc2.', f'.ffn.layers.{fc2}.')):
        key = key.replace(old, new)
    return key
