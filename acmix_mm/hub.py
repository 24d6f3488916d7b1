"""What MMEngine looks up by name: weights of timm models, and the configs of this package.

Importing ``acmix_mm`` registers the schemes with MMEngine's ``CheckpointLoader``, which reads all
checkpoints, and calls :func:`register_configs`.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Optional

from torch import Tensor

from acmix_mm.checkpoints.reading import HUB_SCHEMES, weights_only
from acmix_mm.utils.distributions import installed_versions
from acmix_mm.utils.errors import CheckpointError

SCHEMES = ('timm://', *HUB_SCHEMES)


def register_configs() -> None:
    """Let MMEngine find configs as ``acmix_mm::configs/NAME.py`` and, under the forks, ``mmseg::``.

    The names work in ``_base_`` and in ``mmengine.hub.get_config``.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    # MMEngine looks in the folder of this module. For the name of the distribution, acmix-mm, it
    # would look in site-packages, where an editable installation is not.
    MODULE2PACKAGE['acmix_mm'] = __name__
    # MMEngine maps mmseg to the distribution mmsegmentation, which the forks do not install. It
    # accepts the name of the package, too.
    if find_spec('mmseg') and not installed_versions('mmsegmentation'):
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def load_from_timm(filename: str, map_location: Optional[Any] = None,
                   logger: Any = None) -> Mapping[str, Tensor]:
    """Let timm build a model and load its weights, which it downloads if necessary.

    Args:
        filename: ``timm://MODEL``, or ``hf-hub:OWNER/NAME`` for a timm model on the hub.
        map_location: ignored; the weights are on the CPU.
        logger: ignored.

    Raises:
        ConnectionError: the weights cannot be downloaded.
        CheckpointError: timm is not installed, or has no weights of this name.
    """
    name = filename.removeprefix('timm://')
    try:
        import timm
    except ImportError as error:
        raise CheckpointError(f'The weights of {name} are loaded through timm, which cannot be '
                              f'imported ({error}); pip install timm.') from error
    # Models on the hub may be ACmix models, which this import registers.
    import acmix_mm.timm  # noqa: F401
    try:
        with weights_only():
            return timm.create_model(name, pretrained=True).state_dict()
    except OSError as error:
        # The hub raises several kinds of OSError, also for files missing from its cache.
        raise ConnectionError(str(error).split('\n')[0]) from error
    except RuntimeError as error:
        raise CheckpointError(f'timm has no weights named {name} ({error}); '
                              'timm.list_pretrained() lists all that it has.') from error
