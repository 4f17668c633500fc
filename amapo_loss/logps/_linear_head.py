"""A language-model head without its logits: matrix products with the weight, tile by tile, and their gradients.

There are two algorithms, depending on which gradients are wanted. Their cost is counted in matrix products of the size
n x V x H, which are all tiles together.

- A *frozen* head (LoRA on the body, for example) processes tiles of some tokens and the whole vocabulary. Forward
  also computes the direction of the gradient with respect to the tile's hidden states, and backward only scales it.
  This costs 2 products.
- A *trainable* head processes tiles of all tokens and a block of the vocabulary, in forward and again in backward. Each
  block of the weight's gradient is then the product of a single tile, and is rounded once. This costs 4 products, or 3
  for the tiles that forward may cache. A frozen head whose weight has to be converted also takes this algorithm,
  because it converts one block of the weight at a time. That costs 3 products.

Without gradients, the cost is 1 product.

Products and sums of products are float32, or float64 for float64 inputs. If each tile's product were rounded to
bfloat16, the rounding errors would bias training, although the error of a single step is not larger. Each algorithm is
a PyTorch operator, which torch.compile does not look into, with an autograd function around it.

A vocabulary may be split over ranks. Each rank then has rows of the weight, and computes the tiles of its columns. A
frozen head merges the ranks' log-sum-exp tile by tile, before it computes the gradient of a tile. A trainable head
merges them once. The gradients of the hidden states are added up over the ranks before they are rounded. Every rank
must call the operators in the same order, as with any collective.

Depends on torch, the argument checks, `amapo_loss._autograd`, `amapo_loss.logps._online_lse` and
`amapo_loss.logps._vocab_parallel`.
"""

from functools import partial
from math import log
from typing import Any

import torch
from torch import Tensor

from amapo_loss._autograd import once_differentiable, raise_in_forward_mode, view_if_compiling, with_anchor
from amapo_loss._checks import accumulation_dtype, autocasts
from amapo_loss.logps import _online_lse
from amapo_loss.logps._online_lse import LogitTransform, OnlineLSE
from amapo_loss.logps._vocab_parallel import merge_ranks, sum_ranks, vocab_shard

# Forward multiplies tiles by this number before it rounds them to float16. Entries below 3e-8 would become 0 otherwise,
# and a large vocabulary has many of them. A loss scale cannot prevent that, because it comes with backward. The entries
# are below 3, and stay below the largest float16 number, 65504.
FLOAT16_SCALE = 2.0**14


