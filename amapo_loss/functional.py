"""The losses. Each public function checks its arguments and passes them to a backend. Read this file from the top.

Depends on torch, and on the checks, the options, the pairs, the statistics, the diagnostics and the two backends.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from amapo_loss import _checks, _reference, kernels
from amapo_loss._checks import Backend, Reduction
from amapo_loss._collectives import all_gather_row
from amapo_loss._moments import mean_std_count, merge_moments, weighted_moments
from amapo_loss._options import LossOptions, Margin
from amapo_loss._pairs import Pairs
from amapo_loss.diagnostics import Diagnostics
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics


class AMaPOOutput(NamedTuple):
    """A loss and its diagnostics.

    Attributes:
        loss: 0-dim, or [B] with `reduction="none"`.
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
    weights: Tensor | None = None,
    beta: float | Tensor = 2.0,
    label_smoothing: float = 0.0,
    margin: Margin = AdaptiveMargin(),
    statistics: ScoreStatistics | Estimator | None = None,
    process_group: ProcessGroup | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> AMaPOOutput:
    r"""Return the AMaPO loss of a batch of preference pairs, or another loss of the same form, and diagnostics.

    $$d_i = \frac{\log\pi(y_w) - \log\mathrm{ref}(y_w)}{|y_w|} - \frac{\log\pi(y_l) - \log\mathrm{ref}(y_l)}{|y_l|},
      \qquad r_i = \beta d_i$$
    $$L_i = (1 - \epsilon)\,\mathrm{softplus}(h_i - r_i) + \epsilon\,\mathrm{softplus}(r_i - h_i)$$

    The reference terms are 0 if no reference is given, and the lengths $|y|$ are 1 if no lengths are given. Averages
    without a reference make $r$ the score of SimPO, and sums with a reference make it the score of DPO.

    $h_i$ is the margin. By default it is adaptive: it is made from the mean and the standard deviation of the batch's
    scores, see `AdaptiveMargin`. Another `margin` gives another loss, such as 0 for DPO. No gradient flows through it.

    The reduced loss is $\sum_i a_i L_i$, divided by $\sum_i a_i$ for a mean. The weights $a_i$ are 1 unless given.

    Args:
        chosen_logps: [B] log-probs of the chosen responses, in nats: averages over the tokens of a response, as in the
            paper, or sums. `sequence_logps` returns either. Any floating dtype and any strides are accepted. bfloat16
            and float16 are converted to float32, and the gradient has the dtype of the input.
        rejected_logps: [B] log-probs of the rejected responses.
        ref_chosen_logps: [B] log-probs of the chosen responses under the reference model, sums if the policy's are
            sums. Pass both references or neither. Compute them under `no_grad`, or gradients reach the reference model.
        ref_rejected_logps: [B] log-probs of the rejected responses under the reference model.
        chosen_lengths: [B] number of tokens in each chosen response, integer or floating. Pass both lengths if the
            log-probs are sums and you want averages, else neither. A length of 0 leaves the pair out, as a weight of
            False does.
        rejected_lengths: [B] number of tokens in each rejected response.
        weights: [B] bool, integer or floating, the importance $a_i$ of each pair, at least 0. 0 or False leaves a pair
            out of the loss, the statistics and the diagnostics, whatever its log-probs are, and its gradient is 0.
            `diagnostics.summary()["amapo/left_out"]` counts these pairs. Weights above 0 have no effect on the
            statistics, and so none on adaptive margins. No gradient flows through the weights. A weight below 0 makes
            the loss NaN.
        beta: scale of the ranking score, above 0. The authors trained with 2.0 to 3.0 on averaged log-probs. For a beta
            that is computed during training, pass a 0-dim floating tensor on the device of the log-probs. No gradient
            flows through it. Its value is not read on the host: if it is not above 0 and finite, the loss is NaN.
        label_smoothing: $\epsilon$ in [0, 0.5), the expected share of pairs whose labels are swapped.
        margin: $h_i$ in score units. An `AdaptiveMargin` is computed from the statistics. A number is the margin of
            every pair. A tensor [B], integer or floating, has a margin for each pair, for example from a column of the
            data. A function `(scores, statistics) -> margins [B]` is called under `no_grad` with the scores [B] and the
            `ScoreStatistics` that an adaptive margin would be made from. Pairs that are left out have the score NaN.
        statistics: what the margins are made from, in place of the mean and the standard deviation of this batch.
            `ScoreStatistics` are taken as they are; they are in score units, so beta is included. A `ScoreWindow` or
            any other `Estimator` is called with the scores of this batch and `process_group`. If you pass the
            statistics of a whole optimizer batch, the sums of the losses (`reduction="sum"`) of its micro-batches have
            the gradient of the sum over the whole batch. Only what counts as a rounding error is judged by the scores
            of the micro-batch.
        process_group: the data-parallel group, to take the statistics over the pairs of all its ranks. This adds one
            all-gather of six float64 numbers per rank, if the statistics or the mean need it. None, also under DDP,
            means that there is no communication and each rank takes its own pairs.
        reduction: `"mean"` over the pairs (0 if there are none), `"sum"`, or `"none"` for the [B] losses $a_i L_i$.
            With a process group, `"mean"` returns the sum of this rank's $a_i L_i$ times (number of ranks) / (sum of
            the weights of all ranks). DDP and FSDP average the gradients of the ranks, which then gives the gradient of
            the mean over all pairs, even if the ranks have different numbers of pairs. `"sum"` and `"none"` cover this
            rank's pairs only.
        backend: `"torch"` is plain PyTorch. `"triton"` computes the loss, its gradient and the summary in float32 with
            one kernel launch on a GPU, two beyond 4,096 pairs, and one more with a process group. A tensor `beta` adds
            a few small ones, for its check. The scores that an estimator or a margin function gets are computed in
            PyTorch. `"auto"` takes Triton for log-probs on an NVIDIA GPU that are not float64, if Triton 3.4 or newer
            is installed and starts, and torch for everything else. Only torch has second derivatives.

    Returns:
        `AMaPOOutput(loss, diagnostics)`. The loss is float32, or float64 if a log-prob is float64. If a log-prob is NaN
        or infinite, the loss is NaN, and `diagnostics.summary()["amapo/nonfinite"]` counts the pair. If the statistics
        are taken over a single pair, the adaptive margin has no standard deviation to work with, and all margins are
        0 (or `floor`). There is no host-device synchronization.

    Raises:
        TypeError: if a log-prob is not a floating tensor; if a length is not an integer or floating tensor; if
            `weights` is not a bool, integer or floating tensor; if `beta` is neither a number nor a floating tensor; if
            `label_smoothing` is not a number; if `margin`, `statistics` or `process_group` has a wrong type.
        ValueError: if tensors [B] are not 1-D or differ in shape or device; if only one of the two references or
            lengths is given; if `beta`, `label_smoothing` or a `margin` that is a number is out of range; if
            `reduction` or `backend` is unknown; if `backend="triton"` gets float64 log-probs or log-probs that are not
            on a GPU.
        RuntimeError: if `backend="triton"` cannot run here; the message has the reason. If another rank of
            `process_group` does not take part; NCCL's watchdog ends the process instead. In the backward pass, for a
            second derivative of a loss from Triton. Inside `torch.compile`, that is 0 instead.

    Example:
        >>> import torch
        >>> chosen_logps = torch.tensor([-1.0, -1.2, -0.9], requires_grad=True)
        >>> rejected_logps = torch.tensor([-1.4, -1.1, -1.6], requires_grad=True)
        >>> loss, diagnostics = amapo_loss(chosen_logps, rejected_logps, beta=2.0)
        >>> loss.backward()
        >>> diagnostics.margins  # only the second pair has a score below the mean
        tensor([0.0000, 4.0876, 0.0000])
        >>> chosen_logps.grad  # it has the largest gradient
        tensor([-0.2067, -0.6576, -0.1319])
        >>> amapo_loss(chosen_logps, rejected_logps, beta=2.0, margin=0.5).diagnostics.margins  # SimPO
        tensor([0.5000, 0.5000, 0.5000])

    Source: arXiv 2511.09385, section 4. The formula "released" is from the trainer that its authors published.
    """
    options = LossOptions(beta, label_smoothing, margin, statistics, process_group, reduction, backend).checked()
    pairs = Pairs(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, weights
    ).checked()
    options = _with_checked_tensors(options, pairs)
    return _triton_loss(pairs, options) if _uses_triton(pairs, options) else _torch_loss(pairs, options)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float | Tensor = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> AMaPOOutput:
    r"""Return the DPO loss, which is `amapo_loss` with `margin=0.0` and a reference.

    Args:
        chosen_logps: [B] log-probs of the chosen responses, in nats. DPO uses sums over the response's tokens.
        rejected_logps: [B] log-probs of the rejected responses.
        ref_chosen_logps: [B] log-probs of the chosen responses under the reference model. Both references are required.
        ref_rejected_logps: [B] log-probs of the rejected responses under the reference model.
        chosen_lengths: [B] number of tokens in each chosen response; if given, the log-probs are divided by them. A
            length of 0 leaves the pair out.
        rejected_lengths: [B] number of tokens in each rejected response.
        weights: [B] importance of each pair, as in `amapo_loss`. 0 or False leaves a pair out.
        beta: scale of the ranking score, above 0, or a 0-dim tensor. The usual 0.1 is meant for summed log-probs.
        label_smoothing: $\epsilon$ in [0, 0.5).
        reduction: `"mean"`, `"sum"`, or `"none"` for the [B] losses.

    Returns:
        `AMaPOOutput(loss, diagnostics)` as `amapo_loss` returns it with `backend="auto"`. The statistics in the
        diagnostics are those of the batch, and have no effect on the loss.

    Raises:
        TypeError, ValueError: as `amapo_loss` does.

    Example:
        >>> import torch
        >>> chosen_logps, rejected_logps = torch.tensor([-12.0, -20.0]), torch.tensor([-15.0, -23.0])
        >>> ref_chosen_logps, ref_rejected_logps = torch.tensor([-12.0, -20.0]), torch.tensor([-12.0, -20.0])
        >>> dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1).loss
        tensor(0.5544)

    Source: arXiv 2305.18290, equation 7; label smoothing as in conservative DPO.
    """
    _checks.floating_tensor("ref_chosen_logps", ref_chosen_logps)  # `amapo_loss` would accept None for both references
    return amapo_loss(
        chosen_logps,
        rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=0.0,
        reduction=reduction,
    )


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    beta: float | Tensor = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> AMaPOOutput:
    r"""Return the SimPO loss, which is `amapo_loss` without a reference and with `margin=gamma`.

    Args:
        chosen_logps: [B] log-probs of the chosen responses, in nats. SimPO uses averages over the response's tokens.
        rejected_logps: [B] log-probs of the rejected responses.
        chosen_lengths: [B] number of tokens in each chosen response; if given, the log-probs are divided by them. A
            length of 0 leaves the pair out.
        rejected_lengths: [B] number of tokens in each rejected response.
        weights: [B] importance of each pair, as in `amapo_loss`. 0 or False leaves a pair out.
        beta: scale of the ranking score, above 0, or a 0-dim tensor.
        gamma: the margin in score units, finite. For SimPO's option `gamma_beta_ratio`, pass `beta` times that ratio.
        label_smoothing: $\epsilon$ in [0, 0.5).
        reduction: `"mean"`, `"sum"`, or `"none"` for the [B] losses.

    Returns:
        `AMaPOOutput(loss, diagnostics)` as `amapo_loss` returns it with `backend="auto"`. The statistics in the
        diagnostics are those of the batch, and have no effect on the loss.

    Raises:
        TypeError, ValueError: as `amapo_loss` does.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-1.2, -2.0])
        >>> simpo_loss(logps, logps - 0.25, beta=2.0, gamma=0.5).loss
        tensor(0.6931)

    Source: arXiv 2405.14734, equation 6.
    """
    _checks.number("gamma", gamma)
    return amapo_loss(
        chosen_logps,
        rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
        beta=beta,
        label_smoothing=label_smoothing,
        margin=gamma,
        reduction=reduction,
    )


