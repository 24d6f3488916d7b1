"""Loading weights into a model, with a report of what was loaded."""

import re

from mmengine.logging import print_log
from torch import nn

from acmix_mm.checkpoints.recognition import Pretrained
from acmix_mm.utils.errors import CheckpointError, summary


def load_with_report(model: nn.Module, found: Pretrained, *, may_lack: str, may_drop: str,
                     leave: str = '') -> None:
    """Load weights into a model and log which keys were loaded, kept as initialised, and dropped.

    Args:
        model: the model.
        found: the weights, under the keys of the model.
        may_lack: regular expression for keys of the model that may be missing in the weights.
        may_drop: regular expression for keys of the weights that may be missing in the model.
        leave: regular expression for keys to ignore on both sides; empty for none.

    Raises:
        CheckpointError: other keys are missing, or shapes differ; the model is unchanged.
    """
    own, state_dict = model.state_dict(), found.state_dict
    if leave:
        may_lack, may_drop = f'{may_lack}|{leave}', f'{may_drop}|{leave}'
    shared = {key: state_dict[key] for key in own
              if key in state_dict and not (leave and re.search(leave, key))}
    missing = [key for key in own if key not in shared]
    dropped = [key for key in state_dict if key not in shared]
    misshapen = [f'{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}'
             for key, value in shared.items() if value.shape != own[key].shape]
    lacking = [key for key in missing if not re.search(may_lack, key)]
    left_over = [key for key in dropped if not re.search(may_drop, key)]
    if misshapen or lacking or left_over:
        problems = [f'{label}: {summary(keys)}' for label, keys in
                    (('missing', lacking), ('not in the model', left_over),
                     ('of another shape', misshapen)) if keys]
        raise CheckpointError(f'The checkpoint {found.source} ({found}) does not fit this '
                              f'{type(model).__name__}: {"; ".join(problems)}.')
    model.load_state_dict(shared, strict=False)
    print_log(f'{found.source}: recognised as {found}.\n'
              f'  loaded: {len(own) - len(missing)} of {len(own)} entries\n'
              f'  left at the initial value: {summary(missing) or "none"}\n'
              f'  dropped: {summary(dropped) or "none"}', logger='current')


def start_as_plain(model: nn.Module, host: str) -> None:
    """Set rate1 = 1 and rate2 = 0 in all layers, so that the model computes what its host did.

    Args:
        model: an ACmix network that has loaded the weights of its plain host.
        host: name of the host, for the log.
    """
    rates = {name: parameter for name, parameter in model.named_parameters()
             if name.endswith(('.rate1', '.rate2'))}
    for name, parameter in rates.items():
        nn.init.constant_(parameter, float(name.endswith('.rate1')))
    print_log(f'  rate1 = 1 and rate2 = 0: the model starts as the plain {host}.' if rates else
              f'  There are no rates: the convolution path adds to the output of the plain {host}.',
              logger='current')
