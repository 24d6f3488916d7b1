"""Naming and choosing the forms of an operator."""

import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Callable, Optional

import torch
from torch import Tensor

# Torch has these from 2.7 and 2.3 on; before, an export takes what torch.compile does.
torch_exports = getattr(torch.compiler, 'is_exporting', lambda: False)
dynamo_traces = getattr(torch.compiler, 'is_dynamo_compiling', lambda: True)


def named_form(operator: str, forms: Mapping[str, Callable], form: Optional[str],
               default: str, exported: str) -> Callable:
    """Return the form of ``operator`` called ``form``.

    Where it is None that is ``default``, or in an export ``exported``: a form that is written in
    torch's own operations and in sizes that stay open, so that other runtimes can take it.

    Raises:
        ValueError: ``form`` is not one of ``forms``.
    """
    if form is None:
        form = exported if is_exporting() else default
    if form not in forms:
        raise ValueError(f'{operator} has no form {form!r}; it has {", ".join(sorted(forms))}.')
    return forms[form]


def is_exporting() -> bool:
    """Whether torch.export is tracing, other than with ``strict=True``."""
    # Under torch.compile torch says that it is exporting, too.
    return torch_exports() and not dynamo_traces()


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels can take a tensor: on an NVIDIA GPU, or under its interpreter."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not has_triton():
        return False
    if os.environ.get('TRITON_INTERPRET') == '1':
        return True
    return tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0)


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether the package triton is there, in version 3 or newer."""
    try:
        return int(version('triton').split('.')[0]) >= 3
    except PackageNotFoundError:
        return False


def require_triton(operator: str, tensor: Tensor) -> None:
    """Refuse what Triton's kernels cannot take.

    Raises:
        ValueError: see :func:`runs_triton`.
    """
    if not runs_triton(tensor):
        raise ValueError(
            f"{operator}'s form 'triton' takes float32, bfloat16 or float16 on an NVIDIA GPU of "
            'compute capability 8.0 or higher, with triton 3 or newer installed; got '
            f'{tensor.dtype} on {tensor.device}. Leave out form to have one chosen.')