def _with_checked_tensors(options: LossOptions, pairs: Pairs) -> LossOptions:
    """Return the options with their tensors detached, or raise if one of them does not fit the pairs."""
    beta, margin, statistics = options.beta, options.margin, options.statistics
    device = pairs.chosen_logps.device
    if isinstance(beta, Tensor):
        beta = _checks.scalar_tensor("beta", beta, device).detach().to(pairs.accumulation_dtype())
        # NaN makes the loss NaN. An error would need the value on the host, and so a wait for the device.
        beta = torch.where((beta > 0) & (beta < torch.inf), beta, torch.nan)
    if isinstance(margin, Tensor):
        margin = _checked_margins("margin", margin, pairs)
    if isinstance(statistics, ScoreStatistics):
        statistics = _checked_statistics(statistics, device)
    return options.replaced(beta, margin, statistics)


def _uses_triton(pairs: Pairs, options: LossOptions) -> bool:
    """Return whether the kernel computes these pairs; raise if `backend="triton"` cannot compute them."""
    backend, device = options.backend, pairs.chosen_logps.device
    if backend == "torch" or (backend == "auto" and not kernels.chosen_for(device)):
        return False
    in_forward_mode = _checks.has_tangent(*pairs.logps())
    if backend == "triton" and in_forward_mode:
        raise ValueError("backend='triton' has no derivative in forward mode: use backend='torch' or 'auto'")
    needs_float64 = pairs.accumulation_dtype() == torch.float64
    if backend == "triton" and needs_float64:
        raise ValueError("backend='triton' computes in float32, got float64 log-probs: use backend='torch' or 'auto'")
    if backend == "triton" and device.type != ("cpu" if kernels.interpreted() else "cuda"):
        place = "is interpreted on the CPU" if kernels.interpreted() else "runs on a GPU"
        raise ValueError(f"backend='triton' {place}, got chosen_logps on {device}: use backend='torch' or 'auto'")
    return not (needs_float64 or in_forward_mode)


