"""Reading checkpoints as data, recognising their network, converting keys, and loading weights."""

from acmix_mm.checkpoints.host import HOSTS, HostCheckpoints
from acmix_mm.checkpoints.loading import load_with_report, start_as_plain
from acmix_mm.checkpoints.reading import (
    Weights,
    is_path,
    read_checkpoint,
    read_model_weights,
    read_weights,
)
from acmix_mm.checkpoints.recognition import Pretrained, read_pretrained

__all__ = ['HOSTS', 'HostCheckpoints', 'Pretrained', 'Weights', 'is_path', 'load_with_report',
           'read_checkpoint', 'read_model_weights', 'read_pretrained', 'read_weights',
           'start_as_plain']
