"""A language model's head without its logits: products with its weight, tile by tile, and their gradients.

Two ways, by what a gradient is wanted for. A *frozen* head (LoRA and the like) takes blocks of tokens by the whole
vocabulary: forward makes a block's gradient, too, and backward only scales it: 2 matrix products in all. A *trainable*
one takes all tokens by blocks of the vocabulary, in forward and again in backward, so that a block of the weight's
gradient is one product, rounded once: 4 products, 3 for tiles that forward may keep. So does a frozen one whose weight
has to be converted first, a block of it at a time: 3. Without a gradient it is 1.

Products, and sums of products, are float32 at least: rounded to bfloat16 tile by tile they bias training, though the
error of one step looks the same. Each way is an operator, opaque to torch.compile, with an autograd function around it.
Knows tensors and `amapo_loss.logps._online_lse`.
"""

from math import log
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amapo_loss._checks import computing_dtype
from amapo_loss.logps import _online_lse
from amapo_loss.logps._online_lse import Finish, Rows


def linear_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
    keep_bytes: int,
) -> Tensor:  # fmt: skip
    """The log-probs [n] of `amapo_loss.logps.linear_token_logps`, whose arguments are checked."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    arguments = (hidden, weight, targets, bias, dtype, scale, softcap)
    # Inside a forward of autograd, grad mode is always off; and what needs_input_grad says there ignores no_grad.
    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (trainable or hidden.requires_grad):
        target, others, *_ = _statistics(*arguments, 0)
        return _online_lse.token_logps(target, others)
    frozen = not trainable and weight.dtype == dtype == _factor(hidden[:0], dtype).dtype
    logps: Tensor = (_Frozen.apply(*arguments) if frozen else _Trainable.apply(*arguments, keep_bytes))[0]
    return logps


def taken(tensor: Tensor, at: Tensor) -> Tensor:
    """Rows of a matrix, none of them twice."""
    rows: Tensor = _Taken.apply(tensor, at)
    return rows


# --------------------------------------------------------------------------------------------------- a frozen head


@torch.library.custom_op("amapo_loss::frozen_head", mutates_args=())
def _frozen(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probs [n], and the gradient of each in its hidden state [n, H]."""
    _online_lse.require_within(targets, len(weight))
    x, size = _factor(hidden, dtype), _online_lse.size(len(hidden), len(weight), hidden.device)
    rows, wide, finish = Rows.of(targets, computing_dtype(x)), computing_dtype(x), Finish(bias, scale, softcap)
    gradients = torch.empty_like(hidden)
    tile = x.new_empty((size, len(weight)), dtype=wide)
    for some in _online_lse.slices(len(x), size):
        z, part = tile[: some.stop - some.start], rows.part(some)
        z = _online_lse.finished(_multiply(z, x[some], weight.t()), finish)
        _online_lse.add(part, z, 0, finish)
        of_z = _narrow(z, x.dtype)
        _online_lse.gradient(of_z, z, part, 0, finish, *_online_lse.coefficients(1.0, part, finish))
        gradients[some] = _multiply(x.new_empty(x[some].shape, dtype=wide), of_z, weight)
    return _online_lse.token_logps(rows.target, rows.others), gradients


@_frozen.register_fake
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape[0], dtype=computing_dtype(hidden)), torch.empty_like(hidden)


class _Frozen(torch.autograd.Function):
    """Saves gradients in place of hidden states and weight."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype,
        scale: float, softcap: float | None,
    ) -> Any:  # fmt: skip
        return _frozen(hidden, weight, targets, bias, dtype, scale, softcap)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> Any:
        if upstream is None:
            return (None,) * 7
        (gradients,) = ctx.saved_tensors  # not scaled in place: backward may come again
        return torch.mul(gradients, upstream.unsqueeze(1), out=torch.empty_like(gradients)), *(None,) * 6


# ------------------------------------------------------------------------------------------------ a trainable head


@torch.library.custom_op("amapo_loss::head_statistics", mutates_args=())
def _statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype,
    scale: float, softcap: float | None, keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Target and others of the rows [n]; the shares in the first k tiles [k, n, words], of the others then [k, n]."""
    _online_lse.require_within(targets, len(weight))
    x, words = _factor(hidden, dtype), _online_lse.size(len(weight), len(hidden), hidden.device)
    rows, wide = Rows.of(targets, computing_dtype(x)), computing_dtype(x)
    kept, others = _kept(hidden, weight, dtype, keep_bytes)
    one, zero = torch.ones_like(rows.others), torch.zeros_like(rows.others)
    tile = x.new_empty((len(x), words), dtype=wide)
    for k, block in enumerate(_online_lse.slices(len(weight), words)):
        z, finish = tile[:, : block.stop - block.start], _finish(bias, scale, softcap, block)
        z = _online_lse.finished(_multiply(z, x, _factor(weight[block], dtype).t()), finish)
        _online_lse.add(rows, z, block.start, finish)
        if k < len(kept):
            # Whatever the others are so far, to the same digits: they differ by powers of 2.
            others[k] = rows.others - rows.others.remainder(log(2))
            seen = rows._replace(others=others[k])
            _online_lse.gradient(kept[k, :, : z.shape[1]], z, seen, block.start, finish, -one, zero)
    return rows.target, rows.others, kept, others


