"""The backbones of the configs that MMDetection and MMSegmentation install."""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import mmdet
import mmseg
import pytest
from mmengine.config import Config

LIBRARIES = {'mmdet': mmdet, 'mmseg': mmseg}
HOSTS = ('ResNet', 'ResNetV1c', 'ResNetV1d', 'SwinTransformer', 'PyramidVisionTransformer',
         'PyramidVisionTransformerV2')


class InstalledBackbone(NamedTuple):
    """A backbone, without its checkpoint.

    Attributes:
        library: name of the library whose configs have it.
        type: its type in that library.
        arguments: its other arguments.
        files: the configs that have it.
    """

    library: str
    type: str
    arguments: dict
    files: list[Path]


def installed_backbones():
    """Collect the distinct backbones with an ACmix counterpart from all installed configs."""
    files = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        parse_once(patch)
        for library, package in LIBRARIES.items():
            root = Path(package.__file__).parent / '.mim' / 'configs'
            for file in sorted(root.rglob('*.py')):
                if '_base_' in file.parts:
                    continue
                for backbone in backbones_of(file):
                    files[library, json.dumps(backbone, sort_keys=True)].append(file)
    found = []
    for (library, key), theirs in files.items():
        arguments = json.loads(key)
        found.append(InstalledBackbone(library, arguments.pop('type'), arguments, theirs))
    return found


def parse_once(patch):
    """Let MMEngine parse every file once, also those that many configs are based on.

    A parsed file costs MMEngine several temporary files, which are fastest in memory.
    """
    parse, parsed = Config._file2dict, {}

    def file2dict(filename, use_predefined_variables=True, use_environment_variables=False,
                  lazy_import=None):
        key = Path(filename).resolve()
        if key not in parsed:
            parsed[key] = parse(filename, use_predefined_variables, False, lazy_import)
        values, text, variables = parsed[key]
        return dict(values), text, dict(variables)

    patch.setattr(Config, '_file2dict', staticmethod(file2dict))
    if Path('/dev/shm').is_dir():
        patch.setattr(tempfile, 'tempdir', '/dev/shm')


def backbones_of(file):
    """The distinct backbones of a config that have an ACmix counterpart.

    Some installed files are no configs of this kind, or are based on files of projects that are not
    installed.
    """
    try:
        config = Config._file2dict(str(file))[0]
    except (ModuleNotFoundError, FileNotFoundError):
        return []
    except RuntimeError as error:
        if 'lazy_import' not in str(error):
            raise
        return []
    found = []

    def visit(value):
        if isinstance(value, dict):
            if value.get('type') in HOSTS:
                backbone = {name: each for name, each in value.items()
                            if name not in ('init_cfg', 'pretrained')}
                if backbone not in found:
                    found.append(backbone)
            for each in value.values():
                visit(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                visit(each)

    visit(Config(dict(model=config.get('model'))).to_dict())
    return found
