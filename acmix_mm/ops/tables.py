"""Index tables and masks that depend on sizes alone: made once for each size, then kept."""

from functools import lru_cache, wraps
from typing import Callable

import torch


def per_size(make: Callable) -> Callable:
    """Keep the tensors that a function of sizes, dtype and device has returned lately."""
    @lru_cache(maxsize=128)
    @wraps(make)
    def kept(*sizes: object) -> object:
        # A tensor that is made under inference mode could not be used in training later.
        with torch.inference_mode(False):
            return make(*sizes)
    return kept
