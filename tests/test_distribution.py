"""What the wheel holds, and that it installs and imports in a clean virtual environment."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    # The sources are copied: a build leaves files beside them.
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split('\0')[:-1]:
        if (ROOT / name).exists():
            target = folder / 'source' / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target, follow_symlinks=False)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation',
                    '--wheel-dir', folder, folder / 'source'], check=True)
    return next(folder.glob('*.whl'))


def test_wheel_holds_the_package_its_configs_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith('METADATA'))
        text = archive.read(metadata).decode()
    packaged = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'acmix_mm').rglob('*.py')}
    configs = {f'acmix_mm/.mim/configs/{path.relative_to(ROOT).as_posix()}'
               for path in (ROOT / 'configs').rglob('*') if path.suffix in ('.py', '.yml')}
    others = {'acmix_mm/py.typed', 'acmix_mm/.mim/model-index.yml'}
    assert {*packaged, *configs, *others} <= names
    assert not any(name.startswith(('tests', 'tools')) for name in names)
    assert 'License: Apache-2.0' in text or 'License-Expression: Apache-2.0' in text
    assert any(name.endswith('LICENSE') for name in names)
    # The forks install the same packages as OpenMMLab, so that no extra may have both.
    extras = re.findall(r'^Requires-Dist: ([\w-]+).*extra == .([\w-]+)', text, re.MULTILINE)
    forks = {extra for name, extra in extras if name.startswith('onedl-')}
    assert forks == {'onedl-det', 'onedl-seg'}
    assert not any(name.startswith('mm') for name, extra in extras if extra in {*forks, 'timm'})


def test_wheel_imports_in_a_clean_environment(wheel, tmp_path):
    venv.create(tmp_path / 'venv', with_pip=False)
    python = tmp_path / 'venv/bin/python'
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '-q', '--no-deps',
                    wheel], check=True)
    done = subprocess.run([python, '-I', '-c', 'import acmix_mm; print(acmix_mm.__file__)'],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / 'venv')
    # With torch alone, operators and layers work.
    site = next((tmp_path / 'venv/lib').glob('python*/site-packages'))
    (site / 'torch.pth').write_text(str(Path(torch.__file__).parents[1]))
    done = subprocess.run(
        [python, '-I', '-c', 'import torch, acmix_mm\nfrom acmix_mm.layers import ACmixConv2d\n'
         'print(tuple(ACmixConv2d(4, 8)(torch.ones(1, 4, 9, 9)).shape))'],
        cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == '(1, 8, 9, 9)', done.stderr
    # torch's environment also has OpenMMLab. Commands run in any folder and find configs by name.
    base = 'acmix_mm::configs/shapes/maskrcnn_acmix_swin.py'
    (tmp_path / 'own.py').write_text(f'_base_ = {base!r}')
    done = subprocess.run(
        [python, '-I', '-m', 'acmix_mm', 'receptive_field', 'shapes/maskrcnn_acmix_swin', 'own',
         '--shape', '32', '32', '--samples', '1'],
        cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'receptive_field.png').is_file()
    for name in ('maskrcnn_acmix_swin', 'own'):
        assert f'\n{name}: ' in done.stdout
