"""The commands, options, paths, links and Python names in the documentation exist."""

import argparse
import ast
import functools
import importlib
import importlib.util
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from helpers import CONFIGS, ROOT

PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/**/*.md')])
NOTEBOOK = ROOT / 'docs/tour.ipynb'


def cells(kind):
    """The text of all cells of the notebook that are of one kind, without magic commands."""
    found = [''.join(cell['source']) for cell in json.loads(NOTEBOOK.read_text())['cells']
             if cell['cell_type'] == kind]
    return [re.sub(r'^%.*$', '', text, flags=re.MULTILINE) for text in found]


def blocks(text, language):
    """The contents of the fenced code blocks in a language, without their indentation."""
    found = re.finditer(rf'^( *)```{language}\n(.*?)^\1```', text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf'^{match[1]}', '', match[2], flags=re.MULTILINE) for match in found]


def find_commands():
    """Yield the words of every command line, without the variables that are set in front of it."""
    for page in PAGES:
        for block in blocks(page.read_text(), 'bash'):
            for line in re.sub(r'\\\n', ' ', block).splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r'[A-Z_]+=', words[0]):
                    del words[0]
                if words:
                    yield pytest.param(words, id=f'{page.name}: {" ".join(words[:3])}')


COMMANDS = list(find_commands())


class ParsedError(BaseException):
    """Raised where a tool has parsed its arguments, and would start to work."""


@pytest.fixture
def parse(monkeypatch):
    """Run a tool in this process until it has parsed its arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        parse_args(parser, args, namespace)
        raise ParsedError

    def run(tool, *arguments):
        monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_and_stop)
        monkeypatch.setattr('sys.argv', [tool, *arguments])
        with pytest.raises(ParsedError):
            runpy.run_path(str(ROOT / tool), run_name='__main__')
    return run


@pytest.mark.parametrize('words', COMMANDS)
def test_command_exists_and_accepts_its_options(words, parse):
    if words[0] == 'make':
        makefile = (ROOT / 'Makefile').read_text()
        for word in words[1:]:
            name, is_variable, _ = word.partition('=')
            assert re.search(rf'^{name} ?\?=' if is_variable else rf'^{name}:', makefile,
                             re.MULTILINE), word
    elif words[:3] == ['python', '-m', 'acmix_mm'] and words[3:]:
        parse('acmix_mm/__main__.py', *words[3:])
    elif words[:2] == ['python', '-m']:
        assert importlib.util.find_spec(words[2])
    elif words[0] == 'python' and words[1].startswith('tools/'):
        parse(*words[1:])
    elif words[0] == 'python' and words[1].endswith('.py'):
        assert (ROOT / words[1]).is_file()
    elif words[0] == 'tools/dist_train.sh':
        config, processes, *options = words[1:]
        assert processes.isdecimal()
        parse('tools/train.py', config, *options)
    elif words[0] == 'tools/dist_test.sh':
        config, checkpoint, processes, *options = words[1:]
        assert processes.isdecimal()
        parse('tools/test.py', config, checkpoint, *options)
    elif words[0] == 'tools/slurm_train.sh':
        _, _, config, work_dir, *options = words[1:]
        parse('tools/train.py', config, '--work-dir', work_dir, *options)
    elif words[0] == 'tools/slurm_test.sh':
        _, _, config, checkpoint, *options = words[1:]
        parse('tools/test.py', config, checkpoint, *options)
    else:
        assert not words[0].startswith('tools/'), f'no check for {words[0]}'


def test_commands_are_found():
    words = {word for param in COMMANDS for word in param.values[0]}
    assert words >= {'make', 'tools/train.py', 'tools/dist_test.sh', 'acmix_mm.environment'}


@pytest.mark.parametrize('options', ['--mixers acmix --absent', '--mixers acmix --seeds many', ''])
def test_wrong_options_are_found(options, parse):
    with pytest.raises(SystemExit):
        parse('tools/compare.py', 'config.py', *options.split())


@pytest.mark.parametrize('page', [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_configs_and_tools_exist(page):
    text = page.read_text()
    named = re.findall(r'(?<![\w/])((?:configs|tools)/[\w/.-]+\.(?:py|sh|yml))\b', text)
    assert [path for path in named if not (ROOT / path).is_file()] == []
    for package, path in re.findall(r'\b(mmdet|mmseg)::([\w/.-]+\.py)', text):
        root = Path(importlib.util.find_spec(package).origin).parent
        assert (root / '.mim/configs' / path).is_file(), path


@pytest.mark.parametrize('page', [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_images_exist(page):
    text = '\n'.join(cells('markdown')) if page == NOTEBOOK else page.read_text()
    text = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    paths = [link.partition('#')[0] for link in links if not re.match('[a-z]+:', link)]
    assert [path for path in paths if path and not (page.parent / path).exists()] == []


def resolve(name):
    """The object with a dotted name; raises AttributeError if it does not exist.

    Modules go first: acmix_mm.ops.involution is a package, and exports a function of its name.
    """
    words = name.split('.')
    for length in range(len(words), 0, -1):
        try:
            found = importlib.import_module('.'.join(words[:length]))
        except ModuleNotFoundError as error:
            if not error.name.startswith('acmix_mm'):
                raise
            continue
        return functools.reduce(getattr, words[length:], found)


@pytest.mark.parametrize('page', [*PAGES, NOTEBOOK], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_names_exist(page):
    text = page.read_text()
    for name in sorted(set(re.findall(r'(?<![\w./])acmix_mm(?:\.[A-Za-z_]\w*)+', text))):
        resolve(name)
    for code in cells('code') if page == NOTEBOOK else blocks(text, 'python'):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('acmix_mm'):
                for alias in node.names:
                    resolve(f'{node.module}.{alias.name}')


def test_resolve_finds_a_wrong_name():
    assert resolve('acmix_mm.layers.ACmixConv2d').__name__ == 'ACmixConv2d'
    for name in ('acmix_mm.absent', 'acmix_mm.layers.Absent', 'acmix_mm.layers.ACmixConv2d.absent'):
        with pytest.raises(AttributeError):
            resolve(name)


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_every_config_is_in_the_zoo():
    zoo = (ROOT / 'docs/config-zoo.md').read_text()
    names = {path.removeprefix('configs/').removesuffix('.py') for path in CONFIGS}
    assert set(re.findall(r'^\| `([\w/]+)` \|', zoo, re.MULTILINE)) == names


def test_notebook_has_no_outputs():
    """They are made when the documentation is built."""
    for cell in json.loads(NOTEBOOK.read_text())['cells']:
        assert not cell.get('outputs')
        assert cell.get('execution_count') is None