@_statistics.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype,
    scale: float, softcap: float | None, keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    target, others = (hidden.new_empty(hidden.shape[0], dtype=computing_dtype(hidden)) for _ in range(2))
    return target, others, *_kept(hidden, weight, dtype, keep_bytes)


@torch.library.custom_op("amapo_loss::head_gradients", mutates_args=())
def _gradients(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype,
    scale: float, softcap: float | None, target: Tensor, others: Tensor, kept: Tensor, kept_others: Tensor,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """In `hidden`, `weight` and `bias`; empty for what needs none."""
    x, words = _factor(hidden, dtype), _online_lse.size(len(weight), len(hidden), hidden.device)
    rows, wide = Rows(targets, target, others), computing_dtype(x)
    of_others, of_target = _online_lse.coefficients(upstream, rows, Finish(bias, scale, softcap))
    of_hidden, of_weight, of_bias = _outputs(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)
    of_x = x.new_zeros(of_hidden.shape, dtype=wide)
    tile = x.new_empty((len(x), words), dtype=wide)
    for k, block in enumerate(_online_lse.slices(len(weight), words)):
        z, finish = tile[:, : block.stop - block.start], _finish(bias, scale, softcap, block)
        w, of_z = _factor(weight[block], dtype), _narrow(z, x.dtype)
        if k < len(kept):
            since = of_others * torch.exp(kept_others[k] - others)
            _online_lse.gradient(
                of_z, kept[k, :, : z.shape[1]], rows, block.start, finish, since, of_target, shares=True
            )
        else:
            z = _online_lse.finished(_multiply(z, x, w.t()), finish)
            _online_lse.gradient(of_z, z, rows, block.start, finish, of_others, of_target)
        if needs_hidden:
            _add_product(of_x, of_z, w)
        if needs_weight:
            of_weight[block] = _multiply(x.new_empty(w.shape, dtype=wide), of_z.t(), x)
        if needs_bias:
            of_bias[block] = of_z.sum(0, dtype=wide)
    return of_hidden.copy_(of_x), of_weight, of_bias


@_gradients.register_fake
def _(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, bias, *arguments[-3:])


class _Trainable(torch.autograd.Function):
    """Saves the hidden states, and what forward may keep."""

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dtype: torch.dtype,
        scale: float, softcap: float | None, keep_bytes: int,
    ) -> Any:  # fmt: skip
        target, others, *kept = _statistics(hidden, weight, targets, bias, dtype, scale, softcap, keep_bytes)
        return _online_lse.token_logps(target, others), target, others, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.options = inputs[4:7]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> Any:
        if upstream is None:
            return (None,) * 8
        hidden, weight, targets, bias, *statistics = ctx.saved_tensors
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        gradients = _gradients(upstream, hidden, weight, targets, bias, *ctx.options, *statistics, *needed)
        of_hidden, of_weight, of_bias = (gradient if need else None for gradient, need in zip(gradients, needed))
        return of_hidden, of_weight, None, of_bias, *(None,) * 4


def _kept(hidden: Tensor, weight: Tensor, dtype: torch.dtype, keep_bytes: int) -> tuple[Tensor, Tensor]:
    """Room for as many tiles [k, n, words], and their rows' others [k, n], as fit into so many bytes."""
    n, vocabulary, wide = hidden.shape[0], weight.shape[0], computing_dtype(hidden)
    words = _online_lse.size(vocabulary, n, hidden.device)
    bytes_of_one = n * (words * dtype.itemsize + wide.itemsize)
    k = _online_lse.least(keep_bytes // _online_lse.most(bytes_of_one, 1), -(-vocabulary // words))
    return hidden.new_empty((k, n, words), dtype=dtype), hidden.new_empty((k, n), dtype=wide)


def _outputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        torch.empty_like(bias) if needs_bias and bias is not None else weight.new_empty(0),
    )


# -------------------------------------------------------------------------------------------------------- products


def _finish(bias: Tensor | None, scale: float, softcap: float | None, block: slice) -> Finish:
    return Finish(None if bias is None else bias[block], scale, softcap)


def _factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`. A GPU adds up products of such in float32; elsewhere they have to be float32 themselves."""
    tensor = tensor.to(dtype)
    return tensor if _online_lse.in_triton(tensor) else tensor.to(computing_dtype(tensor))


def _multiply(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The product into `out`, in its precision."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The product onto `out`, in its precision."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _narrow(z: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory of a tile, for as many elements of `dtype`."""
    return z.view(dtype)[:, : z.shape[1]]


# ------------------------------------------------------------------------------------------ the tokens that count


class _Taken(torch.autograd.Function):
    """`index_select`, whose own gradient would be copied once more, for rows that are taken once."""

    @staticmethod
    def forward(tensor: Tensor, at: Tensor) -> Tensor:
        return tensor.index_select(0, at)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.rows = inputs[0].shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (at,) = ctx.saved_tensors
        return upstream.new_zeros((ctx.rows, *upstream.shape[1:])).index_copy_(0, at, upstream), None
