"""Functions with backward passes of their own that can be differentiated more than once.

A backward pass written by hand is not recorded by autograd. For gradients of gradients
(``create_graph=True``), it is replaced by that of the same function in torch's own operations.
"""

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor

from acmix_mm.ops.caching import is_compiling


def recomputing(run: Callable[..., Tensor],
                run_backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """Make a differentiable function that saves only its inputs for the backward pass.

    Args:
        run: takes tensors, then other arguments; returns a tensor. It consists of differentiable
            operations.
        run_backward: takes the gradient of the output and the arguments of ``run``; returns the
            gradient of each tensor.
    """
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = inputs[len(tensors):]

    def gradients(ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
        arguments = *ctx.saved_tensors, *ctx.others
        if creates_graph():
            # Autograd cannot see inside a custom op.
            return differentiable_gradients(inspect.unwrap(run), grad_out, *arguments)
        return *run_backward(grad_out, *arguments), *[None] * len(ctx.others)

    return differentiable(run, setup_context, gradients)


def passing_on(run: Callable[..., Tensor], run_backward: Callable[..., tuple[Tensor, ...]],
               add_backward: Callable[..., tuple[Tensor, ...]],
               ) -> Callable[..., tuple[Tensor, Tensor]]:
    """:func:`recomputing` for a function of a large tensor that others read, too.

    Others should read what the function returns of it. Their gradient is then known in the backward
    pass, which adds to it in place. Autograd would sum both gradients into a third tensor.

    Args:
        run: see :func:`recomputing`; the first argument is the large tensor.
        run_backward: see :func:`recomputing`.
        add_backward: takes the gradient of the large tensor from others, to which it adds, and the
            arguments of ``run_backward``; returns the same.

    Returns:
        Takes the arguments of ``run``; returns its result and the large tensor.
    """
    class PassingOn(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            tensors = [each for each in arguments if isinstance(each, Tensor)]
            ctx.save_for_backward(*tensors)
            ctx.others = arguments[len(tensors):]
            ctx.set_materialize_grads(False)
            return run(*arguments), arguments[0]

        @staticmethod
        def backward(ctx: Any, grad_out: Optional[Tensor], grad_passed: Optional[Tensor],
                     ) -> tuple[Optional[Tensor], ...]:
            arguments = *ctx.saved_tensors, *ctx.others
            if grad_out is None:
                return grad_passed, *[None] * (len(arguments) - 1)
            if creates_graph():
                grad, *others = differentiable_gradients(inspect.unwrap(run), grad_out, *arguments)
                if grad is not None and grad_passed is not None:
                    grad = grad + grad_passed
                return grad, *others
            if grad_passed is None:
                grads = run_backward(grad_out, *arguments)
            else:
                grads = add_backward(grad_passed, grad_out, *arguments)
            return *grads, *[None] * len(ctx.others)

    compiled = recomputing(run, run_backward)

    def apply(*arguments: Any) -> tuple[Tensor, Tensor]:
        if is_compiling():
            return compiled(*arguments), arguments[0]
        return PassingOn.apply(*arguments)
    return apply


def differentiable(run: Callable, setup_context: Callable, run_backward: Callable) -> Callable:
    """Give a function a backward pass of its own.

    torch.compile records the backward pass of an autograd.Function without its derivatives, and
    second derivatives would silently be wrong. It therefore calls a custom op itself, for which the
    backward pass is registered. Without torch.compile, this would silently lose the tangents of
    forward mode, which an autograd.Function refuses.

    Args:
        run: takes tensors and other arguments.
        setup_context: takes a context and, as ``inputs`` and ``output``, the arguments and results
            of ``run``; saves what the backward pass needs.
        run_backward: takes the context and the gradients of the results; returns the gradient of
            each argument, or None.
    """
    class Differentiable(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            results = run(*arguments)
            setup_context(ctx, inputs=arguments, output=results)
            return results

        backward = staticmethod(run_backward)

    if not hasattr(run, 'register_autograd'):
        return Differentiable.apply
    run.register_autograd(run_backward, setup_context=setup_context)

    def apply(*arguments: Any) -> Any:
        return run(*arguments) if is_compiling() else Differentiable.apply(*arguments)
    return apply


def creates_graph() -> bool:
    """Whether the gradients that a backward pass returns are to be differentiated."""
    # While torch.compile traces a backward pass, the answer is not known. Where it then traces
    # second derivatives away, torch raises an error when they are computed.
    return not is_compiling() and torch.is_grad_enabled()


def differentiable_gradients(run: Callable, grad_out: Union[Tensor, Sequence[Any]],
                             *arguments: Any) -> tuple[Optional[Tensor], ...]:
    """Compute gradients by autograd, so that they can be differentiated in turn.

    Args:
        run: takes the arguments; returns a tensor or several. It consists of differentiable
            operations.
        grad_out: gradient of each output.
        arguments: tensors and others.

    Returns:
        The gradient of each argument; None if it does not require one, or has no effect.
    """
    # One tensor may have been computed from another; as views, each has a gradient of its own.
    views = [each.view_as(each) if isinstance(each, Tensor) else each for each in arguments]
    needed = [isinstance(each, Tensor) and each.requires_grad for each in views]
    leaves = itertools.compress(views, needed)
    outs, grads_out = ((each,) if isinstance(each, Tensor) else each
                       for each in (run(*views), grad_out))
    # Of several outputs, some may not depend on what requires a gradient.
    outs, grads_out = zip(*((out, grad) for out, grad in zip(outs, grads_out) if out.requires_grad))
    grads = iter(torch.autograd.grad(outs, tuple(leaves), grads_out, create_graph=True,
                                     allow_unused=True))
    return tuple(next(grads) if each else None for each in needed)
