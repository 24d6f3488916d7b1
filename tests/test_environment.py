"""Detecting the installed stack."""

import pytest
import torch
from mmengine.config.utils import MODULE2PACKAGE

from acmix_mm import environment, hub
from acmix_mm.utils import distributions
from acmix_mm.utils.errors import UsageError

UPSTREAM = {'mmengine': '0.10.7', 'mmcv': '2.1.0', 'mmdet': '3.3.0', 'mmsegmentation': '1.2.2'}
FORKS = {'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
         'onedl-mmsegmentation': '1.4.2'}


@pytest.fixture
def install(monkeypatch):
    """Pretend that exactly these distributions are installed."""
    def pretend(versions):
        def installed_versions(*names):
            return {name: versions[name] for name in names if name in versions}
        for module in (environment, distributions, hub):
            monkeypatch.setattr(module, 'installed_versions', installed_versions)
    return pretend


@pytest.mark.parametrize(('installed', 'stack', 'mmcv'), [
    (UPSTREAM, 'OpenMMLab', 'mmcv==2.1.0'),
    (FORKS, 'onedl forks', 'onedl-mmcv==2.3.6'),
    ({'mmengine': '0.10.7', 'mmcv-lite': '2.1.0'}, 'OpenMMLab', 'mmcv==2.1.0'),
    ({'onedl-mmengine': '0.10.12'}, 'onedl forks', 'onedl-mmcv'),
    ({**UPSTREAM, 'onedl-mmengine': '0.10.12'}, 'a mixture of OpenMMLab and onedl forks',
     'mmcv==2.1.0'),
    ({}, 'torch without OpenMMLab', 'mmcv==2.1.0'),
])
def test_names_what_is_installed(installed, stack, mmcv, install, monkeypatch):
    install(installed)
    assert environment.stack() == stack
    named = dict(environment.versions())
    assert named.pop('torch') == torch.__version__.partition('+')[0]
    del named['acmix_mm']
    assert named == installed
    monkeypatch.setattr(environment, 'TORCH_VERSION', (2, 13))
    assert environment.rebuild().endswith(f'--force-reinstall {mmcv}')
    monkeypatch.setattr(environment, 'TORCH_VERSION', (2, 14))
    assert f'--force-reinstall {mmcv}; torch' in environment.rebuild()
    assert 'C++20' in environment.rebuild()


def test_packages_that_overwrite_each_other_are_reported(install):
    install({**FORKS, 'mmcv': '2.1.0'})
    with pytest.raises(UsageError, match='both install the package mmcv'):
        environment.check_mmcv()
    assert 'both install' in environment.features()['train and test detectors']


def test_report(monkeypatch):
    monkeypatch.setattr(environment, 'TORCH_VERSION', (2, 1))
    monkeypatch.setattr(environment, 'find_spec', lambda name: name not in ('onnx', 'onnxscript'))
    lines = dict(line.split(': ', 1) for line in environment.report().splitlines())
    for name, version in environment.versions().items():
        assert f'{name} {version}' in lines['packages']
    assert lines['export to ONNX'].startswith('no: needs onnx, onnxscript; run pip install')
    assert lines["unpickle checkpoints as data, in OpenMMLab's own tools"].startswith('no: needs')
    for name in ('train and test detectors', 'train and test segmentors', 'count FLOPs',
                 'timm models'):
        assert lines[name] == 'yes'
    assert {'stack', 'Python', 'mmcv operators', 'GPU', 'Triton', 'Triton kernels'} <= set(lines)


@pytest.mark.parametrize(('installed', 'expected'), [(UPSTREAM, 'mmsegmentation'),
                                                     (FORKS, 'mmseg')])
def test_mmengine_finds_the_configs_of_either_mmsegmentation(installed, expected, install,
                                                             monkeypatch):
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    install(installed)
    hub.register_configs()
    assert MODULE2PACKAGE['mmseg'] == expected
