"""Comparison of kernels and layers with the reference implementation, forward and backward.

The reference computes in float64 from the same, rounded inputs.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Callable, NamedTuple, Optional, Union

import torch
from torch import Tensor

from acmix_mm.benchmark import DTYPES
from acmix_mm.gpu_check.subjects import Subject, layers, operators
from acmix_mm.ops import available_backends, use_backend
from acmix_mm.ops.backend import raising_kernel_errors

# Relative error allowed for rounding of inputs and intermediate sums.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# In layers, the errors of projections, of both paths and of their sum add up.
LAYER_FACTOR = 3
EAGER, AUTOCAST, COMPILED, GRAPH = MODES = ('eager', 'autocast', 'torch.compile', 'CUDA graph')
AUTOMATIC = 'automatic'


class NotRun(NamedTuple):
    """A check or a measurement that could not be run, and why."""

    what: str
    why: str


class Plan(NamedTuple):
    """A check to be run.

    Attributes:
        subject: what is checked.
        backend: what :func:`acmix_mm.ops.use_backend` names; None for the automatic choice.
        dtype: a key of :data:`acmix_mm.benchmark.DTYPES`; under autocast, that of autocast.
        mode: one of ``MODES``.
    """

    subject: Subject
    backend: Optional[str]
    dtype: str
    mode: str = EAGER

    def __str__(self) -> str:
        return (f'{self.subject.name} ({self.subject.case}), backend {self.backend or AUTOMATIC}, '
                f'{self.dtype}, {self.mode}')


class Check(NamedTuple):
    """The result of a check.

    Attributes:
        name: of the operator or layer.
        case: its arguments.
        backend: the backend, or ``'automatic'``.
        dtype: see :class:`Plan`.
        mode: see there.
        error: the largest relative error of the output and all gradients; None after an exception.
        tolerance: the largest error allowed.
        seconds: of the whole check, with compilation.
        message: of the exception; None if there was none.
        passed: whether it passed.
    """

    name: str
    case: str
    backend: str
    dtype: str
    mode: str
    error: Optional[float]
    tolerance: float
    seconds: float
    message: Optional[str]
    passed: bool


def planned_checks(device: str) -> Iterator[Union[Plan, NotRun]]:
    """Yield all checks for a device, and what cannot be checked there.

    Without a GPU, only the Triton kernels are checked, and layers that run on them; of these alone,
    the compiled programs.
    """
    on_gpu = device != 'cpu'
    subjects = [(each, backend, dtype) for dtype in DTYPES for each in layers(not on_gpu)
                for backend in ((None, 'triton') if on_gpu else ('triton',))]
    subjects += [(each, backend, dtype) for dtype in DTYPES for each in operators(not on_gpu)
                 for backend in available_backends(each.name)
                 if backend == 'triton' or (on_gpu and backend != 'reference')]
    # Compiled programs and graphs do not depend on the dtype.
    special = 'bfloat16' if on_gpu else 'float32'
    refused, seen = set(), set()
    for subject, backend, dtype in subjects:
        # The operator does not matter: all have the same requirements.
        why = backend == 'triton' and available_backends('shift_conv', DTYPES[dtype])['triton']
        if why:
            refused.add(NotRun(f'the Triton kernels in {dtype}', why))
            continue
        yield Plan(subject, backend, dtype)
        if subject.is_layer and dtype != 'float32':
            yield Plan(subject, backend, dtype, AUTOCAST)
        is_first = (subject.name, backend) not in seen
        if dtype == special and is_first and (subject.is_layer or (on_gpu and backend == 'triton')):
            seen.add((subject.name, backend))
            yield Plan(subject, backend, dtype, COMPILED)
            if on_gpu:
                yield Plan(subject, backend, dtype, GRAPH)
    yield from sorted(refused)
    if not on_gpu:
        yield NotRun('CUDA graph capture', 'needs a GPU')
        yield NotRun("torch's own backends, and the automatic choice of backends", 'needs a GPU')


def check(plan: Plan, device: str) -> Check:
    """Run a check; exceptions become its message."""
    subject = plan.subject
    tolerance = TOLERANCE[DTYPES[plan.dtype]] * (LAYER_FACTOR if subject.is_layer else 1)
    started = time.perf_counter()
    error, message = None, None
    try:
        with raising_kernel_errors(), full_precision():
            error = error_of(plan, device)
    except Exception as exception:
        message = first_line(exception)
    return Check(subject.name, subject.case, plan.backend or AUTOMATIC, plan.dtype, plan.mode,
                 error, tolerance, time.perf_counter() - started, message,
                 error is not None and error <= tolerance)


def first_line(error: Exception) -> str:
    """The type of an exception and the first line of its message."""
    return ': '.join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def full_precision() -> AbstractContextManager:
    """Make cuDNN compute float32 convolutions in float32, instead of TF32 as by default."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def error_of(plan: Plan, device: str) -> float:
    """The largest relative error of the output and of all gradients; not a number if one is not.

    Raises:
        TypeError: the output is of the wrong dtype.
    """
    dtype = DTYPES[plan.dtype]
    torch.manual_seed(0)
    tensors = [None if each is None else each.to(device) for each in plan.subject.tensors()]

    def run(*leaves: Optional[Tensor]) -> Tensor:
        with use_backend(plan.backend):
            return plan.subject.run(*leaves)

    def reference(*leaves: Optional[Tensor]) -> Tensor:
        with use_backend('reference'):
            return plan.subject.run(*leaves)
    return relative_error(run, reference, tensors, dtype, plan.mode)


