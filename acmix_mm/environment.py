"""Checks that the installed mmcv matches the installed torch, and lists the versions.

Run it with ``python -m acmix_mm.environment``.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from acmix_mm.utils.errors import UsageError

# The Makefile records here which torch version it compiled mmcv for.
BUILT_FOR = Path(sys.prefix) / '.acmix-mm-stack'
REBUILD = ('with torch, setuptools below 81, wheel, ninja and psutil installed, run '
           'pip install --no-build-isolation --no-cache-dir --no-deps '
           '--force-reinstall mmcv==2.1.0')


def versions() -> dict[str, str]:
    """Return the versions of this package and of the installed packages that training uses."""
    from acmix_mm import __version__
    found = dict(acmix_mm=__version__)
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmsegmentation'):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_mmcv() -> None:
    """Check that mmcv's compiled operators work with the installed torch.

    Raises:
        UsageError: mmcv is missing, lacks its operators, or was built for another torch.
    """
    import torch
    try:
        import mmcv
    except ImportError as error:
        raise UsageError(f'mmcv cannot be imported ({error}); {REBUILD}') from error
    where = f'mmcv {mmcv.__version__} in {sys.prefix}'
    if BUILT_FOR.is_file() and BUILT_FOR.read_text().strip() != torch.__version__:
        raise UsageError(f'{where} was built for torch {BUILT_FOR.read_text().strip()}, but '
                         f'{torch.__version__} is installed; {REBUILD}')
    try:
        import_module('mmcv._ext')
    except ModuleNotFoundError as error:
        raise UsageError(f'{where} has no operators (it was built without torch, or is '
                         f'mmcv-lite); {REBUILD}') from error
    except ImportError as error:
        raise UsageError(f'{where} was built for another torch than {torch.__version__} '
                         f'({str(error).splitlines()[0]}); {REBUILD}') from error
    from mmcv.ops import nms
    boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 29., 29.]])
    try:
        _, kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    except Exception as error:
        raise UsageError(f'The operators of {where} do not run with torch {torch.__version__} '
                         f'({str(error).splitlines()[0]}); {REBUILD}') from error
    if kept.tolist() != [0, 2]:
        raise UsageError(f'The operators of {where} return wrong results with torch '
                         f'{torch.__version__}; {REBUILD}')


if __name__ == '__main__':
    try:
        check_mmcv()
    except UsageError as error:
        sys.exit(f'error: {error}')
    print(f'mmcv and torch in {sys.prefix} match.')
    print('\n'.join(f'{name} {each}' for name, each in versions().items()))