def _triton_loss(pairs: Pairs, options: LossOptions) -> AMaPOOutput:
    """Compute the loss with the fused kernel, which computes the statistics as well unless they are supplied."""
    from amapo_loss.kernels import pair_loss  # importing Triton takes a second, and it may not be installed

    rank_moments = None
    if options.gathers_moments():
        rank_moments = all_gather_row(pair_loss.moments(pairs, options.beta), options.process_group)
    if callable(options.statistics) or callable(options.margin):  # both take scores, which the kernel does not return
        d, rewards = _reference.log_ratio_differences(pairs.prepared(), options.beta)
        statistics = _statistics(options, pairs, d, rewards[0], rank_moments)
        margin = _margin(options, pairs, rewards[0], statistics)
        options = options.replaced(options.beta, margin, statistics)
    output = pair_loss.pair_loss(pairs, options, rank_moments)
    supplied = options.statistics
    diagnostics = Diagnostics(
        pairs.detached(),
        output.margins,
        supplied
        if isinstance(supplied, ScoreStatistics)
        else ScoreStatistics(output.mean, output.std, output.num_pairs),
        options.beta,
        options.label_smoothing,
        total_values=output.total_values,
    )
    return AMaPOOutput(output.loss, diagnostics)


def _torch_loss(pairs: Pairs, options: LossOptions) -> AMaPOOutput:
    """Compute the loss with the reference mathematics."""
    prepared = pairs.prepared()
    d, rewards = _reference.log_ratio_differences(prepared, options.beta)
    r, weights = rewards[0], prepared.weights
    rank_moments = None
    if options.gathers_moments():
        row = weighted_moments(r, pairs.counted(), weights)
        scales = torch.stack(_reference.rounding_scales(prepared, rewards, options.beta)).to(row)
        rank_moments = all_gather_row(torch.cat((row, scales)), options.process_group)

    statistics = _statistics(options, pairs, d, r, rank_moments)
    margin = _margin(options, pairs, r, statistics)
    if isinstance(margin, AdaptiveMargin):
        # NaN if a score is not finite. The mean of the batch is NaN then, but not that of supplied statistics.
        mu = statistics.mean if options.statistics is None else statistics.mean + (0 * r).sum()
        if rank_moments is None:
            max_score, input_scale = _reference.rounding_scales(prepared, rewards, options.beta)
        else:
            max_score, input_scale = rank_moments[:, 4:].amax(0).to(r.dtype)
        h = _reference.adaptive_margins(r, mu, statistics.std, max_score, input_scale, options.beta, margin)
    else:
        h = _reference.given_margins(r, margin)
    if weights is not None:
        h = h.masked_fill(weights == 0, 0)

    losses = _reference.pair_losses(d, h, options.beta, options.label_smoothing)
    loss = _reduce(losses, weights, options.reduction, rank_moments)
    diagnostics = Diagnostics(pairs.detached(), h, statistics, options.beta, options.label_smoothing, rewards)
    return AMaPOOutput(loss, diagnostics)


