"""The backends of the operators: registration, selection and availability.

An operator runs on the first of these that applies:

1. the backend named by its ``backend`` argument;
2. the backend of the innermost enclosing :func:`use_backend`, of those that the operator has;
3. the backend named by the environment variable ``ACMIX_BACKEND``, if the operator has it. The
   variable is read when ``acmix_mm.ops`` is imported;
4. its automatic choice, by device, dtype and shapes.

Each choice is logged once per operator, backend and device type, at debug level, by the logger
``acmix_mm``.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Callable, NamedTuple, Optional, TypeVar

import torch
from torch import Tensor

# Torch has these since 2.7, 2.3 and 2.3. Before, an export runs what torch.compile does, and
# choices are not logged.
_torch_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
_is_dynamo_compiling = getattr(torch.compiler, 'is_dynamo_compiling', lambda: True)
_is_compiling = getattr(torch.compiler, 'is_compiling', lambda: True)

Result = TypeVar('Result')

ENVIRONMENT_VARIABLE = 'ACMIX_BACKEND'
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter's products of bfloat16 matrices are wrong.
INTERPRETER_DTYPES = (torch.float32, torch.float16)


class Backend(NamedTuple):
    """One implementation of an operator.

    Attributes:
        name: its name, unique within the operator.
        run: the implementation; takes checked arguments.
        unavailable: takes a dtype; returns why this machine cannot run it in that dtype, or None
            if it can.
    """

    name: str
    run: Callable[..., Any]
    unavailable: Callable[[torch.dtype], Optional[str]] = lambda dtype: None


_operators: dict[str, dict[str, Backend]] = {}
_failed_kernels: set[str] = set()
_raises_kernel_errors = False
# The names given to use_backend, innermost first, then that of the environment variable.
_preferred: tuple[str, ...] = ()


def register_backends(operator: str, *backends: Backend) -> None:
    """Register the backends of an operator."""
    _operators[operator] = {backend.name: backend for backend in backends}


def select_backend(operator: str, backend: Optional[str], device: torch.device, *,
                   automatic: str, exporting: str) -> Callable[..., Any]:
    """Return the implementation of an operator to run.

    Args:
        operator: name of the public function.
        backend: its ``backend`` argument.
        device: of its inputs; for the log.
        automatic: the choice if nothing else names one.
        exporting: that choice in an export: a backend written in torch's own operations, without
            conditions on sizes, so that other runtimes can run it at any size.

    Raises:
        ValueError: the operator has no backend of that name.
    """
    backends = _operators[operator]
    backend = backend or preferred_backend(operator) or (exporting if is_exporting() else automatic)
    if backend not in backends:
        raise ValueError(f'{operator} has no backend {backend!r}; it has '
                         f'{", ".join(sorted(backends))}.')
    if not _is_compiling():
        _log_once(operator, backend, device.type)
    return backends[backend].run


def preferred_backend(operator: str) -> Optional[str]:
    """The backend that :func:`use_backend` or ``ACMIX_BACKEND`` names for an operator, or None."""
    for name in _preferred:
        if name in _operators[operator]:
            return name
    return None


@contextmanager
def use_backend(name: Optional[str]) -> Iterator[None]:
    """Run operators on the named backend, if they have it and their call names no other.

    Operators without that backend choose as they would outside the context, so nested contexts
    combine. The setting belongs to the process, not to a thread: it also applies to operators that
    other threads run meanwhile.

    Args:
        name: a backend of at least one operator; see :func:`available_backends`. None restores the
            automatic choice, regardless of enclosing contexts and ``ACMIX_BACKEND``.

    Raises:
        ValueError: no operator has a backend of that name. An operator raises ValueError if it has
            the backend but cannot run it on its inputs.
    """
    global _preferred
    outside = _preferred
    if name is None:
        _preferred = ()
    else:
        _check_name(name, 'use_backend')
        _preferred = (name, *outside)
    try:
        yield
    finally:
        _preferred = outside


def available_backends(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Optional[str]]:
    """Map the name of each backend of an operator to None, or to why this machine cannot run it.

    Args:
        op: name of the operator, such as ``'shift_conv'``.
        dtype: of its inputs.

    Raises:
        ValueError: there is no such operator.
    """
    if op not in _operators:
        raise ValueError(f'There is no operator {op!r}; operators with backends are '
                         f'{", ".join(sorted(_operators))}.')
    return {name: backend.unavailable(dtype) for name, backend in _operators[op].items()}


def read_environment() -> None:
    """Apply ``ACMIX_BACKEND``; called once all operators are registered.

    Raises:
        ValueError: no operator has a backend of that name.
    """
    global _preferred
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        _check_name(name, ENVIRONMENT_VARIABLE)
        _preferred = (name,)


def is_exporting() -> bool:
    """Whether torch.export is tracing, except with ``strict=True``."""
    # Under torch.compile, torch.compiler.is_exporting() is true, too.
    return _torch_is_exporting() and not _is_dynamo_compiling()


def _check_name(name: str, source: str) -> None:
    known = {backend for backends in _operators.values() for backend in backends}
    if name not in known:
        raise ValueError(f'{source}: no operator has a backend {name!r}; known backends are '
                         f'{", ".join(sorted(known))}.')


@cache
def _log_once(operator: str, backend: str, device: str) -> None:
    logging.getLogger('acmix_mm').debug('%s runs on backend %r (%s)', operator, backend, device)


def _triton_version() -> Optional[str]:
    try:
        return version('triton')
    except PackageNotFoundError:
        return None


# Looked up at import, so that torch.compile need not trace it.
TRITON_VERSION = _triton_version()


def runs_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels run on a tensor: on an NVIDIA GPU, or in Triton's interpreter."""
    if not has_triton():
        return False
    if interprets_triton():
        return tensor.dtype in INTERPRETER_DTYPES
    # torch.version.hip: AMD's GPUs are CUDA devices to torch, and have capabilities, too.
    return (tensor.is_cuda and torch.version.hip is None and tensor.dtype in TRITON_DTYPES and
            torch.cuda.get_device_capability(tensor.device) >= (8, 0))