def relative_error(run: Callable[..., Tensor], reference: Callable[..., Tensor],
                   tensors: Sequence[Optional[Tensor]], dtype: torch.dtype,
                   mode: str = EAGER) -> float:
    """Compare a function in ``dtype`` with another one in float64: its output and all gradients.

    Args:
        run: takes the tensors; returns one.
        reference: takes the same tensors.
        tensors: in any dtype; None is passed on as it is.
        dtype: of the inputs or, with the mode ``'autocast'``, of autocast.
        mode: one of ``MODES``.

    Returns:
        The largest error, see :func:`largest_error`.

    Raises:
        TypeError: the output of ``run`` is of another dtype.
    """
    inputs = [None if each is None else each.to(torch.float32 if mode == AUTOCAST else dtype)
              for each in tensors]
    exact = as_leaves(inputs, torch.float64)
    expected = [reference(*exact)]
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(expected[0].shape, generator=generator, dtype=torch.float64)
    cotangent = cotangent.to(expected[0].device, dtype)
    expected += gradients(expected[0], exact, cotangent)

    actual = RUN[mode](run, inputs, cotangent)
    if actual[0].dtype != dtype:
        raise TypeError(f'the output is of dtype {actual[0].dtype}, not {dtype}')
    return largest_error(actual, expected)


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest absolute difference of each tensor, relative to its largest expected value.

    Some gradients are zero by algebra; their rounding errors scale with the other tensors.
    """
    for one, other in zip(actual, expected):
        if one.shape != other.shape:
            raise ValueError(f'expected a tensor of shape {tuple(other.shape)}, got '
                             f'{tuple(one.shape)}')
    largest = torch.stack([each.abs().max() for each in expected])
    differences = torch.stack([(one.double() - other).abs().max()
                               for one, other in zip(actual, expected)])
    # Of a tensor, max() is not a number if one of its elements is not.
    return (differences / largest.clamp(min=0.1 * largest.max())).max().item()


def as_leaves(inputs: Sequence[Optional[Tensor]], dtype: Optional[torch.dtype] = None
              ) -> list[Optional[Tensor]]:
    """Copies that require gradients."""
    return [None if each is None else each.detach().to(dtype or each.dtype, copy=True)
            .requires_grad_() for each in inputs]


def gradients(out: Tensor, leaves: Sequence[Optional[Tensor]],
              cotangent: Tensor) -> tuple[Tensor, ...]:
    """The gradient of each leaf that is not None."""
    return torch.autograd.grad(out, [each for each in leaves if each is not None],
                               cotangent.to(out.dtype))


def run_eagerly(run: Callable[..., Tensor], inputs: Sequence[Optional[Tensor]],
                cotangent: Tensor) -> list[Tensor]:
    leaves = as_leaves(inputs)
    out = run(*leaves)
    return [out, *gradients(out, leaves, cotangent)]


def run_under_autocast(run: Callable[..., Tensor], inputs: Sequence[Optional[Tensor]],
                       cotangent: Tensor) -> list[Tensor]:
    leaves = as_leaves(inputs)
    with torch.autocast(cotangent.device.type, cotangent.dtype):
        out = run(*leaves)
    return [out, *gradients(out, leaves, cotangent)]


def run_compiled(run: Callable[..., Tensor], inputs: Sequence[Optional[Tensor]],
                 cotangent: Tensor) -> list[Tensor]:
    """In one graph; on a CPU without Inductor, whose code there is no concern of this check."""
    torch._dynamo.reset()
    backend = 'inductor' if cotangent.is_cuda else 'aot_eager'
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    return run_eagerly(compiled, inputs, cotangent)


def run_as_graph(run: Callable[..., Tensor], inputs: Sequence[Optional[Tensor]],
                 cotangent: Tensor) -> list[Tensor]:
    """Capture both passes on other values, then replay them on the inputs."""
    leaves = as_leaves([None if each is None else torch.zeros_like(each) for each in inputs])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Kernels are compiled and libraries initialised before the capture, on its stream.
        for _ in range(3):
            out = run(*leaves)
            gradients(out, leaves, cotangent)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = run(*leaves)
        results = [out, *gradients(out, leaves, cotangent)]
    with torch.no_grad():
        for leaf, value in zip(leaves, inputs):
            if leaf is not None:
                leaf.copy_(value)
    graph.replay()
    return [each.clone() for each in results]


RUN = {EAGER: run_eagerly, AUTOCAST: run_under_autocast, COMPILED: run_compiled,
       GRAPH: run_as_graph}
