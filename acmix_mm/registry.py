"""The registries of what a config states by itself that inherits ``acmix_mm::configs/NAME.py``.

MMEngine looks these types up in registries of the base config's package. They are empty, so that
MMEngine's own are searched next; without them, every lookup would log warnings. Backbones and
layers are registered in MMEngine's ``MODELS``.
"""

from mmengine import registry as mmengine
from mmengine.registry import Registry

OPTIM_WRAPPERS = Registry('optim_wrapper', parent=mmengine.OPTIM_WRAPPERS, scope='acmix_mm',
                          locations=['acmix_mm'])
PARAM_SCHEDULERS = Registry('parameter scheduler', parent=mmengine.PARAM_SCHEDULERS,
                            scope='acmix_mm', locations=['acmix_mm'])
