"""User-facing errors; the tools print their message without a traceback."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Optional


class UsageError(Exception):
    """An argument, a setting or a file is invalid; the message names it and the remedy."""


class CheckpointError(UsageError):
    """A checkpoint is missing, unreachable, damaged, unsafe, or does not match the model."""


def is_interruption(error: Optional[BaseException]) -> bool:
    """Whether an exception is KeyboardInterrupt, or was raised while handling one.

    A signal may also reach data loader workers, whose end torch reports as a RuntimeError.
    """
    return error is not None and (isinstance(error, KeyboardInterrupt)
                                  or is_interruption(error.__context__))


class DataError(UsageError):
    """An image or a mask is missing, damaged, or does not match the config or the other files.

    Of the processes of a distributed run, the one that reads the file raises it.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader passes an error on from a worker process with the traceback in its message.
        super().__init__(message.rpartition('.DataError: ')[2].rstrip())


def suggestion(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that begins like an unknown one, or is closest to it.

    Returns:
        ``' (did you mean NAME?)'``, to be added to a message; empty if no name is close.
    """
    known = sorted(known, key=len)
    begins = [each for each in known if len(name) > 2 and each.startswith(name)]
    close = begins or get_close_matches(name, known, 1)
    return f' (did you mean {close[0]}?)' if close else ''


def summary(names: Sequence[str], most: int = 8) -> str:
    """List names in a line; keys that differ only in numbers become one item, ``a.*.b (12×)``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'\.\d+(?=\.)', '.*', name), []).append(name)
    items = [f'{pattern} ({len(group)}×)' if len(group) > 1 else group[0]
             for pattern, group in groups.items()]
    if len(items) > most:
        items = [*items[:most], f'and {len(items) - most} more']
    return ', '.join(items)