def _statistics(
    options: LossOptions,
    pairs: Pairs,
    d: Tensor,  # [B] with its graph
    r: Tensor,  # [B]
    rank_moments: Tensor | None,  # [ranks, 6], with a process group
) -> ScoreStatistics:
    """Return the supplied statistics, those that an estimator returns, or those of the pairs of all ranks."""
    statistics, counted = options.statistics, pairs.counted()
    if isinstance(statistics, ScoreStatistics):
        return statistics
    if statistics is None and rank_moments is not None:
        return ScoreStatistics(*mean_std_count(merge_moments(rank_moments[:, :3])))
    if statistics is None or (statistics == ScoreStatistics.of and counted is not None):
        return ScoreStatistics.of(r, options.process_group, counted)
    # An estimator sees from the graph whether a gradient is wanted for the scores.
    scores = options.beta * d if counted is None else torch.where(counted, options.beta * d, torch.nan)
    with torch.no_grad():
        return _checked_statistics(statistics(scores, options.process_group), r.device)


def _margin(
    options: LossOptions,
    pairs: Pairs,
    r: Tensor,  # [B]
    statistics: ScoreStatistics,
) -> AdaptiveMargin | float | Tensor:
    """Return the margin of the options or, if it is a function, the margins [B] that it returns."""
    margin, counted = options.margin, pairs.counted()
    if not callable(margin):
        return margin
    with torch.no_grad():
        margins = margin(r if counted is None else torch.where(counted, r, torch.nan), statistics)
    return _checked_margins("the result of margin", margins, pairs)


