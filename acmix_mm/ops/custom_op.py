"""Functions that torch.compile and torch.export keep as one node of the graph."""

import functools
from typing import Callable

import torch


def custom_op(fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function of tensors as the custom op ``acmix_mm::<its name>``.

    Otherwise a Python loop over rows would be unrolled into thousands of nodes, and traced again
    for each size. The schema follows from the type annotations. The function must neither modify
    nor return its arguments.

    ``inspect.unwrap`` returns the function itself. Torch has custom ops since 2.4; before, the
    function is returned unchanged.

    Args:
        fake: takes the same arguments and returns empty tensors with the shapes, dtypes and
            strides of the results.
    """
    def register(run: Callable) -> Callable:
        if not hasattr(torch.library, 'custom_op'):
            return run
        operator = torch.library.custom_op(f'acmix_mm::{run.__name__}', run, mutates_args=())
        operator.register_fake(fake)
        functools.update_wrapper(operator, run)
        return operator
    return register
