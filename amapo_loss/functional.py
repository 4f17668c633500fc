"""The losses: check, score, statistics, margin, objective. Read from the top; everything else is called from here."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from amapo_loss import _checks, _reference, kernels
from amapo_loss._pairs import Pairs
from amapo_loss.diagnostics import Diagnostics
from amapo_loss.margin import AdaptiveMargin
from amapo_loss.statistics import Estimator, ScoreStatistics, gathered, merged, moments

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "torch"]


class AMaPOOutput(NamedTuple):
    """A loss to call `backward()` on, 0-dim (or [B] with `reduction="none"`), and what the batch looked like."""

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
    r"""The AMaPO loss of a batch of preference pairs.

    $$d_i = \frac{\log\pi(y_w) - \log\mathrm{ref}(y_w)}{|y_w|} - \frac{\log\pi(y_l) - \log\mathrm{ref}(y_l)}{|y_l|},
      \qquad r_i = \beta d_i$$
    $$L_i = (1 - \epsilon)\,\mathrm{softplus}(h_i - r_i) + \epsilon\,\mathrm{softplus}(r_i - h_i)$$

    with $h_i$ the adaptive margin (see `AdaptiveMargin`), made from the mean and the standard deviation of the
    batch's scores $r$ and always under stop-gradient. Without a reference $r$ is SimPO's implicit reward, with summed
    log-probs and a reference it is DPO's.

    Args:
        chosen_logps: [B] log-probs in nats of the chosen responses: averages over the response's tokens, as the paper
            trains on (`sequence_logps`), or sums, see `chosen_lengths`. Any floating dtype, any strides; bfloat16 and
            float16 are computed in float32, and gradients come back in the input's dtype.
        rejected_logps: [B] those of the rejected responses.
        ref_chosen_logps: [B] the reference model's log-probs, summed or averaged as the policy's are; with
            `ref_rejected_logps` or not at all. Pass them without a graph: gradients would flow into them, too.
        ref_rejected_logps: [B] those of the rejected responses.
        chosen_lengths: [B] tokens in each chosen response, integer or floating. Given, with `rejected_lengths`, the
            log-probs are sums and are divided by them; a length of 0 counts as 1.
        rejected_lengths: [B] those of the rejected responses.
        beta: scale of the ranking score, > 0. The authors trained with 2.0 to 3.0, on averages.
        label_smoothing: $\epsilon$ in [0, 0.5), the share of pairs believed to be labelled the wrong way round.
        margin: which formula, and which of its parts; see `AdaptiveMargin`.
        statistics: the mean and the standard deviation to take the margins from, in score units, instead of this
            batch's own: with those of a whole optimizer batch, its micro-batches add up to exactly its gradient. Or
            what estimates them from this batch's scores: a `ScoreWindow`, or a callable of yours, see `Estimator`.
        process_group: the data-parallel group over whose pairs, of all its ranks, the statistics are taken. Costs one
            collective of three numbers a rank; without it there is none.
        reduction: `"mean"` over the B pairs (0 if there is none), `"sum"`, or `"none"` for the [B] losses. With a
            process group, `"mean"` is over the pairs of all ranks, and scaled for the averaging of gradients that DDP
            and FSDP do: the average over the ranks, of the losses and of the gradients, is exactly that of one
            process with all pairs, however many each rank has. `"sum"` and `"none"` are of this rank's pairs.
        backend: `"torch"`, or `"triton"`: one kernel launch for the loss, its gradient and the summary, on a GPU and in
            float32. `"auto"` takes Triton for log-probs on a GPU, except float64 ones, and torch for all others. Only
            torch has second derivatives.

    Returns:
        `AMaPOOutput(loss, diagnostics)`, in float32 (float64 where an input is). A NaN or infinite log-prob makes the
        loss NaN and is counted by `diagnostics.summary()["amapo/nonfinite"]`. One pair alone has no spread: its margin
        is 0. Nothing here waits for the device.

    Raises:
        TypeError: for log-probs that are no floating tensors, lengths that are no real tensors, a `beta` or
            `label_smoothing` that is no number, a `margin`, `statistics` or `process_group` of another type.
        ValueError: for shapes that are not 1-D or differ, devices that differ, one reference or length without the
            other, a `beta` or `label_smoothing` out of range, an unknown `reduction` or `backend`; for
            `backend="triton"` and float64 log-probs, or any that are not on a GPU.
        RuntimeError: for `backend="triton"` where it cannot run; says why. In the backward pass, for the second
            derivative of a loss that Triton computed. Where another rank of `process_group` does not take part.

    Example:
        >>> import torch
        >>> chosen_logps = torch.tensor([-1.0, -1.2, -0.9], requires_grad=True)
        >>> rejected_logps = torch.tensor([-1.4, -1.1, -1.6], requires_grad=True)
        >>> loss, diagnostics = amapo_loss(chosen_logps, rejected_logps, beta=2.0)
        >>> loss.backward()
        >>> diagnostics.margins  # only the misranked pair, below the mean, has one
        tensor([0.0000, 4.0876, 0.0000])
        >>> chosen_logps.grad  # and is pulled hardest
        tensor([-0.2067, -0.6576, -0.1319])

    Source: arXiv 2511.09385, section 4; with `AdaptiveMargin(formula="released")`, the authors' published trainer.
    """
    check_options(beta, label_smoothing, margin, statistics, process_group, reduction, backend)
    pairs = Pairs(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    ).checked()
    if isinstance(statistics, ScoreStatistics):
        statistics = _usable(statistics, chosen_logps.device)
    run = _in_triton if _runs_in_triton(backend, pairs) else _in_torch
    return run(pairs, statistics, process_group, beta, label_smoothing, margin, reduction)


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
    r"""The DPO loss: `amapo_loss` without a margin, $h_i = 0$.

    Args, what comes back and what raises are those of `amapo_loss`; the reference is required, and the usual `beta`
    of 0.1 is meant for summed log-probs.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-12.0, -20.0])
        >>> dpo_loss(logps, logps - 3, logps, logps, beta=0.1).loss
        tensor(0.5544)

    Source: arXiv 2305.18290, equation 7; label smoothing as in conservative DPO.
    """
    _check_objective(beta, label_smoothing, reduction)
    _checks.floating("ref_chosen_logps", ref_chosen_logps)  # optional elsewhere, not here
    pairs = Pairs(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    ).checked()
    return _constant_margin(pairs, 0.0, beta, label_smoothing, reduction)


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
    r"""The SimPO loss: `amapo_loss` without a reference and with one margin for every pair, $h_i = \gamma$.

    Args, what comes back and what raises are those of `amapo_loss`, and:
        gamma: the margin in score units, finite; SimPO's "gamma/beta ratio" is `gamma / beta`.

    Example:
        >>> import torch
        >>> logps = torch.tensor([-1.2, -2.0])
        >>> simpo_loss(logps, logps - 0.25, beta=2.0, gamma=0.5).loss
        tensor(0.6931)

    Source: arXiv 2405.14734, equation 6.
    """
    _check_objective(beta, label_smoothing, reduction)
    _checks.number("gamma", gamma)
    pairs = Pairs(
        chosen_logps, rejected_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths
    ).checked()
    return _constant_margin(pairs, gamma, beta, label_smoothing, reduction)


def check_options(
    beta: float,
    label_smoothing: float,
    margin: AdaptiveMargin,
    statistics: ScoreStatistics | Estimator | None,
    process_group: ProcessGroup | None,
    reduction: Reduction,
    backend: Backend,
) -> None:
    """Raise for options that `amapo_loss` does not accept, whatever the batch."""
    _check_objective(beta, label_smoothing, reduction)
    _checks.instance("margin", margin, AdaptiveMargin)
    if not (statistics is None or isinstance(statistics, ScoreStatistics) or callable(statistics)):
        raise TypeError(f"statistics must be ScoreStatistics or a callable estimator, got {type(statistics).__name__}")
    if process_group is not None:
        _checks.process_group("process_group", process_group)
    _checks.choice("backend", backend, Backend)
    if backend == "triton" and (reason := kernels.unavailable_reason()):
        raise RuntimeError(f"backend='triton' cannot run: {reason}")


def _check_objective(beta: float, label_smoothing: float, reduction: Reduction) -> None:
    _checks.number("beta", beta, above=0)
    _checks.number("label_smoothing", label_smoothing, at_least=0, below=0.5)
    _checks.choice("reduction", reduction, Reduction)


def _runs_in_triton(backend: Backend, pairs: Pairs) -> bool:
    """Whether the kernel computes these pairs; raises where it was asked for and cannot."""
    device = pairs.chosen_logps.device
    if backend == "torch" or (backend == "auto" and not (device.type == "cuda" and kernels.HAS_TRITON)):
        return False
    exact = _checks.computing_dtype(*pairs[:4]) == torch.float64
    if backend == "triton" and exact:
        raise ValueError("backend='triton' computes in float32, got float64 log-probs: use backend='torch' or 'auto'")
    if backend == "triton" and device.type != ("cpu" if kernels.interpreted() else "cuda"):
        raise ValueError(f"backend='triton' runs on a GPU, got chosen_logps on {device}: use backend='torch' or 'auto'")
    return not exact


def _usable(statistics: ScoreStatistics, device: torch.device) -> ScoreStatistics:
    """Statistics from outside, checked and detached."""
    _checks.instance("statistics", statistics, ScoreStatistics)
    for name in ("mean", "std"):
        _checks.scalar(f"statistics.{name}", getattr(statistics, name), device)
    return ScoreStatistics(statistics.mean.detach(), statistics.std.detach(), statistics.count)


def _in_triton(
    pairs: Pairs,
    statistics: ScoreStatistics | Estimator | None,
    process_group: ProcessGroup | None,
    beta: float,
    label_smoothing: float,
    margin: AdaptiveMargin,
    reduction: Reduction,
) -> AMaPOOutput:
    from amapo_loss.kernels import pair_loss  # Triton takes a second to import, and may not be installed

    rows = None if process_group is None else gathered(pair_loss.moments(pairs, beta), process_group)
    if not (statistics is None or isinstance(statistics, ScoreStatistics)):
        _, (r, *_) = _reference.differences(pairs.computable().detached(), beta)
        statistics = _usable(statistics(r, process_group), r.device)
    loss, margins, summary, batch_statistics = pair_loss.pair_loss(
        pairs,
        (None, None) if statistics is None else statistics[:2],
        rows,
        beta,
        label_smoothing,
        margin.formula == "paper",
        margin.normalize,
        margin.scaling == "exp",
        margin.clip,
        reduction,
    )
    if statistics is None:
        statistics = ScoreStatistics(*batch_statistics)
    return AMaPOOutput(loss, Diagnostics(pairs.detached(), margins, statistics, beta, label_smoothing, entries=summary))


def _in_torch(
    pairs: Pairs,
    statistics: ScoreStatistics | Estimator | None,
    process_group: ProcessGroup | None,
    beta: float,
    label_smoothing: float,
    margin: AdaptiveMargin,
    reduction: Reduction,
) -> AMaPOOutput:
    pairs = pairs.computable()
    d, rewards = _reference.differences(pairs, beta)
    r = rewards[0]
    rows = None if process_group is None else gathered(moments(r), process_group)
    if statistics is None:
        statistics = ScoreStatistics.of(r) if rows is None else merged(rows)
        mu = statistics.mean
    else:
        if not isinstance(statistics, ScoreStatistics):
            statistics = _usable(statistics(r, process_group), r.device)
        mu = statistics.mean + (0 * r).sum()  # NaN if a score is, as the batch's own would be
    magnitude = _reference.magnitude(pairs, rewards, beta)
    h = _reference.adaptive_margins(r, mu, statistics.std, magnitude, beta, margin)
    losses = _reference.pair_losses(d, h, beta, label_smoothing)
    if rows is not None and reduction == "mean":
        loss = losses.sum() * (len(rows) / rows[:, 0].sum().clamp(min=1)).to(losses.dtype)
    else:
        loss = _reduced(losses, reduction)
    return AMaPOOutput(loss, Diagnostics(pairs.detached(), h, statistics, beta, label_smoothing, rewards))


def _constant_margin(
    pairs: Pairs, gamma: float, beta: float, label_smoothing: float, reduction: Reduction
) -> AMaPOOutput:
    pairs = pairs.computable()
    d, rewards = _reference.differences(pairs, beta)
    r = rewards[0]
    h = gamma + 0 * r  # NaN for a pair that is not finite, whose loss is NaN then
    loss = _reduced(_reference.pair_losses(d, h, beta, label_smoothing), reduction)
    return AMaPOOutput(loss, Diagnostics(pairs.detached(), h, ScoreStatistics.of(r), beta, label_smoothing, rewards))


def _reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "sum" or len(losses) == 0:  # over no pairs the sum, unlike the mean, is 0 and backpropagates
        return losses.sum()
    return losses.mean()
