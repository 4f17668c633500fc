"""Helpers of this library's autograd functions.

These functions have neither second derivatives nor derivatives in forward mode. The checks here raise for both, which
could be 0 otherwise. torch.compile cannot trace the checks: inside it, these derivatives are 0 without an error.
Depends only on torch and the argument checks.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from amapo_loss import _checks

FIRST_ONLY = "log-probs have first derivatives in reverse mode only: for others, use log_softmax and gather"

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def view_if_compiling(x: Tensor) -> Tensor:
    """Return x, or inside torch.compile a view of it.

    There, `requires_grad` of an argument of a function under `torch.func.grad` is False by mistake, and its gradient
    would be 0. That of a view is right.
    """
    return x.view_as(x) if torch.compiler.is_compiling() else x


def raise_in_forward_mode(*inputs: Tensor | None) -> None:
    """Raise if a derivative in forward mode is wanted, as under `torch.func.jvp`. Under torch.compile, do nothing."""
    if _checks.has_tangent(*inputs):
        raise NotImplementedError(FIRST_ONLY)


def once_differentiable(backward: Backward, message: str = FIRST_ONLY) -> Backward:
    """Wrap a backward such that the derivative of its gradients raises NotImplementedError.

    PyTorch's decorator of this name raises only where the gradient of the output requires a gradient. For the sum of
    the outputs it does not, and then the derivative with respect to the saved inputs would be 0.

    Args:
        backward: takes ctx, the saved tensors, and the gradients of the outputs. Tensors may be unpacked only once in a
            checkpoint, so the decorator unpacks them.
        message: that of the exception.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grad_outputs: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, saved, *grad_outputs)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        connected: Callable[..., Tensor] = _Gradient.apply
        return tuple(None if x is None else connected(x, message, *grad_outputs, *saved) for x in gradients)

    return wrapper


class _Gradient(torch.autograd.Function):
    """A gradient. Its backward, which raises, is reached from all that the gradient was computed from."""

    generate_vmap_rule = True  # for `torch.func.jacrev`, which batches backward

    @staticmethod
    def forward(gradient: Tensor, message: str, *_: Tensor | None) -> Tensor:
        return gradient.clone()  # and not a view, which could not be modified in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(ctx.message)


def with_anchor(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x, and an empty tensor in its graph that `once_differentiable` can save in its place.

    Both are outputs of one function. An empty part of x would give x a second gradient, which is None, and compiled
    autograd fails to add it.
    """
    apply: Callable[[Tensor], tuple[Tensor, Tensor]] = _WithAnchor.apply
    return apply(x)


class _WithAnchor(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Any:
        return x.view_as(x), x.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: None) -> Tensor | None:
        return gradient