def has_triton() -> bool:
    """Whether Triton 3 or newer is installed."""
    return TRITON_VERSION is not None and int(TRITON_VERSION.split('.')[0]) >= 3


def interprets_triton() -> bool:
    """Whether Triton kernels run in its interpreter, which needs no GPU."""
    return os.environ.get('TRITON_INTERPRET') == '1'


def triton_unavailable(dtype: torch.dtype) -> Optional[str]:
    """Why this machine cannot run the Triton kernels in a dtype, or None if it can."""
    if not has_triton():
        found = 'it is not installed' if TRITON_VERSION is None else f'found {TRITON_VERSION}'
        return f'needs the package triton in version 3 or newer; {found}'
    if dtype not in TRITON_DTYPES:
        return f'takes float32, bfloat16 or float16; got {dtype}'
    if interprets_triton():
        return None if dtype in INTERPRETER_DTYPES else (
            f"takes float32 or float16 in Triton's interpreter; got {dtype}")
    if torch.version.hip is not None:
        return f'needs an NVIDIA GPU; torch is built for ROCm {torch.version.hip}'
    capabilities = [torch.cuda.get_device_capability(index)
                    for index in range(torch.cuda.device_count())]
    if max(capabilities, default=(0, 0)) >= (8, 0):
        return None
    found = ', '.join('{}.{}'.format(*each) for each in capabilities) or 'no GPU'
    return f'needs an NVIDIA GPU of compute capability 8.0 or higher; found {found}'


def require_triton(operator: str, tensor: Tensor) -> None:
    """Raise ValueError unless the Triton kernels run on a tensor."""
    if not runs_triton(tensor):
        raise ValueError(
            f"{operator}'s backend 'triton' takes float32, bfloat16 or float16 on an NVIDIA GPU of "
            'compute capability 8.0 or higher, with triton 3 or newer installed, and float32 or '
            f"float16 in Triton's interpreter; got {tensor.dtype} on {tensor.device}. Leave out "
            'backend to have one chosen.')


@contextmanager
def raising_kernel_errors() -> Iterator[None]:
    """Within this context, failing kernels raise their error, and run even if they have failed.

    Like :func:`use_backend`, it belongs to the process.
    """
    global _raises_kernel_errors
    outside = _raises_kernel_errors
    _raises_kernel_errors = True
    try:
        yield
    finally:
        _raises_kernel_errors = outside


def run_kernels(operator: str, kernels: Callable[[], Result],
                torch_backend: Callable[[], Result]) -> Result:
    """Run Triton kernels or, once they have failed to compile or launch, a torch backend.

    The first failure of an operator is a warning; see also :func:`raising_kernel_errors`. Being out
    of memory is none.

    Args:
        operator: name of the public function.
        kernels: runs the kernels; returns new tensors.
        torch_backend: computes the same, apart from what only the kernels' backward pass reads.
    """
    if _raises_kernel_errors:
        return kernels()
    if operator not in _failed_kernels:
        try:
            return kernels()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            _failed_kernels.add(operator)
            warnings.warn(f'The Triton kernels of {operator} failed; it runs in torch from now on. '
                          f'{type(error).__name__}: {error}', RuntimeWarning, stacklevel=2)
    return torch_backend()


def matmul_precision() -> str:
    """The ``input_precision`` of ``tl.dot`` that follows torch's setting for float32 matrices."""
    matmul = torch.backends.cuda.matmul
    # Torch has fp32_precision since 2.9; once it is set, reading allow_tf32 raises.
    precision = getattr(matmul, 'fp32_precision', None)
    allows_tf32 = matmul.allow_tf32 if precision is None else precision == 'tf32'
    # tf32x3 is as precise as float32.
    return 'tf32' if allows_tf32 else 'tf32x3'
