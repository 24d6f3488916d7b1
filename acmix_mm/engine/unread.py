"""Settings that no code reads, such as misspelt ones, which constructors and heads accept silently.

A setting has no effect if its name occurs nowhere in the source of the packages that could read it.
"""

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Callable, NamedTuple

from mmengine.config import Config
from mmengine.registry import MODELS

from acmix_mm.engine.settings import components, find, parameters_of
from acmix_mm.utils.errors import UsageError, suggestion

# Settings of training and testing in a model, which its heads read.
HEAD_SETTINGS = ('train_cfg', 'test_cfg', 'semi_train_cfg', 'semi_test_cfg')
# Keys in the libraries' own configs that nothing reads.
WITHOUT_EFFECT = ('debug',)
# How the libraries read these settings.
READ = re.compile(r'''cfg\w*(?:\.(?:get|pop)\(\s*['"]|\[['"]|\.)([A-Za-z_]\w*)''')
# The operators, which get settings such as those of non-maximum suppression.
OPERATORS = 'mmcv'


def check_unread(cfg: Config) -> None:
    """Check that settings which a constructor or a head accepts without a check have an effect.

    Warns of a setting that may have one, if its name is close to another that has.

    Raises:
        UsageError: no code reads a setting.
    """
    scope = cfg.get('default_scope')
    imported = (cfg.get('custom_imports') or {}).get('imports') or []
    packages = {OPERATORS, *(
        name.partition('.')[0] for name in ([imported] if isinstance(imported, str) else imported))}
    for component in components(cfg):
        kind = component.settings.get('type', component.default_type)
        built = find(kind, component.registries, component.settings.get('_scope_', scope),
                     f'{component.key}.type')
        if MODELS in component.registries:
            packages |= packages_of(built)
        if parameters_of(built, component.passes_on) is None and inspect.isclass(built):
            known = {*arguments_of(built), *component.further_keys, 'type', '_scope_'}
            report(component.key, component.settings, known, packages_of(built), ())
    if cfg.get('model'):
        known = {*read_in(frozenset(packages)), *WITHOUT_EFFECT, 'type'}
        for key, settings in head_settings('model', cfg.model):
            # The arguments of samplers and assigners are not read like this.
            suspicious = {} if 'type' in settings else known
            report(key, settings, known, packages, suspicious)


def report(key: str, settings: Mapping[str, Any], known: Iterable[str], packages: Iterable[str],
           similar: Iterable[str]) -> None:
    """Report the settings that no code reads.

    Args:
        key: the key of the settings in the config.
        settings: the settings.
        known: names that are read.
        packages: the packages that may read further ones.
        similar: names of which similar ones may be misspelt.

    Raises:
        UsageError: no code reads a setting.
    """
    for name in settings:
        if name in known or not isinstance(name, str):
            continue
        searched = frozenset(packages)
        if source_of(searched).is_complete and name not in words_in(searched):
            raise UsageError(f'{key}.{name} is unknown{suggestion(name, known)}: nothing in '
                             f'{", ".join(sorted(packages))} reads a setting of this name.')
        if get_close_matches(name, similar, 1, cutoff=0.8):
            warnings.warn(f'{key}.{name} may have no effect{suggestion(name, similar)}.',
                          stacklevel=3)


def head_settings(key: str, node: Any, inside: bool = False) -> Iterator[tuple[str, Mapping]]:
    """Yield the dicts in and below ``HEAD_SETTINGS`` of a model, with their keys."""
    if isinstance(node, (list, tuple)):
        for index, each in enumerate(node):
            yield from head_settings(f'{key}.{index}', each, inside)
    elif isinstance(node, Mapping):
        if inside:
            yield key, node
        for name, each in node.items():
            yield from head_settings(f'{key}.{name}', each, inside or name in HEAD_SETTINGS)


def arguments_of(built: type) -> set[str]:
    """The names of the arguments of the constructors of a class and of its base classes."""
    return {name for owner in built.__mro__[:-1] if '__init__' in vars(owner)
            for name in inspect.signature(owner.__init__).parameters}


def packages_of(built: Callable) -> set[str]:
    """The packages that define a class and its base classes, except for Python's and torch.

    Of a namespace package, only the module.
    """
    owners = built.__mro__ if inspect.isclass(built) else (built,)
    found = set()
    for module in (owner.__module__ for owner in owners):
        package = module.partition('.')[0]
        if package not in sys.stdlib_module_names and package != 'torch':
            has_file = getattr(sys.modules.get(package), '__file__', None)
            found.add(package if has_file else module)
    return found


class Source(NamedTuple):
    """The source code of packages.

    Attributes:
        text: of all files.
        is_complete: whether all of the code is available.
    """

    text: str
    is_complete: bool


@functools.lru_cache(maxsize=16)
def source_of(packages: frozenset[str]) -> Source:
    """The source code of imported packages."""
    texts, is_complete = [], True
    for name in packages:
        path = Path(getattr(sys.modules.get(name), '__file__', None) or '')
        if path.suffix != '.py':
            is_complete = False
            continue
        for file in path.parent.rglob('*.py') if path.name == '__init__.py' else [path]:
            if '.mim' not in file.parts:
                texts.append(file.read_text())
    return Source('\n'.join(texts), is_complete)


@functools.lru_cache(maxsize=16)
def words_in(packages: frozenset[str]) -> set[str]:
    """All names and words in the source code of imported packages.

    Needed for unknown settings only, which are rare; finding them takes longest.
    """
    return set(re.findall(r'\w+', source_of(packages).text))


@functools.lru_cache(maxsize=16)
def read_in(packages: frozenset[str]) -> set[str]:
    """The names of settings that the heads in imported packages read."""
    return set(READ.findall(source_of(packages).text))
