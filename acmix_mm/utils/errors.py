"""The errors that a user can mend; the tools print them as one message, without a trace."""


class UsageError(Exception):
    """Something given from outside does not fit: the message names it and the remedy."""


class CheckpointError(UsageError):
    """A checkpoint is missing, unreachable, damaged, unsafe, or of another network."""
