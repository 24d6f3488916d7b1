"""Which distributions provide OpenMMLab's packages: OpenMMLab's own, or the maintained forks.

The forks, whose names begin with ``onedl-``, install packages of the same import names.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# The distributions that install each package; the second is the fork.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine', 'mmengine-lite'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv-lite'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}


def installed_versions(*names: str) -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def openmmlab_distributions() -> dict[str, Mapping[str, str]]:
    """Map each of OpenMMLab's packages to the distributions that install it, and their versions."""
    return {package: installed_versions(*names) for package, names in DISTRIBUTIONS.items()}
