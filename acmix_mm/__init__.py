"""ACmix (arXiv 2111.14556) for detection and segmentation with OpenMMLab.

Importing this package registers the backbones and the convolution types ``ACmix``,
``SlidingAttention``, ``ACmixConvolution``, ``GlobalAttention``, ``GlobalACmix``,
``RandomAttention``, ``BigBirdAttention`` and ``Involution`` in MMEngine's root registry
``MODELS``, where MMDetection and MMSegmentation find them, ``RateHook`` in ``HOOKS``,
``ACmixFSDPStrategy`` in ``STRATEGIES`` with its wrap policy in ``FUNCTIONS``, and the checkpoint
addresses ``timm://`` and ``hf-hub:`` with ``CheckpointLoader``. It also allows torch to
load the checkpoints that MMEngine writes, as data, so that MMDetection's and MMSegmentation's own
tools and inferencers can use them, and makes the configs of this package available as
``acmix_mm::configs/NAME.py``. Without OpenMMLab nothing is registered; ``acmix_mm.ops`` and
``acmix_mm.layers`` require torch only.
"""

from functools import partial
from importlib.util import find_spec

__version__ = '0.1.0'

if find_spec('mmengine') and find_spec('mmcv'):
    from mmengine.registry import MODELS
    from mmengine.runner import CheckpointLoader
    from torch import distributed

    from acmix_mm import backbones  # noqa: F401
    from acmix_mm.analysis import rate_hook  # noqa: F401
    from acmix_mm.checkpoints.reading import allow_mmengine_checkpoints
    from acmix_mm.hub import SCHEMES, load_from_timm, register_configs
    from acmix_mm.layers import (
        acmix_or_pointwise,
        involution_or_pointwise,
        pattern_or_pointwise,
    )
    from acmix_mm.layers.attention_pattern import PATTERN_TYPES

    MODELS.register_module('ACmix', module=acmix_or_pointwise)
    MODELS.register_module('SlidingAttention', module=partial(acmix_or_pointwise, mix='attn'))
    MODELS.register_module('ACmixConvolution', module=partial(acmix_or_pointwise, mix='conv'))
    MODELS.register_module('Involution', module=involution_or_pointwise)
    for each in PATTERN_TYPES:
        MODELS.register_module(each, module=partial(pattern_or_pointwise, each))
    CheckpointLoader.register_scheme(SCHEMES, load_from_timm)
    if distributed.is_available():
        from acmix_mm.engine import fsdp  # noqa: F401
    allow_mmengine_checkpoints()
    register_configs()
