"""Index tables and masks that depend on sizes alone: made once for each size, then kept."""

from functools import lru_cache, wraps
from typing import Callable

import torch

# Torch has this from 2.3 on; before, a cache is not looked through.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)


def cached_by_size(make: Callable) -> Callable:
    """Keep the tensors that a function of sizes, dtype and device has returned lately."""
    kept = lru_cache(maxsize=128)(make)

    @wraps(make)
    def table(*sizes: object) -> object:
        # torch.compile looks through a cache, warns of it, and puts the table into its graph.
        if is_compiling():
            return make(*sizes)
        # A tensor that is made under inference mode could not be used in training later.
        with torch.inference_mode(False):
            return kept(*sizes)
    return table
