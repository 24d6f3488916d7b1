"""Small configs for the tests of comparisons."""

from helpers import ROOT
from mmengine.registry import init_default_scope

from acmix_mm.engine.config import load_config, set_data_root

SEGMENTATION = 'configs/shapes/upernet_acmix_r50.py'
DETECTION = 'configs/shapes/maskrcnn_acmix_swin.py'
# The image size at which these models run.
SHAPE = (64, 64)
# Options for a tiny UperNet on images of 64 pixels, whose heads draw random numbers for dropout.
TINY = {'model.backbone.base_channels': 8, 'model.backbone.stage_blocks': [1, 1, 1, 1],
        'model.decode_head.channels': 16, 'model.auxiliary_head.channels': 8,
        'model.decode_head.in_channels': [32, 64, 128, 256],
        'model.auxiliary_head.in_channels': 128,
        'model.data_preprocessor.size': SHAPE, 'train_dataloader.batch_size': 2}


def config(path, shapes=None, **options):
    """Load a config and make its scope the current one, as the tools do."""
    cfg = load_config(str(ROOT / path), options)
    if shapes is not None:
        set_data_root(cfg, str(shapes))
    init_default_scope(cfg.default_scope)
    return cfg
