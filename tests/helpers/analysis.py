"""Small networks and layers shared by the analysis tests."""

import torch
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.engine.config import load_config
from acmix_mm.layers import (
    ACmixConv2d,
    PatchwiseACmix,
    PatternACmix,
    PatternACmixConv2d,
    ReducedACmix,
    WindowACmix,
)
from acmix_mm.layers.attention_pattern import GlobalPattern, bigbird_pattern, random_pattern

# Eleven layers in a stage: sorted as text, the tenth would come before the second.
BACKBONES = {
    'Swin': dict(type='ACmixSwinTransformer', embed_dims=12, depths=(1, 2, 11, 1),
                 num_heads=(1, 1, 2, 2), window_size=4),
    'ResNet': dict(type='ACmixResNet', depth=26, base_channels=8, stage_blocks=(1, 2, 11, 1)),
    'PVT': dict(type='ACmixPyramidVisionTransformer', embed_dims=8, num_layers=(1, 2, 11, 1)),
    'SAN': dict(type='ACmixSAN', depth=10, base_channels=32),
}


SMALL = ['model.backbone.embed_dims=12', 'model.backbone.depths=[1,1,1,2]',
         'model.backbone.num_heads=[1,1,2,2]', 'model.neck.in_channels=[12,24,48,96]']


def small_model(config, path, **options):
    """Return a config with a small backbone, after writing an MMEngine checkpoint of its model."""
    cfg = load_config(config, {'model.backbone.embed_dims': 12,
                               'model.backbone.depths': [1, 1, 1, 2],
                               'model.backbone.num_heads': [1, 1, 2, 2], **options})
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    torch.save(dict(meta=dict(dataset_meta=dict(cfg.metainfo)), state_dict=model.state_dict()),
               path)
    return cfg


CASES = {
    'window': (WindowACmix(8, 2, 4), (1, 9, 14, 8)),
    'shifted': (WindowACmix(8, 2, 4, shift_size=2), (1, 9, 14, 8)),
    'one window': (WindowACmix(8, 2, 7, shift_size=3), (1, 5, 6, 8)),
    'sliding': (ACmixConv2d(6, 8, num_heads=2, attn_kernel_size=7), (1, 6, 9, 14)),
    'dilated': (ACmixConv2d(6, 8, num_heads=2, attn_kernel_size=3, dilation=2), (1, 6, 9, 14)),
    'strided': (ACmixConv2d(6, 8, num_heads=2, stride=2), (1, 6, 9, 14)),
    'tiny map': (ACmixConv2d(6, 8, num_heads=2), (1, 6, 2, 1)),
    'reduced': (ReducedACmix(8, 2, sr_ratio=4), (1, 9, 14, 8)),
    'full map': (ReducedACmix(8, 2, qkv_bias=True), (1, 5, 6, 8)),
    'patch-wise': (PatchwiseACmix(32, 2, 16, 7), (1, 32, 9, 14)),
    'global': (PatternACmixConv2d(6, 8, num_heads=2, pattern=GlobalPattern()), (1, 6, 9, 14)),
    'random, strided': (PatternACmixConv2d(6, 8, num_heads=2, stride=2, pattern=random_pattern()),
                        (1, 6, 9, 14)),
    'bigbird': (PatternACmix(8, 2, bigbird_pattern(2, 1, 4)), (1, 9, 14, 8)),
}
