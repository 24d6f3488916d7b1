"""User-facing errors; the tools print their message without a traceback."""


class UsageError(Exception):
    """An argument, a setting or a file is invalid; the message names it and the remedy."""


class CheckpointError(UsageError):
    """A checkpoint is missing, unreachable, damaged, unsafe, or does not match the model."""
