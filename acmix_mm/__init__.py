"""ACmix (arXiv 2111.14556) for detection and segmentation with OpenMMLab.

Importing this package registers its backbones, and the convolution types ``ACmix``,
``SlidingAttention``, ``ACmixConvolution`` and ``Involution``, in MMEngine's root ``MODELS``, and
``RateHook`` in its ``HOOKS``, where MMDetection and MMSegmentation find them. On a machine without
OpenMMLab it registers nothing, and ``acmix_mm.ops`` and ``acmix_mm.layers`` work with torch alone.
"""

from functools import partial
from importlib.util import find_spec

__version__ = '0.1.0'

if find_spec('mmengine') and find_spec('mmcv'):
    from mmengine.registry import MODELS

    from acmix_mm import backbones  # noqa: F401
    from acmix_mm.analysis import rate_hook  # noqa: F401
    from acmix_mm.layers import acmix_or_pointwise, involution_or_pointwise

    MODELS.register_module('ACmix', module=acmix_or_pointwise)
    MODELS.register_module('SlidingAttention', module=partial(acmix_or_pointwise, mix='attn'))
    MODELS.register_module('ACmixConvolution', module=partial(acmix_or_pointwise, mix='conv'))
    MODELS.register_module('Involution', module=involution_or_pointwise)
