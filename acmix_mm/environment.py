"""Reports which stack is installed, whether its parts fit together, and which features work.

Bug reports should begin with what ``python -m acmix_mm.environment`` prints.
"""

import inspect
import platform
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

import torch

from acmix_mm.ops.backend import TRITON_VERSION, triton_unavailable
from acmix_mm.utils.distributions import (
    DISTRIBUTIONS,
    installed_versions,
    openmmlab_distributions,
)
from acmix_mm.utils.errors import UsageError

# The Makefile records here which torch version it compiled mmcv for.
BUILT_FOR = Path(sys.prefix) / '.acmix-mm-stack'
TORCH_VERSION = tuple(map(int, torch.__version__.split('.')[:2]))


def versions() -> dict[str, str]:
    """Return the versions of this package and of the installed packages that training uses."""
    from acmix_mm import __version__
    found = dict(acmix_mm=__version__, torch=version('torch'))
    for distributions in openmmlab_distributions().values():
        found.update(distributions)
    return found


def stack() -> str:
    """Name the installed stack: OpenMMLab's packages, the forks, a mixture, or none."""
    installed = {name for each in openmmlab_distributions().values() for name in each}
    forks = {name for name in installed if name.startswith('onedl-')}
    if not installed:
        return 'torch without OpenMMLab'
    if not forks:
        return 'OpenMMLab'
    return 'onedl forks' if forks == installed else 'a mixture of OpenMMLab and onedl forks'


def rebuild() -> str:
    """Return advice on how to compile the installed variant of mmcv for the installed torch."""
    upstream, fork, _ = DISTRIBUTIONS['mmcv']
    installed = installed_versions(upstream, fork)
    if installed:
        requirement = '=='.join(max(installed.items()))
    else:
        requirement = fork if 'onedl' in stack() else f'{upstream}==2.1.0'
    advice = ('with torch, setuptools below 81, wheel, ninja and psutil installed, run '
              'pip install --no-build-isolation --no-cache-dir --no-deps '
              f'--force-reinstall {requirement}')
    if TORCH_VERSION >= (2, 14):
        advice += (f'; torch {torch.__version__} requires C++20, for which docs/installation.md '
                   "changes mmcv's setup.py")
    return advice


def check_mmcv() -> None:
    """Check that mmcv's compiled operators work with the installed torch.

    Raises:
        UsageError: mmcv is missing, lacks its operators, or was built for another torch.
    """
    for package, distributions in openmmlab_distributions().items():
        if len(distributions) > 1:
            raise UsageError(f'{" and ".join(distributions)} both install the package {package}, '
                             'and overwrite each other: uninstall both, and install one again.')
    try:
        import mmcv
    except ImportError as error:
        raise UsageError(f'mmcv cannot be imported ({error}); {rebuild()}') from error
    where = f'mmcv {mmcv.__version__} in {sys.prefix}'
    if BUILT_FOR.is_file() and BUILT_FOR.read_text().strip() != torch.__version__:
        raise UsageError(f'{where} was built for torch {BUILT_FOR.read_text().strip()}, but '
                         f'{torch.__version__} is installed; {rebuild()}')
    try:
        import_module('mmcv._ext')
    except ModuleNotFoundError as error:
        raise UsageError(f'{where} has no operators (it was built without torch, or is '
                         f'mmcv-lite); {rebuild()}') from error
    except ImportError as error:
        raise UsageError(f'{where} was built for another torch than {torch.__version__} '
                         f'({str(error).splitlines()[0]}); {rebuild()}') from error
    from mmcv.ops import nms
    boxes = torch.tensor([[0., 0., 9., 9.], [0., 0., 9., 8.], [20., 20., 29., 29.]])
    try:
        _, kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)
    except Exception as error:
        raise UsageError(f'The operators of {where} do not run with torch {torch.__version__} '
                         f'({str(error).splitlines()[0]}); {rebuild()}') from error
    if kept.tolist() != [0, 2]:
        raise UsageError(f'The operators of {where} return wrong results with torch '
                         f'{torch.__version__}; {rebuild()}')


def training_unavailable(package: str) -> Optional[str]:
    """Why networks of ``mmdet`` or ``mmseg`` cannot be trained and tested, or None if they can."""
    try:
        import_module(f'{package}.apis')
        check_mmcv()
    # MMDetection and MMSegmentation assert the versions of the others.
    except (ImportError, AssertionError, UsageError) as error:
        return f'{error}'
    return None


def export_unavailable() -> Optional[str]:
    """Why models cannot be exported to ONNX, or None if they can."""
    missing = [name for name in ('onnx', 'onnxruntime', 'onnxscript') if not find_spec(name)]
    if missing:
        return f'needs {", ".join(missing)}; run pip install onnx onnxruntime onnxscript'
    if 'prefer_deferred_runtime_asserts_over_guards' not in inspect.signature(
            torch.export.export).parameters:
        return f'needs torch 2.5 or newer; found {torch.__version__}'
    return None


def timm_unavailable() -> Optional[str]:
    """Why the backbones cannot be built as timm models, or None if they can."""
    try:
        import_module('acmix_mm.timm')
    except ImportError as error:
        return f'{error}'
    return None


def openmmlab_loading_unavailable() -> Optional[str]:
    """Why OpenMMLab's own tools execute code from checkpoints, or None if they refuse it."""
    if TORCH_VERSION >= (2, 6):
        return None
    return f'needs torch 2.6 or newer; found {torch.__version__}. The tools of acmix-mm refuse it'


def features() -> dict[str, Optional[str]]:
    """Map each feature to None, or to why it is unavailable."""
    return {
        'train and test detectors': training_unavailable('mmdet'),
        'train and test segmentors': training_unavailable('mmseg'),
        'count FLOPs': None if find_spec('mmengine') else 'needs mmengine',
        'export to ONNX': export_unavailable(),
        'Triton kernels': triton_unavailable(torch.float32),
        'timm models': timm_unavailable(),
        "unpickle checkpoints as data, in OpenMMLab's own tools": openmmlab_loading_unavailable(),
    }


def operators() -> str:
    """Describe the operators of mmcv."""
    try:
        from mmcv.ops import get_compiling_cuda_version
        built = get_compiling_cuda_version()
    except ImportError:
        return 'none'
    return 'for CPUs only' if built == 'not available' else f'for CUDA {built}'


def report() -> str:
    """Describe the stack, its versions, the GPUs and the features."""
    gpus = [f'{torch.cuda.get_device_name(index)}, compute capability '
            '{}.{}'.format(*torch.cuda.get_device_capability(index))
            for index in range(torch.cuda.device_count())]
    others = installed_versions('torchvision', 'timm', 'numpy', 'onnx', 'onnxruntime', 'onnxscript')
    rows = {
        'stack': stack(),
        'Python': f'{platform.python_version()}, {platform.system()} {platform.machine()}',
        'packages': ', '.join(f'{name} {each}' for name, each in {**versions(), **others}.items()),
        'mmcv operators': operators(),
        'CUDA of torch': torch.version.cuda or 'none',
        'GPU': '; '.join(gpus) or 'none',
        'Triton': TRITON_VERSION or 'none',
    }
    lines = [f'{name}: {value}' for name, value in rows.items()]
    for name, reason in features().items():
        lines.append(f'{name}: {"yes" if reason is None else f"no: {reason}"}')
    return '\n'.join(lines)


if __name__ == '__main__':
    print(report())
    try:
        check_mmcv()
    except UsageError as error:
        sys.exit(f'error: {error}')
    print(f'mmcv and torch in {sys.prefix} match.')
