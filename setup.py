"""Packaging of acmix_mm; versions that are tested together stand in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'acmix_mm/__init__.py').read_text()).group(1)

# The configs are installed as acmix_mm/configs, next to the code that they name.
CONFIG_FOLDERS = {
    '.'.join(('acmix_mm', *folder.parts)): str(folder)
    for folder in sorted({path.relative_to(ROOT).parent for path in ROOT.glob('configs/**/*.py')})
}

# Needed to train and evaluate, and left to the extras below: whoever installs this into an
# OpenMMLab environment has them, and one who has MMDetection alone does not want MMSegmentation.
# mmcv 2.1 is the last that MMDetection 3.3 and MMSegmentation 1.2 accept.
OPENMMLAB = ['mmengine>=0.10.0,<0.11', 'mmcv>=2.0.0,<2.2']

setup(
    name='acmix-mm',
    version=VERSION,
    description='ACmix backbones for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    python_requires='>=3.9',
    packages=[*find_packages(include=['acmix_mm', 'acmix_mm.*']), *CONFIG_FOLDERS],
    package_dir=CONFIG_FOLDERS,
    package_data={'acmix_mm.configs': ['metafile-*.yml']},
    install_requires=['torch>=2.1'],
    extras_require={
        'det': [*OPENMMLAB, 'mmdet>=3.3,<3.4'],
        'seg': [*OPENMMLAB, 'mmsegmentation>=1.2,<1.3', 'ftfy', 'regex'],
        'timm': [*OPENMMLAB, 'timm>=1.0,<2'],
        'onnx': ['onnx', 'onnxruntime', 'onnxscript'],
    },
)
