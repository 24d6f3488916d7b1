"""Loading weights into a model, with a report of what was loaded."""

import re
from collections.abc import Mapping, Sequence

from mmengine.logging import print_log
from torch import Tensor, nn

from acmix_mm.utils.errors import CheckpointError


def load_with_report(model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str,
                      recognised: str, may_lack: str, may_drop: str, leave: str = '') -> None:
    """Copy weights into ``model`` and log what was loaded, left at its start, and dropped.

    Args:
        model: takes the weights.
        state_dict: the weights, under the model's own names.
        source: where they come from, for messages.
        recognised: what the checkpoint was recognised as, for messages.
        may_lack: regular expression of the model's keys that the checkpoint need not have.
        may_drop: regular expression of the checkpoint's keys that the model need not have.
        leave: regular expression of keys on either side that have nothing to do with the other's,
            or empty.

    Raises:
        CheckpointError: other keys are missing or left over, or shapes differ; the model is as
            before.
    """
    own = model.state_dict()
    if leave:
        may_lack, may_drop = f'{may_lack}|{leave}', f'{may_drop}|{leave}'
    shared = {key: state_dict[key] for key in own
              if key in state_dict and not (leave and re.search(leave, key))}
    missing = [key for key in own if key not in shared]
    dropped = [key for key in state_dict if key not in shared]
    unfit = [f'{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}'
             for key, value in shared.items() if value.shape != own[key].shape]
    lacking = [key for key in missing if not re.search(may_lack, key)]
    left_over = [key for key in dropped if not re.search(may_drop, key)]
    if unfit or lacking or left_over:
        problems = [f'{label}: {summary(keys)}' for label, keys in
                    (('missing', lacking), ('not in the model', left_over),
                     ('of another shape', unfit)) if keys]
        raise CheckpointError(f'The checkpoint {source} ({recognised}) does not fit this '
                              f'{type(model).__name__}: {"; ".join(problems)}.')
    model.load_state_dict(shared, strict=False)
    print_log(f'{source}: recognised as {recognised}.\n'
              f'  loaded: {len(own) - len(missing)} of {len(own)} entries\n'
              f'  left at the initial value: {summary(missing) or "none"}\n'
              f'  dropped: {summary(dropped) or "none"}', logger='current')


def start_as_plain(model: nn.Module, host: str) -> None:
    """Set rate1 = 1 and rate2 = 0 everywhere in ``model``, which has a plain network's weights.

    ``host`` is what that network is called, for the log.
    """
    rates = {name: parameter for name, parameter in model.named_parameters()
             if name.endswith(('.rate1', '.rate2'))}
    for name, parameter in rates.items():
        nn.init.constant_(parameter, float(name.endswith('.rate1')))
    print_log(f'  rate1 = 1 and rate2 = 0: at first it computes what the plain {host} did.' if rates
              else f'  Without rates the convolution path adds to what the plain {host} did.',
              logger='current')


def summary(keys: Sequence[str], most: int = 8) -> str:
    """List keys, with those that differ only in numbers as one line: ``a.*.b (12×)``."""
    alike: dict[str, list[str]] = {}
    for key in keys:
        alike.setdefault(re.sub(r'\.\d+(?=\.)', '.*', key), []).append(key)
    lines = [f'{pattern} ({len(group)}×)' if len(group) > 1 else group[0]
             for pattern, group in alike.items()]
    if len(lines) > most:
        lines = [*lines[:most], f'and {len(lines) - most} more']
    return ', '.join(lines)
