"""The direction of all imports within the package, and what ops and layers depend on."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath

import pytest
from helpers import ROOT

FOUNDATIONS = {'utils', 'ops', 'layers', 'checkpoints'}
TOOLBOX = {*FOUNDATIONS, 'backbones', 'timm', 'datasets', 'engine', 'environment', 'analysis'}
# The packages and top-level modules that each may import, besides itself.
ALLOWED = {
    'utils': set(),
    'ops': set(),
    'layers': {'ops'},
    'checkpoints': {'utils'},
    'backbones': FOUNDATIONS,
    'timm': {*FOUNDATIONS, 'backbones'},
    'hub': {'utils', 'checkpoints', 'timm'},
    'datasets': {'utils'},
    'environment': {'utils', 'ops'},
    'engine': {*FOUNDATIONS, 'backbones', 'datasets', 'environment'},
    'analysis': TOOLBOX - {'analysis'},
    'benchmark': {'utils', 'ops', 'layers', 'backbones'},
    'gpu_check': {'utils', 'ops', 'layers', 'benchmark'},
    'comparison': {*TOOLBOX, 'benchmark'},
    'deploy': TOOLBOX,
    'commands': {*TOOLBOX, 'benchmark', 'gpu_check', 'comparison', 'deploy'},
    '__main__': {'commands'},
    'registry': set(),
    '__init__': {'checkpoints', 'backbones', 'layers', 'engine', 'analysis', 'hub'},
}
TORCH_ONLY = ('ops', 'layers')


def module_name(path):
    parts = PurePosixPath(path).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def package_of(module):
    """The package or top-level module below acmix_mm."""
    return [*module.split('.'), '__init__'][1]


def imported_names(path, source):
    """Dotted names of all imports, also those in functions; relative ones are made absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = PurePosixPath(path).parts[:-node.level] if node.level else ()
            base = '.'.join([*parent, *filter(None, [node.module])])
            names |= {f'{base}.{alias.name}' for alias in node.names}
    return names


def violations(sources):
    """Describe every forbidden import.

    Args:
        sources: the source code of each file of the package, by its path from the repository root.
    """
    modules = {module_name(path) for path in sources}
    graph = {module: set() for module in modules}
    found = []
    for path, source in sources.items():
        module = module_name(path)
        package = package_of(module)
        for name in imported_names(path, source):
            top = name.split('.')[0]
            # The version is set before the package imports anything.
            if name == 'acmix_mm.__version__':
                continue
            if top == 'acmix_mm':
                # The name of a function or class ends in more parts than that of its module.
                while name not in modules:
                    name = name.rpartition('.')[0]
                if name != module:
                    graph[module].add(name)
                if package_of(name) not in ALLOWED[package] | {package}:
                    found.append(f'{path} imports {name}')
            elif package in TORCH_ONLY and top not in sys.stdlib_module_names:
                is_kernel = path.endswith('_kernels.py')
                if top != 'torch' and not (top == 'triton' and is_kernel):
                    found.append(f'{path} imports {top}')
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append('cycle: ' + ' <- '.join(error.args[1]))
    return found


def test_imports_follow_one_direction():
    sources = {path.relative_to(ROOT).as_posix(): path.read_text()
               for path in (ROOT / 'acmix_mm').glob('**/*.py')}
    assert {package_of(module_name(path)) for path in sources} == set(ALLOWED)
    assert violations(sources) == []


PACKAGE = {
    'acmix_mm/__init__.py': 'from acmix_mm import backbones',
    'acmix_mm/utils/errors.py': '',
    'acmix_mm/ops/__init__.py': 'from acmix_mm.ops.shift import shift',
    'acmix_mm/ops/shift.py': 'import math\nimport torch\ndef shift(): pass',
    'acmix_mm/ops/triton_kernels.py': 'import triton.language',
    'acmix_mm/layers/conv.py': 'from ..ops import shift',
    'acmix_mm/backbones/__init__.py': 'from acmix_mm.layers.conv import Conv\nimport mmcv',
    'acmix_mm/timm.py': 'import timm\nfrom acmix_mm import backbones',
}


@pytest.mark.parametrize(('path', 'line', 'expected'), [
    ('acmix_mm/layers/conv.py', 'from acmix_mm import __version__', []),
    ('acmix_mm/ops/shift.py', 'from acmix_mm.utils.errors import UsageError',
     ['acmix_mm/ops/shift.py imports acmix_mm.utils.errors']),
    ('acmix_mm/ops/shift.py', 'def late():\n    import acmix_mm.timm',
     ['acmix_mm/ops/shift.py imports acmix_mm.timm',
      'cycle: acmix_mm.ops.shift <- acmix_mm.timm <- acmix_mm.backbones <- acmix_mm.layers.conv']),
    ('acmix_mm/layers/conv.py', 'from ..utils import errors',
     ['acmix_mm/layers/conv.py imports acmix_mm.utils.errors']),
    ('acmix_mm/layers/conv.py', 'from .. import timm',
     ['acmix_mm/layers/conv.py imports acmix_mm.timm', 'cycle: ']),
    ('acmix_mm/layers/conv.py', 'from acmix_mm.layers.norm import Norm', ['cycle: ']),
    ('acmix_mm/layers/conv.py', 'import numpy as np', ['acmix_mm/layers/conv.py imports numpy']),
    ('acmix_mm/ops/shift.py', 'import triton', ['acmix_mm/ops/shift.py imports triton']),
])
def test_forbidden_imports_are_found(path, line, expected):
    sources = {**PACKAGE, 'acmix_mm/layers/norm.py': 'from . import conv'}
    assert violations(sources) == []
    sources[path] += f'\n{line}'
    found = violations(sources)
    assert len(found) == len(expected)
    for message, start in zip(found, expected):
        assert set(message.split()) >= set(start.split())
