"""What an import does, and what it leaves alone."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

HIDE = '''
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm', 'torchvision', 'cv2', 'numpy',
             'triton'):
    sys.modules[name] = None
'''


def run(code):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True,
                          check=False, env={'PYTHONPATH': str(ROOT), 'PATH': ''})


def test_operators_and_layers_need_torch_alone():
    done = run(HIDE + '''
import torch
import acmix_mm
from acmix_mm.analysis.flops import count
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.ops import shift_conv, sliding_window_attention, window_attention
out = WindowACmix(12, 3, window_size=7, shift_size=3)(torch.randn(1, 9, 16, 12))
out.sum().backward()
ACmixConv2d(4, 8)(torch.randn(1, 4, 9, 16)).sum().backward()
ReducedACmix(12, 3, sr_ratio=2)(torch.randn(1, 9, 16, 12)).sum().backward()
PatchwiseACmix(32, 2, 8, 7)(torch.randn(1, 32, 9, 16)).sum().backward()
assert 'acmix_mm.backbones' not in sys.modules
print(tuple(out.shape))
''')
    assert done.stdout == '(1, 9, 16, 12)\n', done.stderr


def test_import_registers_in_the_root_and_leaves_mmdet_and_mmseg_alone():
    done = run('''
import sys
import acmix_mm
from mmengine.registry import MODELS
print(MODELS.get('ACmixSwinTransformer').__name__, 'mmdet' in sys.modules, 'mmseg' in sys.modules)
''')
    assert done.stdout == 'ACmixSwinTransformer False False\n', done.stderr


@pytest.mark.parametrize(('package', 'allowed'), [
    ('ops', {'ops'}), ('layers', {'ops', 'layers'}),
])
def test_imports_point_one_way(package, allowed):
    for path in (ROOT / 'acmix_mm' / package).glob('**/*.py'):
        # The kernels are read where they run, and nowhere else.
        outside = {'torch', 'triton'} if path.name == 'triton_kernels.py' else {'torch'}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = node.module or ''
                if node.level:
                    parts = path.relative_to(ROOT).parts[:-node.level]
                    module = '.'.join([*parts, module])
                names = [module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                if name.startswith('acmix_mm'):
                    assert name.split('.')[1] in allowed, (path, name)
                else:
                    top = name.split('.')[0]
                    assert top in outside or top in sys.stdlib_module_names
