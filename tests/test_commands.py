"""The command line: which commands there are, how they are called and how they find configs."""

import runpy

import pytest
from helpers import ROOT

from acmix_mm import commands
from acmix_mm.engine.config import find_config, load_config
from acmix_mm.utils.errors import UsageError

NAMES = commands.command_names()


@pytest.fixture
def call(monkeypatch, capsys):
    """Run ``python -m acmix_mm`` or a tool in this process; return what it prints."""
    def run(program, *arguments):
        monkeypatch.setattr('sys.argv', [program, *arguments])
        if program == 'acmix_mm':
            commands.main()
        else:
            monkeypatch.chdir(ROOT)
            runpy.run_path(program, run_name='__main__')
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize('arguments', [[], ['--help']])
def test_commands_are_listed_with_a_line_each(arguments, call):
    listed = call('acmix_mm', *arguments)
    for name in NAMES:
        assert f'\n  {name} ' in listed
    assert '\n  train            Train a detector or segmentor.\n' in listed


def test_every_command_has_a_tool():
    assert sorted(path.stem for path in ROOT.glob('tools/*.py')) == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_help_has_an_example_with_the_program_that_was_called(name, call, capsys):
    for program, shown in ((('acmix_mm', name), f'python -m acmix_mm {name}'),
                           ((f'tools/{name}.py',), f'python tools/{name}.py')):
        with pytest.raises(SystemExit) as stopped:
            call(*program, '--help')
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f'usage: {shown} ')
        assert f'Example: {shown} ' in printed or f'Examples: {shown} ' in printed


@pytest.mark.parametrize(('name', 'message'), [
    ('trian', "There is no command 'trian'; did you mean train?"),
    ('xyz', "There is no command 'xyz'. `python -m acmix_mm` lists the commands."),
])
def test_unknown_commands_are_errors(name, message, call):
    with pytest.raises(SystemExit) as stopped:
        call('acmix_mm', name)
    assert str(stopped.value).startswith(f'error: {message}')


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('shapes/maskrcnn_acmix_swin', 'shapes/maskrcnn_acmix_swin.py'):
        assert load_config(name).model.backbone.embed_dims == 24
    (tmp_path / 'shapes').mkdir()
    (tmp_path / 'shapes/maskrcnn_acmix_swin.py').touch()
    for name in ('shapes/maskrcnn_acmix_swin', 'shapes/maskrcnn_acmix_swin.py'):
        assert find_config(name) == 'shapes/maskrcnn_acmix_swin.py'


@pytest.mark.parametrize(('name', 'known'), [
    ('configs/maskrcnn_acmix_swim_t.py', 'similar ones are maskrcnn_acmix_swin_t,'),
    ('xyz', 'there are cascade_maskrcnn_acmix_r50,'),
])
def test_unknown_configs_are_errors(name, known):
    with pytest.raises(UsageError) as raised:
        find_config(name)
    assert str(raised.value).startswith(
        f'{name} is neither a file nor the name of an installed config; {known}')