def _checked_margins(name: str, margins: Tensor, pairs: Pairs) -> Tensor:
    """Return the margins detached and in the dtype to compute in, or raise unless there is one for each pair."""
    _checks.real_tensor(name, margins)
    _checks.one_entry_per_pair({"chosen_logps": pairs.chosen_logps, name: margins})
    return margins.detach().to(pairs.accumulation_dtype())


def _checked_statistics(statistics: ScoreStatistics, device: torch.device) -> ScoreStatistics:
    """Return the statistics detached, or raise if mean and std are not 0-dim floating tensors on the device."""
    if not isinstance(statistics, ScoreStatistics):
        raise TypeError(
            f"the callable passed as statistics must return ScoreStatistics, got {type(statistics).__name__}"
        )
    _checks.scalar_tensor("statistics.mean", statistics.mean, device)
    _checks.scalar_tensor("statistics.std", statistics.std, device)
    return ScoreStatistics(statistics.mean.detach(), statistics.std.detach(), statistics.count)


def _reduce(
    losses: Tensor,  # [B]
    weights: Tensor | None,  # [B]
    reduction: Reduction,
    rank_moments: Tensor | None,  # [ranks, 6], with a process group
) -> Tensor:
    """Return the weighted losses, their sum, or (sum of this rank's) x ranks / (weights of all ranks)."""
    if weights is not None:
        losses = weights * losses
    if reduction == "none":
        return losses
    if reduction == "sum" or losses.shape[0] == 0:  # the sum of no losses is 0 and backpropagates, their mean is NaN
        return losses.sum()
    if rank_moments is not None:
        # DDP and FSDP divide the sum of the ranks' gradients by the number of ranks, so multiply by it here.
        ranks, total = len(rank_moments), rank_moments[:, 3].sum()
    elif weights is not None:
        ranks, total = 1, weights.sum(dtype=losses.dtype)
    else:
        return losses.mean()
    return losses.sum() * (ranks / total.masked_fill(total == 0, 1)).to(losses.dtype)
