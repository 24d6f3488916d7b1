"""The ``type`` of a config, which is a name or, in MMEngine's pure Python configs, a class."""

from typing import Any


def type_name(config_type: Any) -> str:
    """Return the name of a class or function without its scope or module.

    Args:
        config_type: the class or function, or its name: ``'ResNet'``, ``'mmdet.ResNet'`` or
            ``'mmdet.models.backbones.resnet.ResNet'``.
    """
    name = config_type if isinstance(config_type, str) else config_type.__name__
    return name.rpartition('.')[2]
