"""Packaging of acmix_mm; constraints/ has the versions that are tested together."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (ROOT / 'acmix_mm/__init__.py').read_text()).group(1)

# Training and evaluation need these. They are extras because an OpenMMLab environment already has
# them, and MMDetection users may not want MMSegmentation. Packages of OpenMMLab and of its
# maintained forks overwrite each other, so that an extra has either.
# mmcv 2.1 is the newest version that MMDetection 3.3 and MMSegmentation 1.2 accept.
OPENMMLAB = ['mmengine>=0.10.0,<0.11', 'mmcv>=2.0.0,<2.2']
FORKS = ['onedl-mmengine>=0.10.12,<0.11', 'onedl-mmcv>=2.3.6,<2.4']

setup(
    name='acmix-mm',
    version=VERSION,
    description='ACmix backbones for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The acmix-mm authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords=['computer vision', 'object detection', 'instance segmentation',
              'semantic segmentation', 'self-attention', 'backbone', 'OpenMMLab'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    project_urls={'Paper': 'https://arxiv.org/abs/2111.14556',
                  'Published code': 'https://github.com/LeapLabTHU/ACmix'},
    python_requires='>=3.9',
    packages=find_packages(include=['acmix_mm', 'acmix_mm.*']),
    # OpenMMLab's folder for configs; acmix_mm/.mim/configs/configs is a link to configs/.
    package_data={'acmix_mm': ['py.typed', '.mim/**/*.py', '.mim/**/*.yml']},
    install_requires=['torch>=2.1'],
    extras_require={
        'det': [*OPENMMLAB, 'mmdet>=3.3,<3.4'],
        'seg': [*OPENMMLAB, 'mmsegmentation>=1.2,<1.3', 'ftfy', 'regex'],
        'onedl-det': [*FORKS, 'onedl-mmdetection>=3.5.1,<3.6'],
        'onedl-seg': [*FORKS, 'onedl-mmsegmentation>=1.4.2,<1.5'],
        'timm': ['timm>=1.0,<2'],
        'onnx': ['onnx', 'onnxruntime', 'onnxscript'],
        'slurm': ['submitit>=1.5'],
    },
)
