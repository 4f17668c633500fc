"""Compute the metrics of a run: how the model ranks pairs after training, and what happened during training.

Depends on torch, and on data.py, harness.py and models.py.
"""

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.studies.data import STYLES, Corpus, Pair
from benchmarks.studies.harness import AnswerLogps, Metrics, Trace, Treatment, as_pairs
from benchmarks.studies.models import Texts

# Ranges of the judge's confidence. The lower end is included and the upper end is not, so that of the last band is
# above 1: otherwise a confidence of exactly 1 would belong to no band.
BANDS = {"low": (0.0, 1 / 3), "middle": (1 / 3, 2 / 3), "high": (2 / 3, 1.01)}


class RankedCorrectly(NamedTuple):
    """Which pairs a model ranks correctly."""

    by_logp: Tensor  # [N] bool
    by_own_score: Tensor  # [N] bool
    by_change: Tensor  # [N] bool


def evaluate(
    treatment: Treatment,
    corpus: Corpus,
    texts: dict[str, Texts],
    policy: dict[str, AnswerLogps],
    ref: dict[str, AnswerLogps],
) -> Metrics:
    """Return how a model ranks the validation pairs, the held-out pairs, and those of the other files.

    A pair is ranked correctly if the chosen answer has the higher average log-prob. The metrics named "own score" rank
    by the implicit rewards of the treatment's loss instead, and those named "change" by the difference of the average
    log-prob from the reference, which treats all losses alike. Before training, no log-prob has changed, and there is
    no such metric. Identical answers, which truncation makes, count as
    misranked, because rounding would otherwise decide between them.

    Args:
        treatment: the loss that the model was trained with.
        corpus: the pairs.
        texts: the tensors of "validation", "held out" and each other file, by its name.
        policy: log-probs and lengths under the model, with the same keys.
        ref: the same under the reference.
    """
    results = {
        name: ranked_correctly(treatment, texts[name], policy[name], ref[name])
        for name in ("validation", "held out", *corpus.further)
    }
    validation, held_out = results["validation"], results["held out"]
    ranking = as_pairs(*policy["held out"]).ranking()
    pairs, sources = corpus.held_out, indices_by_source(corpus.held_out)
    has_changed = policy is not ref
    metrics: Metrics = {
        "validation": share_of(validation.by_logp),
        "validation, own score": share_of(validation.by_own_score),
        "held out": share_of(held_out.by_logp),
        "held out, own score": share_of(held_out.by_own_score),
        "validation, change": share_of(validation.by_change) if has_changed else None,
        "held out, change": share_of(held_out.by_change) if has_changed else None,
        "ranking mean": ranking.mean().item(),
        "ranking std": ranking.std().item(),
        "chosen log-prob": chosen_logp(policy["held out"]),
        "bands": {name: share_of(held_out.by_logp, indices_in_band(pairs, band)) for name, band in BANDS.items()},
        "sources": {source: share_of(held_out.by_logp, indices) for source, indices in sources.items()},
        "sources, own score": {source: share_of(held_out.by_own_score, indices) for source, indices in sources.items()},
        "correlations": confidence_correlations(policy["held out"], pairs),
        "outcomes": {
            "held out": outcomes(held_out.by_logp),
            "held out, own score": outcomes(held_out.by_own_score),
            "held out, change": outcomes(held_out.by_change),
        },
        "further": {
            name: {
                "accuracy": share_of(results[name].by_logp),
                "own score": share_of(results[name].by_own_score),
                "chosen log-prob": chosen_logp(policy[name]),
            }
            for name in corpus.further
        },
        "styles": {},
    }
    for name in corpus.styled:
        sums, lengths = policy[name]
        identical = identical_answers(texts[name])
        metrics["styles"][name] = style_accuracies(sums / lengths, identical)
        rewards = treatment.rewards(sums, lengths, ref[name][0])
        metrics["styles"][name]["own score"] = style_accuracies(rewards, identical)
    return metrics


def ranked_correctly(treatment: Treatment, texts: Texts, policy: AnswerLogps, ref: AnswerLogps) -> RankedCorrectly:
    """Return which pairs a model ranks correctly, by the three measures of `evaluate`.

    Args:
        treatment: the loss that the model was trained with.
        texts: the chosen answers, followed by the rejected ones.
        policy: log-probs and lengths of these texts under the model.
        ref: the same under the reference.
    """
    sums, lengths = policy
    chosen_labels, rejected_labels = texts.labels.chunk(2)
    differ = (chosen_labels != rejected_labels).any(1)

    def is_higher(scores: Tensor) -> Tensor:
        chosen, rejected = scores.chunk(2)
        return (chosen > rejected) & differ

    by_own_score = is_higher(treatment.rewards(sums, lengths, ref[0]))
    return RankedCorrectly(is_higher(sums / lengths), by_own_score, is_higher((sums - ref[0]) / lengths))


def chosen_logp(answers: AnswerLogps) -> float:
    """Return the mean of the chosen answers' average log-probs, nats per token."""
    return (answers[0] / answers[1]).chunk(2)[0].mean().item()


def share_of(is_true: Tensor, indices: list[int] | None = None) -> float | None:
    """Return the share of True among [N] bool, at the indices if they are given; None if that selects nothing."""
    selected = is_true if indices is None else is_true[indices]
    return selected.double().mean().item() if len(selected) else None


def outcomes(is_true: Tensor) -> str:
    """Return [N] bool as a text of N digits, "1" for True, which is short in JSON."""
    return "".join(map(str, is_true.int().tolist()))


