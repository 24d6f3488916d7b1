"""User-facing errors; the tools print their message without a traceback."""

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
