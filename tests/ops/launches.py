"""What Triton compiles for a launch, without a GPU; shared by the scripts in this folder."""

import contextlib
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import MockTensor, create_function_from_signature

TARGET = GPUTarget('cuda', 90, 32)
BACKEND = make_backend(TARGET)


def specialize(kernel, arguments, options):
    """Specialise a kernel to the arguments of a launch, as Triton's own JIT does.

    Args:
        kernel: the jitted function.
        arguments: of the launch. Only the dtypes of tensors are read, so they need no data.
        options: its keyword arguments, constants and options.

    Returns:
        The source, which has a hash; the options of the compiler; all arguments by name.
    """
    mocks = [MockTensor(each.dtype) if isinstance(each, torch.Tensor) else each
             for each in arguments]
    bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    bound, specialization, _ = bind(*mocks, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        BACKEND, options, bound, specialization, None)
    return ASTSource(kernel, signature, constants, attributes), parsed, bound


def recorded(modules, run):
    """Run a function whose launches of the kernels of some modules are recorded instead.

    Returns:
        The name of each kernel, the kernel, and the arguments and constants of the launch.
    """
    launches = []
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, kernel in list(vars(module).items()):
                if name.endswith('_kernel'):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(
                        f'{module.__name__}.{name}', kernel, launches)))
        run()
    return launches


class _Recorder:

    def __init__(self, name, kernel, launches):
        self.name, self.kernel, self.launches = name, kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append(
            (self.name, self.kernel, arguments, constants))