def linear_logps(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
    transform: LogitTransform,
    group_name: str,
    keep_bytes: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs [n] and entropies [n] of `amapo_loss.linear_token_logps`, which has checked the arguments.

    Without `with_entropy`, the entropies are [0].
    """
    device, gemm_dtype = hidden.device.type, hidden.dtype
    if autocasts(device) and gemm_dtype != torch.float64:
        gemm_dtype = torch.get_autocast_dtype(device)
    hidden, weight = view_if_compiling(hidden), view_if_compiling(weight)
    # The kernels read adjacent numbers of the bias.
    bias = None if transform.bias is None else view_if_compiling(transform.bias).contiguous()
    raise_in_forward_mode(hidden, weight, bias)
    head = (hidden, weight, target_ids, bias)
    arguments = (*head, gemm_dtype, transform.scale, transform.softcap, group_name, with_entropy)
    # Decide here which gradients are wanted. Inside the forward of an autograd function, grad mode is always off, and
    # ctx.needs_input_grad ignores no_grad.
    trainable = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (trainable or hidden.requires_grad):
        entropy, target_logit, max_rest, sum_rest, *_ = _head_statistics(*arguments, 0)
        return _online_lse.token_logps(target_logit, max_rest, sum_rest), entropy
    # The weight is used as it is only if it has the dtype of the products, and this device multiplies in that dtype.
    needs_conversion = weight.dtype != gemm_dtype or _to_gemm_dtype(hidden[:0], gemm_dtype).dtype != gemm_dtype
    if trainable or needs_conversion:
        logps, entropy, *_ = _TrainableHead.apply(*arguments, keep_bytes)
    else:
        hidden, anchor = with_anchor(hidden)
        logps, entropy, *_ = _FrozenHead.apply(hidden, *arguments[1:], anchor)
    return logps, entropy


def gather_rows(
    tensor: Tensor,  # [N, H]
    index: Tensor,  # [n], without duplicates
) -> Tensor:
    """Return the rows [n, H] of a matrix at the index."""
    raise_in_forward_mode(tensor)
    rows: Tensor = _GatherRows.apply(tensor, index)
    return rows


# A frozen head.


@torch.library.custom_op("amapo_loss::frozen_head", mutates_args=())
def _frozen_head(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
    bias: Tensor | None,  # [V]
    gemm_dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    group_name: str,
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the log-probs [n], entropies [n] or [0], factors [n] and directions [n, H].

    The gradient of a log-prob with respect to its hidden state is factor * direction. The factor is proportional to
    1 - p_y. In float16, the product would underflow for tokens with p_y near 1, because the loss scale comes only with
    backward. The direction is a difference of rows of the weight, and about as large as they are.
    """
    shard = vocab_shard(len(weight), target_ids, group_name)
    _online_lse.check_target_ids(target_ids, shard.vocab_size)
    x, transform = _to_gemm_dtype(hidden, gemm_dtype), LogitTransform(bias, scale, softcap)
    acc_dtype = accumulation_dtype(x)
    block_n = _online_lse.block_length(len(hidden), shard.largest, hidden.device)
    state = OnlineLSE.start(shard.localize(target_ids), acc_dtype, with_entropy)
    direction = torch.empty_like(hidden)
    tile = _online_lse.empty_tile(x, (block_n, len(weight)), acc_dtype)
    rounding_scale = _rounding_scale(x.dtype)
    for block in _online_lse.blocks(len(x), block_n):
        block_state = state.select(block)
        z = _mm_out(tile[: block.stop - block.start], x[block], weight.t())
        z = _online_lse.transform_unless_triton(z, transform)
        _online_lse.update(block_state, z, 0, transform)
        merge_ranks(block_state, group_name)
        grad_z = _reinterpret_dtype(z, x.dtype)
        constant = torch.full_like(block_state.sum_rest, rounding_scale)
        coefficients = _online_lse.gradient_coefficients(constant, block_state, transform)
        _online_lse.write_gradient(grad_z, z, block_state, 0, transform, coefficients)
        # `sum_ranks` needs a contiguous tensor, and columns of a tile are not.
        free_columns = None if group_name else _free_columns(z, x.dtype, direction.shape[1])
        product = _mm_out(
            _buffer_for(direction[block], acc_dtype) if free_columns is None else free_columns, grad_z, weight
        )
        sum_ranks(product, group_name)
        torch.div(product, rounding_scale, out=direction[block])
        del product  # or it would stay in memory while the next one is computed
    logps, factor = _online_lse.token_logps(*state[1:4]), _online_lse.gradient_factor(state, transform)
    return logps, _online_lse.entropies(state), factor, direction


@_frozen_head.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with_entropy = arguments[-1]
    empty = partial(hidden.new_empty, dtype=accumulation_dtype(hidden))
    n = hidden.shape[0]
    return empty(n), empty(n if with_entropy else 0), empty(n), torch.empty_like(hidden)


class _FrozenHead(torch.autograd.Function):
    """Saves the factors and directions of the gradients, and neither the hidden states nor the weight.

    The last input is the anchor of the hidden states, which is saved in their place for `once_differentiable`.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return _frozen_head(*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output[2:], inputs[-1])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor | None, *_: None) -> Any:
        if grad_output is None:
            return (None,) * 10
        factor, direction, _anchor = saved
        # `mul_` rounds to the dtype of the hidden states without a float32 copy. It acts on a copy, because a second
        # backward pass through the same graph needs `direction` again. Under `torch.func.jacrev`,
        # `grad_output` is batched, and so is this new tensor of it, as an in-place product with it requires.
        grad_hidden = grad_output.new_empty(direction.shape, dtype=direction.dtype).copy_(direction)
        grad_hidden.mul_((factor * grad_output).unsqueeze(1))
        return grad_hidden, *(None,) * 9


# A trainable head.


@torch.library.custom_op("amapo_loss::head_statistics", mutates_args=())
def _head_statistics(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target_ids: Tensor,  # [n]
    bias: Tensor | None,  # [V]
    gemm_dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    group_name: str,
    with_entropy: bool,
    keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the entropies [n] or [0], and all that backward needs.

    These are target_logit, max_rest and sum_rest [n], the local target ids [n], cached tiles [k, n, block_v] and their
    offsets [k, n].

    The first k tiles are cached for backward, as exp(z_j - offset) times the derivative of the softcap, and times
    `_rounding_scale`.
    """
    shard = vocab_shard(len(weight), target_ids, group_name)
    _online_lse.check_target_ids(target_ids, shard.vocab_size)
    x, transform = _to_gemm_dtype(hidden, gemm_dtype), LogitTransform(bias, scale, softcap)
    acc_dtype = accumulation_dtype(x)
    block_v = _online_lse.block_length(len(weight), len(hidden), hidden.device)
    state = OnlineLSE.start(shard.localize(target_ids), acc_dtype, with_entropy)
    cached_tiles, cache_offsets = _allocate_cache(hidden, weight, gemm_dtype, keep_bytes)
    scales = torch.full_like(state.sum_rest, _rounding_scale(cached_tiles.dtype))
    tile = _online_lse.empty_tile(x, (len(x), block_v), acc_dtype)
    for k, block in enumerate(_online_lse.blocks(len(weight), block_v)):
        block_transform = transform.columns(block)
        z = _mm_out(tile[:, : block.stop - block.start], x, _to_gemm_dtype(weight[block], gemm_dtype).t())
        z = _online_lse.transform_unless_triton(z, block_transform)
        _online_lse.update(state, z, block.start, block_transform)
        if k < len(cached_tiles):
            # The offset is the running maximum, rounded down to a multiple of ln 2. With another tiling, a cached
            # value then differs by a power of two, so that its rounding does not depend on the tiling.
            cache_offsets[k] = state.max_rest - state.max_rest.remainder(log(2))
            tile_state = state._replace(max_rest=cache_offsets[k])
            cached_tile = cached_tiles[k, :, : z.shape[1]]
            coefficients = (-scales, torch.zeros_like(scales))
            _online_lse.write_gradient(cached_tile, z, tile_state, block.start, block_transform, coefficients)
    merge_ranks(state, group_name)
    local_ids, target_logit, max_rest, sum_rest, _ = state
    return _online_lse.entropies(state), target_logit, max_rest, sum_rest, local_ids, cached_tiles, cache_offsets


@_head_statistics.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    bias: Tensor | None,
    gemm_dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    group_name: str,
    with_entropy: bool,
    keep_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = partial(hidden.new_empty, dtype=accumulation_dtype(hidden))
    n = hidden.shape[0]
    cache = _allocate_cache(hidden, weight, gemm_dtype, keep_bytes)
    return empty(n if with_entropy else 0), empty(n), empty(n), empty(n), torch.empty_like(target_ids), *cache


@torch.library.custom_op("amapo_loss::head_gradients", mutates_args=())
def _head_gradients(
    grad_output: Tensor,  # [n]
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    gemm_dtype: torch.dtype,
    scale: float,
    softcap: float | None,
    group_name: str,
    target_logit: Tensor,  # [n]
    max_rest: Tensor,  # [n]
    sum_rest: Tensor,  # [n]
    local_ids: Tensor,  # [n]
    cached_tiles: Tensor,  # [k, n, block_v]
    cache_offsets: Tensor,  # [k, n]
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to `hidden`, `weight` and `bias`; empty where none is needed."""
    x, transform = _to_gemm_dtype(hidden, gemm_dtype), LogitTransform(bias, scale, softcap)
    acc_dtype = accumulation_dtype(x)
    block_v = _online_lse.block_length(len(weight), len(hidden), hidden.device)
    state = OnlineLSE(local_ids, target_logit, max_rest, sum_rest)
    factor = _online_lse.gradient_factor(state, transform) * grad_output
    a, b = _online_lse.gradient_coefficients(factor, state, transform)
    grad_hidden, grad_weight, grad_bias = _allocate_gradients(
        hidden, weight, bias, needs_hidden, needs_weight, needs_bias
    )
    grad_x = _buffer_for(grad_hidden, acc_dtype).zero_()
    tile = _online_lse.empty_tile(x, (len(x), block_v), acc_dtype)
    for k, block in enumerate(_online_lse.blocks(len(weight), block_v)):
        z, block_transform = tile[:, : block.stop - block.start], transform.columns(block)
        w, grad_z = _to_gemm_dtype(weight[block], gemm_dtype), _reinterpret_dtype(z, x.dtype)
        if k < len(cached_tiles):
            rescaled = (a * torch.exp(cache_offsets[k] - max_rest) / _rounding_scale(cached_tiles.dtype), b)
            cached_tile = cached_tiles[k, :, : z.shape[1]]
            _online_lse.write_gradient(
                grad_z, cached_tile, state, block.start, block_transform, rescaled, z_is_exp=True
            )
        else:
            z = _online_lse.transform_unless_triton(_mm_out(z, x, w.t()), block_transform)
            _online_lse.write_gradient(grad_z, z, state, block.start, block_transform, (a, b))
        if needs_hidden:
            _addmm_out(grad_x, grad_z, w)
        if needs_weight:
            grad_w = grad_weight[block]
            grad_w.copy_(_mm_out(_buffer_for(grad_w, acc_dtype), grad_z.t(), x))
        if needs_bias:
            grad_bias[block] = grad_z.sum(0, dtype=acc_dtype)
        del w  # or it would stay in memory while the next one is converted
    if needs_hidden:
        sum_ranks(grad_x, group_name)
    return grad_hidden.copy_(grad_x), grad_weight, grad_bias


@_head_gradients.register_fake
def _(
    grad_output: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_hidden, needs_weight, needs_bias = arguments[-3:]
    return _allocate_gradients(hidden, weight, bias, needs_hidden, needs_weight, needs_bias)


class _TrainableHead(torch.autograd.Function):
    """Saves the hidden states, three numbers per token, and the cached tiles."""

    @staticmethod
    def forward(*inputs: Any) -> Any:
        entropy, *saved = _head_statistics(*inputs)
        target_logit, max_rest, sum_rest, *_ = saved
        return _online_lse.token_logps(target_logit, max_rest, sum_rest), entropy, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        hidden, weight, _, bias, *options = inputs
        ctx.save_for_backward(hidden, weight, bias, *output[2:])
        ctx.options = options[:4]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor | None, *_: None) -> Any:
        if grad_output is None:
            return (None,) * 10
        hidden, weight, bias, *state = saved
        needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
        gradients = _head_gradients(grad_output, hidden, weight, bias, *ctx.options, *state, *needed)
        grad_hidden, grad_weight, grad_bias = (gradient if need else None for gradient, need in zip(gradients, needed))
        return grad_hidden, grad_weight, None, grad_bias, *(None,) * 6


def _allocate_cache(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    gemm_dtype: torch.dtype,
    keep_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Return memory for as many cached tiles [k, n, block_v] and offsets [k, n] as fit into `keep_bytes`."""
    n, vocab_size, acc_dtype = hidden.shape[0], weight.shape[0], accumulation_dtype(hidden)
    if keep_bytes == 0:  # torch.compile before torch 2.11 cannot partition a graph with the sizes below
        return hidden.new_empty((0, 0, 0), dtype=gemm_dtype), hidden.new_empty((0, 0), dtype=acc_dtype)
    block_v = _online_lse.block_length(vocab_size, n, hidden.device)
    tile_bytes = n * (block_v * gemm_dtype.itemsize + acc_dtype.itemsize)
    k = torch.sym_min(keep_bytes // torch.sym_max(tile_bytes, 1), -(-vocab_size // block_v))
    return _online_lse.empty_tile(hidden, (k, n, block_v), gemm_dtype), hidden.new_empty((k, n), dtype=acc_dtype)


def _allocate_gradients(
    hidden: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
        torch.empty_like(bias) if needs_bias and bias is not None else weight.new_empty(0),
    )


# Matrix products.


def _rounding_scale(dtype: torch.dtype) -> float:
    """Return the number by which forward multiplies a tile before it rounds it to this dtype."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def _to_gemm_dtype(tensor: Tensor, gemm_dtype: torch.dtype) -> Tensor:
    """Return the tensor rounded to `gemm_dtype`, the dtype of general matrix-matrix products (GEMM).

    Where Triton processes the tiles, the result has this dtype, and a product is accumulated and written in float32.
    Elsewhere a product of bfloat16 tensors would round its result to bfloat16, so the rounded values are converted back
    to float32.
    """
    tensor = tensor.to(gemm_dtype)
    return tensor if _online_lse.uses_triton(tensor) else tensor.to(accumulation_dtype(tensor))


def _buffer_for(out: Tensor, dtype: torch.dtype) -> Tensor:
    """Return contiguous memory of this dtype for a result that is copied to `out`: `out` itself, if it is like that."""
    return out if out.dtype == dtype and out.is_contiguous() else out.new_empty(out.shape, dtype=dtype)


def _mm_out(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write a @ b to `out`, accumulated in the dtype of `out`."""
    if a.shape[1] == 0:  # the rank has no row of a split vocabulary
        return out.zero_()
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm_out(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to `out`, accumulated in the dtype of `out`."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out)
    return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _reinterpret_dtype(
    z: Tensor,  # [n, v]
    dtype: torch.dtype,
) -> Tensor:
    """Return a view [n, v] of a tile's memory as `dtype`, whose elements are of the same size or smaller."""
    return z.view(dtype)[:, : z.shape[1]]


def _free_columns(
    z: Tensor,  # [n, v]
    dtype: torch.dtype,
    num_columns: int,
) -> Tensor | None:
    """Return columns of a tile that its view as `dtype` does not cover, or None if there are too few of them."""
    covered = -(-z.shape[1] * dtype.itemsize // z.itemsize)
    start = -(-covered // _online_lse.ROW_MULTIPLE) * _online_lse.ROW_MULTIPLE  # matrix units need aligned rows
    return z[:, start : start + num_columns] if start + num_columns <= z.shape[1] else None


# The tokens that count.


class _GatherRows(torch.autograd.Function):
    """`index_select` for an index without duplicates.

    Its backward copies each row once. The backward of `index_select` adds rows, since an index may repeat there.
    """

    @staticmethod
    def forward(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.num_rows = inputs[0].shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor) -> Any:
        (index,) = saved
        grad_tensor = grad_output.new_zeros((ctx.num_rows, *grad_output.shape[1:]))
        return grad_tensor.index_copy_(0, index, grad_output), None