def indices_in_band(pairs: list[Pair], band: tuple[float, float]) -> list[int]:
    """Return the indices of the pairs whose confidence is in [low, high) for `band` = (low, high)."""
    low, high = band
    return [i for i, pair in enumerate(pairs) if pair.confidence is not None and low <= pair.confidence < high]


def indices_by_source(pairs: list[Pair]) -> dict[str, list[int]]:
    """Return the indices of the pairs of each source, without the pairs whose source is unknown."""
    indices = sorted(range(len(pairs)), key=lambda i: pairs[i].source)
    return {source: list(group) for source, group in groupby(indices, key=lambda i: pairs[i].source) if source}


def confidence_correlations(answers: AnswerLogps, pairs: list[Pair]) -> dict[str, dict[str, float | None]]:
    """Return how well the model's gap between chosen and rejected answer agrees with the judge's confidence.

    Args:
        answers: log-probs and lengths of all chosen answers, followed by those of all rejected answers.
        pairs: the pairs, with or without a confidence.

    Returns:
        Spearman's rank correlations of the confidence with the gap in average log-prob and with the gap in perplexity.
        The outer keys are "all" and the sources.
    """
    chosen, rejected = (answers[0] / answers[1]).double().chunk(2)
    gaps = {"log-prob": chosen - rejected, "perplexity": (-rejected).exp() - (-chosen).exp()}
    groups = {"all": list(range(len(pairs)))} | indices_by_source(pairs)
    judged = {group: [i for i in indices if pairs[i].confidence is not None] for group, indices in groups.items()}
    confidence = torch.tensor([pair.confidence or 0.0 for pair in pairs], dtype=torch.float64)
    return {
        group: {name: spearman(gap[indices], confidence[indices]) for name, gap in gaps.items()}
        for group, indices in judged.items()
    }


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Return Spearman's rank correlation of x [N] and y [N], or None if one of them is constant.

    Equal values share the mean of their ranks.
    """

    def ranks(values: Tensor) -> Tensor:
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        mean_ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
        return mean_ranks

    if len(x.unique()) < 2 or len(y.unique()) < 2:
        return None
    return torch.corrcoef(torch.stack((ranks(x), ranks(y))))[0, 1].item()


def identical_answers(texts: Texts) -> Tensor:
    """Return where chosen answer i and rejected answer j of an entry have the same tokens, [entries, 3, 3] bool.

    Truncation can make different answers identical.
    """
    chosen, rejected = texts.labels.view(-1, 2, len(STYLES), texts.labels.shape[1]).unbind(1)
    identical: Tensor = (chosen[:, :, None] == rejected[:, None, :]).all(-1)
    return identical


def style_accuracies(scores: Tensor, identical: Tensor) -> Metrics:
    """Return RM-Bench's accuracies.

    Entry (i, j) of "matrix" is the share of entries where the chosen answer in style i scores higher than the rejected
    answer in style j. Identical answers count as a loss, because rounding would otherwise decide between them. "easy"
    is the mean of the lower left triangle, "normal" that of the diagonal and "hard" that of the upper right triangle.

    Args:
        scores: [entries * 6] scores. Each entry has three chosen answers, then three rejected ones, in the order of
            `STYLES`.
        identical: [entries, 3, 3] bool, as returned by `identical_answers`.
    """
    chosen, rejected = scores.view(-1, 2, len(STYLES)).unbind(1)
    matrix = ((chosen[:, :, None] > rejected[:, None, :]) & ~identical).double().mean(0)
    triangle_size = len(STYLES) * (len(STYLES) - 1) / 2
    return {
        "matrix": matrix.tolist(),
        "easy": (matrix.tril(-1).sum() / triangle_size).item(),
        "normal": matrix.diagonal().mean().item(),
        "hard": (matrix.triu(1).sum() / triangle_size).item(),
        "ties": identical.double().mean().item(),
    }


def training_metrics(trace: Trace) -> Metrics:
    """Return the course of training: curves with one value per step, and means over all steps.

    Each pair belongs to one of four cases at each step: the model ranks it correctly or not, and its margin is above 0
    or not. The curve "share, CASE" is the share of the batch's pairs that are in a case. The curve "spent, CASE" is
    their gradient weight, summed and divided by the batch size.
    """
    is_correct, has_margin = trace.ranking > 0, trace.margins > 0
    by_ranking = {"correct": is_correct, "misranked": ~is_correct}
    by_margin = {"margin": has_margin, "no margin": ~has_margin}
    cases = {
        f"{ranked}, {margin}": ranked_mask & margin_mask
        for ranked, ranked_mask in by_ranking.items()
        for margin, margin_mask in by_margin.items()
    }
    curves = {
        "accuracy": rounded_curve(is_correct.double().mean(1)),
        "ranking": rounded_curve(trace.ranking.mean(1)),
        "ranking std": rounded_curve(trace.ranking.std(1, correction=0)),
        "margin": rounded_curve(trace.margins.mean(1)),
        "gradient error": rounded_curve(trace.gradient_error),
    }
    curves |= {f"share, {case}": rounded_curve(mask.double().mean(1)) for case, mask in cases.items()}
    curves |= {f"spent, {case}": rounded_curve((trace.weights * mask).mean(1)) for case, mask in cases.items()}
    return {
        "curves": curves,
        "gradient error": trace.gradient_error.double().mean().item(),
        "weight correct": trace.weights[is_correct].double().mean().item(),
        "weight misranked": trace.weights[~is_correct].double().mean().item(),
        "margin": trace.margins.double().mean().item(),
        "probes": trace.probes,
    }


def rounded_curve(values: Tensor) -> list[float]:
    """Return the values [steps] rounded to four significant digits, which is enough for a picture."""
    return [float(f"{value:.4g}") for value in values.tolist()]
