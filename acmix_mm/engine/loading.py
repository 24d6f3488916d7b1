"""Checks of the checkpoints that MMEngine's runner loads, before it uses them."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from acmix_mm.checkpoints.reading import is_state_dict
from acmix_mm.utils.errors import CheckpointError


class CheckFormatHook(Hook):
    """Checks that a checkpoint contains weights."""

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: Any) -> None:
        """Check a checkpoint that was read from a file.

        Raises:
            ValueError: it contains no weights; ``load_checkpoint`` adds the name of the file.
        """
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f'it holds a {type(checkpoint).__name__} instead of weights by name')
        if not is_state_dict(checkpoint.get('state_dict', checkpoint)):
            raise ValueError('it holds no weights by name')


class CheckResumableHook(Hook):
    """Checks that a checkpoint contains what resuming needs besides the weights.

    Args:
        source: the checkpoint, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def after_load_checkpoint(self, runner: Runner, checkpoint: Mapping[str, Any]) -> None:
        """Check a checkpoint that was read from a file.

        Raises:
            CheckpointError: something is missing.
        """
        needed = ['meta', 'message_hub', 'optimizer']
        if runner.param_schedulers:
            needed.append('param_schedulers')
        missing = [key for key in needed if key not in checkpoint]
        meta = checkpoint.get('meta')
        if isinstance(meta, Mapping):
            missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta]
        if missing:
            raise CheckpointError(not_resumable(self.source, f'it lacks {", ".join(missing)}'))


def not_resumable(source: str, reason: str) -> str:
    """The message that a checkpoint cannot be resumed from."""
    return (f'Training cannot be resumed from {source}: {reason}. To start a new training from its '
            f'weights, pass --cfg-options load_from={source} instead of --resume.')
