"""Conversion of Swin checkpoints."""

import mmdet.models.backbones.swin as mmdet_swin
import torch

from acmix_mm.checkpoints.swin import SwinCheckpoints


def test_patch_merging_order_is_converted():
    """Weights that select one pixel and channel in Microsoft's order do so in MMDetection's."""
    merging = mmdet_swin.PatchMerging(in_channels=3, out_channels=6)
    image = torch.arange(2 * 2 * 3.).view(1, 2, 2, 3)
    # Microsoft concatenates the pixels (row, column) in the order (0, 0), (1, 0), (0, 1), (1, 1).
    order = [(row, column, channel) for column in (0, 1) for row in (0, 1) for channel in range(3)]
    for index, (row, column, channel) in enumerate(order):
        weight = torch.zeros(6, 12)
        weight[0, index] = 1
        _, converted = SwinCheckpoints().to_backbone_keys({
            'patch_embed.proj.weight': torch.zeros(1),
            'layers.0.blocks.0.norm1.weight': torch.zeros(1),
            'layers.0.downsample.reduction.weight': weight})
        merging.reduction.weight.data = converted['stages.0.downsample.reduction.weight']
        merging.norm = torch.nn.Identity()
        out, _ = merging(image.view(1, 4, 3), (2, 2))
        assert out[0, 0, 0] == image[0, row, column, channel]
