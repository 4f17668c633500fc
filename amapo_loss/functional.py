"""The losses. Each public function checks its arguments and hands them to a backend; read this file from top to bottom.

Depends on the rest of the package except the module, the trainer and the self-check, which depend on it.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from amapo_loss import _checks, _reference, kernels
from amapo_loss._checks import Backend, Reduction
from amapo_loss._moments import all_gather_row, merge_moments, moments
from amapo_loss._options import ConstantMargin, LossOptions
from amapo_loss._pairs import Pairs
from amapo_loss.diagnostics import Diagnostics
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics


class AMaPOOutput(NamedTuple):
    """A loss and what the batch looked like.

    Args:
        loss: 0-dim, or [B] with `reduction="none"`. Call `backward()` on it.
        diagnostics: scores, margins and gradient weights of the pairs, and a summary to log.

    """

    loss: Tensor
    diagnostics: Diagnostics


def amapo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 2.0,
    label_smoothing: float = 0.0,
    margin: AdaptiveMargin = AdaptiveMargin(),
    statistics: ScoreStatistics | Estimator | None = None,
    process_group: ProcessGroup | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> AMaPOOutput:
    r"""Return the AMaPO loss of a batch of preference pairs, and diagnostics.

    $$d_i = \frac{\log\pi(y_w) - \log\mathrm{ref}(y_w)}{|y_w|} - \frac{\log\pi(y_l) - \log\mathrm{ref}(y_l)}{|y_l|},
      \qquad r_i = \beta d_i$$
    $$L_i = (1 - \epsilon)\,\mathrm{softplus}(h_i - r_i) + \epsilon\,\mathrm{softplus}(r_i - h_i)$$

    Here $h_i$ is the adaptive margin (see `AdaptiveMargin`). It is made from the mean and the standard deviation of the
    batch's scores $r$, and no gradient flows through it. Without a reference, $r$ is SimPO's implicit reward. With a
    reference and summed log-probs, it is DPO's.

    Args:
        chosen_logps: [B] log-probs of the chosen responses, in nats. Pass the average over the response's tokens, as
            the paper does (`sequence_logps` returns it), or the sum together with `chosen_lengths`. Any floating dtype
            and any strides. bfloat16 and float16 are computed in float32, and the gradient has the input's dtype.
        rejected_logps: [B] log-probs of the rejected responses, likewise.
        ref_chosen_logps: [B] log-probs of the chosen responses under the reference model, summed or averaged like those
            of the policy. Pass both references or neither. Compute them without a graph: a gradient would flow into
            them, too.
        ref_rejected_logps: [B] log-probs of the rejected responses under the reference model.
        chosen_lengths: [B] number of tokens in each chosen response, integer or floating. If given, the log-probs are
            divided by them, so pass sums. A length of 0 counts as 1. Pass both lengths or neither.
        rejected_lengths: [B] number of tokens in each rejected response.
        beta: scale of the ranking score, above 0. The authors trained with 2.0 to 3.0 on averaged log-probs.
        label_smoothing: $\epsilon$ in [0, 0.5), the share of pairs that you believe to be labelled the wrong way round.
        margin: the margin formula and which of its parts to use.
        statistics: the mean and the standard deviation to make the margins from, in score units, in place of this
            batch's own. With the statistics of a whole optimizer batch, the gradients of its micro-batches add up to
            exactly its gradient. A callable estimates them from this batch's scores: a `ScoreWindow`, or a function of
            yours, see `Estimator`.
        process_group: the data-parallel group. The statistics are then taken over the pairs of all its ranks. This adds
            one all-gather of three float64 numbers per rank; without a group there is no communication.
        reduction: `"mean"` over the B pairs (0 if there are none), `"sum"`, or `"none"` for the [B] losses. With a
            process group, `"mean"` is the mean over the pairs of all ranks. It is scaled for DDP and FSDP, which
            average gradients over the ranks: the average over the ranks is exactly the loss, and the gradient, of one
            process with all pairs, even if the ranks have different numbers of pairs. `"sum"` and `"none"` are of this
            rank's pairs.
        backend: `"torch"`, or `"triton"`, which computes the loss, its gradient and the summary with one kernel launch
            on a GPU, in float32. `"auto"` takes Triton for log-probs on a GPU unless they are float64, and torch for
            everything else. Only torch has second derivatives.

    Returns:
        `AMaPOOutput(loss, diagnostics)`. The loss is float32, or float64 if a log-prob is float64. If a log-prob is NaN
        or infinite, the loss is NaN, and `diagnostics.summary()["amapo/nonfinite"]` counts the pair. A batch of one
        pair has no standard deviation, so its margin is 0. Nothing synchronizes with the device.

    Raises:
        TypeError: if a log-prob is not a floating tensor, a length not an integer or floating tensor, `beta` or
            `label_smoothing` not a number, or `margin`, `statistics` or `process_group` of another type.
        ValueError: if tensors are not 1-D, differ in shape or device, or come without their counterpart; if `beta` or
            `label_smoothing` is out of range; if `reduction` or `backend` is unknown; if `backend="triton"` gets
            float64 log-probs or log-probs that are not on a GPU.
        RuntimeError: if `backend="triton"` cannot run here, with the reason; in the backward pass, for a second
            derivative of a loss from Triton; if another rank of `process_group` does not take part.

    Example:
        >>> import torch
        >>> chosen_logps = torch.tensor([-1.0, -1.2, -0.9], requires_grad=True)
        >>> rejected_logps = torch.tensor([-1.4, -1.1, -1.6], requires_grad=True)
        >>> loss, diagnostics = amapo_loss(chosen_logps, rejected_logps, beta=2.0)
        >>> loss.backward()
        >>> diagnostics.margins  # only the second pair is below the mean; it is misranked
        tensor([0.0000, 4.0876, 0.0000])
        >>> chosen_logps.grad  # the misranked pair has the largest gradient
        tensor([-0.2067, -0.6576, -0.1319])

    Source: arXiv 2511.09385, section 4. With `AdaptiveMargin(formula="released")`, the authors' published trainer.
    """
    options = LossOptions(
        beta, label_smoothing, margin, reduction, statistics, process_group=process_group, backend=backend
    ).checked()
    pairs = Pairs(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    ).checked()
    if isinstance(statistics, ScoreStatistics):
        options = options._replace(statistics=_checked_statistics(statistics, chosen_logps.device))
    return _triton_loss(pairs, options) if _uses_triton(pairs, options) else _torch_loss(pairs, options)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> AMaPOOutput:
    r"""Return the DPO loss, which is `amapo_loss` with the margin $h_i = 0$.

    The arguments mean what they mean in `amapo_loss`. The result and the exceptions are also the same.

    Args:
        chosen_logps: [B] log-probs of the chosen responses, in nats. DPO uses sums over the response's tokens.
        rejected_logps: [B] log-probs of the rejected responses.
        ref_chosen_logps: [B] log-probs of the chosen responses under the reference model. They are required here.
        ref_rejected_logps: [B] log-probs of the rejected responses under the reference model.
        chosen_lengths: [B] number of tokens in each chosen response; if given, the log-probs are divided by them.
        rejected_lengths: [B] number of tokens in each rejected response.
        beta: scale of the ranking score, above 0. The usual 0.1 is meant for summed log-probs.
        label_smoothing: $\epsilon$ in [0, 0.5).
        reduction: `"mean"`, `"sum"`, or `"none"` for the [B] losses.

    Returns:
        `AMaPOOutput(loss, diagnostics)`.

    Raises:
        TypeError, ValueError: as `amapo_loss` does.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-12.0, -20.0])
        >>> dpo_loss(logps, logps - 3, logps, logps, beta=0.1).loss
        tensor(0.5544)

    Source: arXiv 2305.18290, equation 7; label smoothing as in conservative DPO.
    """
    options = LossOptions(beta, label_smoothing, ConstantMargin(0.0), reduction).checked()
    _checks.floating_tensor("ref_chosen_logps", ref_chosen_logps)  # `Pairs` would accept None for both references
    pairs = Pairs(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    ).checked()
    return _torch_loss(pairs, options)


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> AMaPOOutput:
    r"""Return the SimPO loss, which is `amapo_loss` without a reference and with the margin $h_i = \gamma$.

    All arguments except `gamma` mean what they mean in `amapo_loss`. The result and the exceptions are also the same.

    Args:
        chosen_logps: [B] log-probs of the chosen responses, in nats. SimPO uses averages over the response's tokens.
        rejected_logps: [B] log-probs of the rejected responses.
        chosen_lengths: [B] number of tokens in each chosen response; if given, the log-probs are divided by them.
        rejected_lengths: [B] number of tokens in each rejected response.
        beta: scale of the ranking score, above 0.
        gamma: the margin in score units, finite. SimPO's "gamma/beta ratio" is `gamma / beta`.
        label_smoothing: $\epsilon$ in [0, 0.5).
        reduction: `"mean"`, `"sum"`, or `"none"` for the [B] losses.

    Returns:
        `AMaPOOutput(loss, diagnostics)`.

    Raises:
        TypeError, ValueError: as `amapo_loss` does.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-1.2, -2.0])
        >>> simpo_loss(logps, logps - 0.25, beta=2.0, gamma=0.5).loss
        tensor(0.6931)

    Source: arXiv 2405.14734, equation 6.
    """
    options = LossOptions(beta, label_smoothing, ConstantMargin(gamma), reduction).checked()
    _checks.number("gamma", gamma)
    pairs = Pairs(
        chosen_logps, rejected_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    ).checked()
    return _torch_loss(pairs, options)


def _uses_triton(pairs: Pairs, options: LossOptions) -> bool:
    """Return whether the kernel computes these pairs; raise if it was asked for and cannot."""
    backend, device = options.backend, pairs.chosen_logps.device
    if backend == "torch" or (backend == "auto" and not (device.type == "cuda" and kernels.HAS_TRITON)):
        return False
    needs_float64 = _checks.accumulation_dtype(*pairs[:4]) == torch.float64
    if backend == "triton" and needs_float64:
        raise ValueError("backend='triton' computes in float32, got float64 log-probs: use backend='torch' or 'auto'")
    if backend == "triton" and device.type != ("cpu" if kernels.interpreted() else "cuda"):
        raise ValueError(f"backend='triton' runs on a GPU, got chosen_logps on {device}: use backend='torch' or 'auto'")
    return not needs_float64


def _triton_loss(pairs: Pairs, options: LossOptions) -> AMaPOOutput:
    """Compute the loss with the fused kernel, which takes the statistics itself unless they are supplied."""
    from amapo_loss.kernels import pair_loss  # importing Triton takes a second, and it may not be installed

    rank_moments = supplied = None
    if options.process_group is not None:
        rank_moments = all_gather_row(pair_loss.moments(pairs, options.beta), options.process_group)
    if options.statistics is not None:
        _, (scores, *_) = _reference.log_ratio_differences(pairs.to_accumulation_dtype().detached(), options.beta)
        supplied = _supplied_statistics(scores, options)
    output = pair_loss.pair_loss(pairs, options, supplied, rank_moments)
    diagnostics = Diagnostics(
        pairs.detached(),
        output.margins,
        ScoreStatistics(output.mean, output.std, output.num_pairs) if supplied is None else supplied,
        options.beta,
        options.label_smoothing,
        summary_values=output.summary_values,
    )
    return AMaPOOutput(output.loss, diagnostics)


def _torch_loss(pairs: Pairs, options: LossOptions) -> AMaPOOutput:
    """Compute the loss with the reference mathematics."""
    pairs = pairs.to_accumulation_dtype()
    d, rewards = _reference.log_ratio_differences(pairs, options.beta)
    r = rewards[0]
    rank_moments = None
    if options.process_group is not None:
        rank_moments = all_gather_row(moments(r), options.process_group)

    if options.statistics is not None:
        statistics = _supplied_statistics(r, options)
        mu = statistics.mean + (0 * r).sum()  # NaN if a score is NaN, as the batch's own mean would be
    else:
        statistics = ScoreStatistics.of(r) if rank_moments is None else ScoreStatistics(*merge_moments(rank_moments))
        mu = statistics.mean

    if isinstance(options.margin, ConstantMargin):
        h = options.margin.value + 0 * r  # NaN for a pair whose score is not finite, so that its loss is NaN
    else:
        scale = _reference.input_scale(pairs, rewards, options.beta)
        h = _reference.adaptive_margins(r, mu, statistics.std, scale, options.beta, options.margin)

    losses = _reference.pair_losses(d, h, options.beta, options.label_smoothing)
    loss = _reduce(losses, options.reduction, rank_moments)
    diagnostics = Diagnostics(pairs.detached(), h, statistics, options.beta, options.label_smoothing, rewards)
    return AMaPOOutput(loss, diagnostics)


def _supplied_statistics(
    scores: Tensor,  # [B]
    options: LossOptions,
) -> ScoreStatistics:
    """Return the statistics that the caller supplied, or those that the caller's estimator makes of the scores."""
    if isinstance(options.statistics, ScoreStatistics):
        return options.statistics
    assert options.statistics is not None
    return _checked_statistics(options.statistics(scores, options.process_group), scores.device)


def _checked_statistics(statistics: ScoreStatistics, device: torch.device) -> ScoreStatistics:
    """Return the statistics detached, or raise if they are not 0-dim floating tensors on the device."""
    if not isinstance(statistics, ScoreStatistics):
        raise TypeError(f"the estimator in statistics must return ScoreStatistics, got {type(statistics).__name__}")
    _checks.scalar_tensor("statistics.mean", statistics.mean, device)
    _checks.scalar_tensor("statistics.std", statistics.std, device)
    return ScoreStatistics(statistics.mean.detach(), statistics.std.detach(), statistics.count)


def _reduce(
    losses: Tensor,  # [B]
    reduction: Reduction,
    rank_moments: Tensor | None,  # [ranks, 3]
) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "mean" and rank_moments is not None:
        # DDP and FSDP divide the sum of the ranks' gradients by the number of ranks, so multiply by it here.
        ranks, pairs_of_all_ranks = len(rank_moments), rank_moments[:, 0].sum()
        return losses.sum() * (ranks / pairs_of_all_ranks.clamp(min=1)).to(losses.dtype)
    if reduction == "sum" or len(losses) == 0:  # the sum of no losses is 0 and backpropagates, their mean is NaN
        return losses.sum()
    return losses.mean()
