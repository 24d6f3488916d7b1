"""What importing the package requires and registers."""

import subprocess
import sys

from helpers import ROOT

HIDE_OTHER_PACKAGES = '''
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'timm', 'torchvision', 'cv2', 'numpy',
             'triton'):
    sys.modules[name] = None
'''


def run(code):
    return subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True,
                          check=False, env={'PYTHONPATH': str(ROOT), 'PATH': ''})


def test_ops_and_layers_need_only_torch():
    done = run(HIDE_OTHER_PACKAGES + '''
import torch
import acmix_mm
import acmix_mm.commands.benchmark
from acmix_mm.analysis.flops import count
from acmix_mm.layers import ACmixConv2d, PatchwiseACmix, ReducedACmix, WindowACmix
from acmix_mm.ops import shift_conv, sliding_window_attention, window_attention
out = WindowACmix(12, 3, window_size=7, shift_size=3)(torch.randn(1, 9, 16, 12))
out.sum().backward()
ACmixConv2d(4, 8)(torch.randn(1, 4, 9, 16)).sum().backward()
ReducedACmix(12, 3, sr_ratio=2)(torch.randn(1, 9, 16, 12)).sum().backward()
PatchwiseACmix(32, 2, 8, 7)(torch.randn(1, 32, 9, 16)).sum().backward()
try:
    acmix_mm.commands.run_command('train', 'train', [])
except acmix_mm.commands.UsageError as error:
    assert 'train needs mmengine, which is not installed' in str(error), error
assert 'acmix_mm.backbones' not in sys.modules
print(tuple(out.shape))
''')
    assert done.stdout == '(1, 9, 16, 12)\n', done.stderr


def test_registers_in_the_root_without_importing_mmdet_or_mmseg():
    done = run('''
import sys
import acmix_mm
from mmengine.registry import MODELS
print(MODELS.get('ACmixSwinTransformer').__name__, 'mmdet' in sys.modules, 'mmseg' in sys.modules)
''')
    assert done.stdout == 'ACmixSwinTransformer False False\n', done.stderr
