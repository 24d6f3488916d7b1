"""Cached index tables and masks, which depend on sizes alone."""

from functools import lru_cache, wraps
from typing import Callable

import torch

# Torch has this since 2.3; before, torch.compile traces through the cache.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)


def cached_by_size(make: Callable) -> Callable:
    """Cache the tensors that a function of sizes, dtype and device returned recently."""
    cached = lru_cache(maxsize=128)(make)

    @wraps(make)
    def table(*sizes: object) -> object:
        # torch.compile would trace through the cache with a warning; the graph holds the table.
        if is_compiling():
            return make(*sizes)
        # A tensor made in inference mode could not be used in training later.
        with torch.inference_mode(False):
            return cached(*sizes)
    return table


def constant_in_graphs(make: Callable) -> Callable:
    """Mark a function of constants whose result torch.compile takes as a constant of the graph.

    The same as ``torch.compiler.assume_constant_result``, which would import ``torch._dynamo``, and
    with it Triton, when this package is imported.
    """
    setattr(make, '_dynamo_marked_constant', True)  # noqa: B010
    return make
