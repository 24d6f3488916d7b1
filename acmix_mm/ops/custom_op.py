"""Functions that torch.compile and torch.export take as one step."""

from typing import Callable

import torch


def custom_op(shapes: Callable) -> Callable[[Callable], Callable]:
    """Register a function of tensors as an operator of torch, ``acmix_mm::<its name>``.

    What loops over rows in Python would otherwise be unrolled into thousands of steps, for every
    size of the map anew. The function's annotations are the operator's signature; it changes no
    argument and returns none.

    Before torch 2.4, which has no such operators, the function stays as it is.

    Args:
        shapes: takes the same arguments and returns empty tensors such as the function's results.
    """
    def register(run: Callable) -> Callable:
        if not hasattr(torch.library, 'custom_op'):
            return run
        operator = torch.library.custom_op(f'acmix_mm::{run.__name__}', run, mutates_args=())
        operator.register_fake(shapes)
        return operator
    return register
