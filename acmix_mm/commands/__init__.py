"""The command line: ``python -m acmix_mm COMMAND``, or ``python tools/COMMAND.py`` in a clone.

Each module is a command. Its docstring is the help text, ``add_arguments`` defines its arguments,
and ``run`` runs it. This file imports no command and no OpenMMLab package, so that the benchmark
runs with torch alone.
"""

import argparse
import ast
import contextlib
import difflib
import logging
import os
import pkgutil
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from torch import distributed

from acmix_mm.utils.errors import DataError, UsageError, is_interruption


def command_names() -> list[str]:
    """Return the names of all commands."""
    return [module.name for module in pkgutil.iter_modules(__path__)]


def command_list() -> str:
    """Return a text that lists the commands, each with the first line of its help text."""
    names = command_names()
    width = max(map(len, names))
    lines = ['usage: python -m acmix_mm COMMAND …', '', 'commands:']
    for name in names:
        # Not imported, which would take seconds.
        source = Path(__path__[0], f'{name}.py').read_text(encoding='utf-8')
        summary = ast.get_docstring(ast.parse(source)).splitlines()[0]
        lines.append(f'  {name:{width}}  {summary}')
    return '\n'.join([
        *lines, '', 'python -m acmix_mm COMMAND --help describes the arguments of a command. '
        'CONFIG is a file, or the name of\nan installed config, such as maskrcnn_acmix_swin_t.'])


def main() -> None:
    """Run the command that ``sys.argv`` names; without one, list the commands."""
    name, *arguments = sys.argv[1:] or ['--help']
    if name in ('-h', '--help'):
        print(command_list())
        return
    with errors_as_messages():
        if name not in command_names():
            close = difflib.get_close_matches(name, command_names(), n=1)
            raise UsageError(f'There is no command {name!r}' + (f'; did you mean {close[0]}?' if
                             close else '.') + ' `python -m acmix_mm` lists the commands.')
        run_command(name, f'python -m acmix_mm {name}', arguments)


def run_tool(name: str) -> None:
    """Run a command with the arguments of a script in ``tools/``."""
    with errors_as_messages():
        run_command(name, f'python {sys.argv[0]}', sys.argv[1:])


def run_command(name: str, program: str, arguments: Sequence[str]) -> None:
    """Run a command, which reads checkpoints and annotations as data.

    Args:
        name: one of :func:`command_names`.
        program: how the command was called, for its help text and for reports.
        arguments: of the command.

    Raises:
        UsageError: the command cannot do what was asked, or needs a package that is not installed.
        SystemExit: the arguments do not fit the command, or ``--help`` was passed.
    """
    try:
        command = import_module(f'{__name__}.{name}')
    except ModuleNotFoundError as error:
        missing = error.name.partition('.')[0]
        if missing == 'acmix_mm':
            raise
        raise UsageError(f'{name} needs {missing}, which is not installed. Install the extras det '
                         'and seg of acmix-mm or, beside the onedl forks, onedl-det and '
                         'onedl-seg.') from error
    parser = argparse.ArgumentParser(prog=program, description=command.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(parser)
    parser.set_defaults(command_line=f'{program} {shlex.join(arguments)}')
    given = parser.parse_args(arguments)
    with reading_data_only():
        command.run(given)


def reading_data_only() -> contextlib.AbstractContextManager:
    """Make MMEngine, if it is installed, read checkpoints and annotations as data."""
    if not find_spec('mmengine'):
        return contextlib.nullcontext()
    from acmix_mm.engine.data_only import data_only
    return data_only()


def positive_int(text: str) -> int:
    """Convert an argument to a positive integer, for argparse's ``type``.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'must be a positive integer, got {text!r}')
    return int(text)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print a user-facing error without its traceback, and exit with status 1.

    Any other exception is a bug: its traceback is followed by how to report it. SIGTERM interrupts
    the command, like Ctrl-C.
    """
    # Only one process per node prints the message.
    is_first = os.environ.get('LOCAL_RANK', '0') == '0'
    if is_first:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except UsageError as error:
        # All processes have the same message, except that of bad data: only one reads it.
        prints = is_first or isinstance(error, DataError)
        sys.exit(f'error: {error}' if prints else 1)
    except (KeyboardInterrupt, Exception) as error:
        if not is_interruption(error):
            traceback.print_exc()
            sys.exit(f'internal error ({type(error).__name__}): please report the traceback above, '
                     'with the command and the output of `python -m acmix_mm.environment`.')
        # torch's handler would report, while this process exits, that the workers were stopped.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        hint = error.args if isinstance(error, KeyboardInterrupt) else ()
        sys.exit(' '.join(['Interrupted.', *hint]) if is_first else 1)
    exit_after_gloo()


def exit_after_gloo() -> None:
    """Exit immediately if this is a process of a distributed CPU job.

    Gloo's threads sometimes outlive the interpreter and abort a finished process ("terminate
    called without an active exception"), which torchrun then reports as a failure.
    """
    running = distributed.is_available() and distributed.is_initialized()
    if running and distributed.get_backend() == 'gloo':
        distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
