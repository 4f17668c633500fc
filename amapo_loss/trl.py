"""`AMaPOTrainer` and `AMaPOConfig`: TRL's DPO trainer with the AMaPO loss.

    python -m amapo_loss.trl --config run.yaml

runs TRL's script for DPO with them. Its options are those of that script and of `AMaPOConfig`, from a YAML file, the
command line or both. TRL makes the data sets, the batches, the metrics and the checkpoints. Depends on TRL 1.0 to 1.16,
on the public names of this package, and on its argument checks.
"""

import inspect
import math
import warnings
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from amapo_loss import (
    AdaptiveMargin,
    AMaPOOutput,
    ScoreWindow,
    Totals,
    __version__,
    _checks,
    amapo_loss,
    sequence_logps,
)
from amapo_loss._checks import Formula, Scaling

_NEEDED = "trl>=1.0,<1.17"
try:
    from trl import DPOConfig, DPOTrainer
except (ImportError, RuntimeError) as error:
    if isinstance(error, ModuleNotFoundError) and error.name == "trl":
        raise ImportError(f"amapo_loss.trl needs TRL: run `pip install '{_NEEDED}'`") from None
    raise ImportError(
        f"amapo_loss.trl needs {_NEEDED}, and trl {version('trl')} cannot be imported here: {error}"
    ) from error

# What this file overrides, calls or sets in DPOTrainer. A version string would not say whether it is there.
_METHODS = (
    "_inner_training_loop",
    "_compute_loss",
    "compute_ref_log_probs",
    "_set_signature_columns_if_needed",
    "_prepare_inputs",
    "evaluation_loop",
    "log",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
)
_ATTRIBUTES = ("beta", "label_smoothing", "loss_types", "loss_weights", "precompute_ref_logps", "_metrics")


def _require(trainer: Any, names: tuple[str, ...]) -> None:
    """Raise ImportError if a trainer, or its class, lacks one of these names."""
    if missing := " and no ".join(name for name in names if not hasattr(trainer, name)):
        raise ImportError(
            f"amapo_loss.trl needs {_NEEDED}, found {version('trl')}, whose DPOTrainer has no {missing}: "
            f"run `pip install '{_NEEDED}'`"
        )


_require(DPOTrainer, _METHODS)

__all__ = ["AMaPOConfig", "AMaPOTrainer"]

# Options of DPOConfig that have no meaning for this loss. Setting one of them raises, so that none is ignored.
_OPTIONS_OF_OTHER_LOSSES = (
    "loss_type",
    "loss_weights",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "use_weighting",
    "discopop_tau",
    "label_smoothing_factor",
)
_OPTIONS_OF_THE_MARGIN = tuple(f.name for f in fields(AdaptiveMargin))
_OPTIONS_OF_A_REFERENCE = (
    "precompute_ref_log_probs",
    "precompute_ref_batch_size",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)
_SCHEDULERS_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # of Transformers; they look at `metric_for_best_model`
_ENOUGH_PAIRS = 64  # with fewer pairs, the gradient weights are off by more than a tenth, see docs/studies.md
_WINDOW_FILE = "score_window.pt"  # in a checkpoint's folder
_TITLE = "AMaPO: Adaptive Margin-attached Preference Optimization for Language Model Alignment"
_CITATION = """@inproceedings{deng2026amapo,
    title     = {{AMaPO: Adaptive Margin-attached Preference Optimization for Language Model Alignment}},
    author    = {Ruibo Deng and Duanyu Feng and Wenqiang Lei},
    booktitle = {AAAI},
    year      = 2026,
    note      = {arXiv 2511.09385}
}"""


@dataclass
class AMaPOConfig(DPOConfig):
    r"""`DPOConfig` with the options of `amapo_loss`.

    Args:
        beta: scale of the ranking score, above 0. The authors trained with 2.0 to 3.0 on averaged log-probs. With
            summed log-probs, start with about 0.1.
        label_smoothing: share of pairs that you believe to be labelled the wrong way round, in [0, 0.5).
        reference_free: `True` loads and runs no reference model. `False` subtracts the log-probs of the reference model
            that `DPOTrainer` would use; then prefer `formula="released"`, because all scores start at 0. With
            `length_average=False` in addition, the score is DPO's.
        length_average: `True` divides the log-probs by the number of tokens in the response, as the paper does. `False`
            takes sums.
        formula: the margin formula, `"paper"` or `"released"`. `AdaptiveMargin` says more about this option and the
            four below.
        normalize: `False` makes the margin independent of the distance to the mean.
        scaling: `"exp"` or `"linear"`.
        clip: `False` gives every pair a margin.
        floor: the margin of the pairs that `clip` excludes, in score units and at least 0.
        constant_margin: a number that is the margin of every pair in place of the adaptive one: SimPO's gamma, in score
            units. With a reference, sums and DPO's beta, 0.0 gives DPO. The five options above must keep their
            defaults.
        margin_column: name of a column of the data with a number for each pair, which is its margin in score units, in
            place of the adaptive one. Evaluation data need this column, too.
        weight_column: name of a column of the data with a number for each pair, which is its weight. 0 leaves the pair
            out of this loss, its statistics and its metrics, but not out of TRL's own metrics, such as the entropy
            (unless `sft_weight` is set). The
            loss is then the sum of weight times loss, divided by the number of pairs, those of weight 0 included, so
            that a weight means the same in every micro-batch. Weights whose mean is 1 keep the scale.
        sft_weight: weight of TRL's SFT loss, to be added to this loss. With 0 it is left out. It is the average over
            all tokens of the chosen responses, without those of pairs whose weight is 0. Other weights do not change
            it.
        statistics_window: number of scores that the statistics are taken over during training, with a `ScoreWindow`. It
            has the scores of this micro-batch and of the ones before it, on all processes, up to this number. Choose it
            near the number of pairs per optimizer step on all processes. None takes the statistics of each micro-batch
            on all processes.
        metric_for_best_model: what `load_best_model_at_end` and the schedulers `reduce_lr_on_plateau` and `greedy` look
            at. Transformers takes the evaluation loss if this is None. With an adaptive margin, this loss grows while
            the model improves, so `"rewards/accuracies"` takes its place. For this and every other metric that
            should grow, the schedulers get the mode `"max"`, if `lr_scheduler_kwargs` has no mode.

    Raises:
        TypeError: if a value has a wrong type.
        ValueError: if a value is out of range; if an option is set that belongs to another loss of `DPOTrainer`
            (`loss_type`, `loss_weights`, `ld_alpha`, `f_divergence_type`, `f_alpha_divergence_coef`, `use_weighting`,
            `discopop_tau`, `label_smoothing_factor`); if `include_for_metrics` has "loss"; if an option of the
            reference (`precompute_ref_log_probs`, `sync_ref_model` and their own options) is set together with
            `reference_free`; if an option of the adaptive margin is set together with `constant_margin` or
            `margin_column`, or both of these are set.
    """

    beta: float = field(default=2.0, metadata={"help": "Scale of the ranking score."})
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of pairs that are labelled the wrong way round, in [0, 0.5)."}
    )
    reference_free: bool = field(default=True, metadata={"help": "Load and run no reference model."})
    length_average: bool = field(default=True, metadata={"help": "Divide log-probs by the length of the response."})
    formula: Formula = field(default="paper", metadata={"help": "Margin formula."})
    normalize: bool = field(
        default=True, metadata={"help": "Measure the distance to the mean score in standard deviations."}
    )
    scaling: Scaling = field(default="exp", metadata={"help": "Scaling of the margin."})
    clip: bool = field(default=True, metadata={"help": "Give no margin to the pairs that the gate excludes."})
    floor: float = field(default=0.0, metadata={"help": "Margin of the pairs that the gate excludes."})
    constant_margin: float | None = field(
        default=None, metadata={"help": "Margin of every pair, in place of the adaptive one."}
    )
    margin_column: str | None = field(
        default=None, metadata={"help": "Column of the data with a margin for each pair, in place of the adaptive one."}
    )
    weight_column: str | None = field(
        default=None, metadata={"help": "Column of the data with a weight for each pair."}
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Weight of the SFT loss on the chosen responses."})
    statistics_window: int | None = field(
        default=None, metadata={"help": "Number of latest scores that the statistics are taken over during training."}
    )
    # DPOTrainer knows no such loss. With the default of DPOConfig, it would train DPO with this configuration.
    loss_type: list[str] = field(
        default_factory=lambda: ["amapo"], metadata={"help": "Leave it out: AMaPOTrainer has one loss."}
    )

    def __post_init__(self) -> None:
        given_metric = self.metric_for_best_model
        super().__post_init__()
        # Transformers fills in the loss, which grows with adaptive margins while the model improves.
        if given_metric is None and self.metric_for_best_model == "loss" and self.has_adaptive_margin:
            self.metric_for_best_model: Any = "rewards/accuracies"
            self.greater_is_better: Any = True
        if self.lr_scheduler_type in _SCHEDULERS_BY_METRIC and self.greater_is_better:
            # These minimize the metric by default, whatever greater_is_better says.
            self.lr_scheduler_kwargs: Any = {"mode": "max", **(self.lr_scheduler_kwargs or {})}
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(self)}
        forbidden = dict.fromkeys(_OPTIONS_OF_OTHER_LOSSES, "belongs to another loss of DPOTrainer")
        if self.reference_free:
            forbidden |= dict.fromkeys(_OPTIONS_OF_A_REFERENCE, "needs a reference model, and reference_free is True")
        for replacement in ("constant_margin", "margin_column"):
            if getattr(self, replacement) is not None:
                reason = f"has no effect, because {replacement} replaces the adaptive margin"
                forbidden |= dict.fromkeys(_OPTIONS_OF_THE_MARGIN, reason)
        if self.margin_column is not None:
            forbidden["constant_margin"] = "has no effect, because margin_column gives the margins"
        if "sft" in self.loss_type:
            forbidden["loss_type"] = "belongs to another loss of DPOTrainer; for SFT beside this loss, set sft_weight"
        for name, reason in forbidden.items():
            if name not in defaults:  # not every TRL has all of these options
                continue
            value, default = getattr(self, name), defaults[name]
            if value != default:
                raise ValueError(f"{name} {reason}: leave it at {default!r}, got {value!r}")
        _checks.number("beta", self.beta, above=0)
        _checks.number("label_smoothing", self.label_smoothing, at_least=0, below=0.5)
        _checks.number("sft_weight", self.sft_weight, at_least=0)
        if self.statistics_window is not None:
            _checks.integer("statistics_window", self.statistics_window, at_least=1)
        if self.constant_margin is not None:
            _checks.number("constant_margin", self.constant_margin)
        if "loss" in self.include_for_metrics:
            raise ValueError(
                'include_for_metrics must not have "loss", because an evaluation computes one loss for all pairs'
            )
        _ = self.margin  # raises if its options are wrong
        # If one process read the batches of a streamed data set for all, accelerate would cut them into parts for the
        # processes. TRL's batches have all chosen responses before the rejected ones: the parts would have wrong pairs.
        if self.accelerator_config.dispatch_batches:
            raise ValueError("accelerator_config must not have dispatch_batches=True, which would mix up the pairs")
        self.accelerator_config: Any = replace(self.accelerator_config, dispatch_batches=False)

    @classmethod
    def of(cls, dpo_config: DPOConfig, **options: Any) -> "AMaPOConfig":
        """Return a configuration with the values of a `DPOConfig`, and the given options of this class.

        With averaged log-probs, a beta that a `DPOConfig` leaves at its default of 0.1 becomes 2.0. A
        `metric_for_best_model` of "loss" counts as not given where `DPOConfig` sets it by itself. An `AMaPOConfig`
        keeps its own values.

        Raises:
            TypeError: if `dpo_config` is not a `DPOConfig`.
            ValueError: as the constructor, for example for another `loss_type`.
        """
        if not isinstance(dpo_config, DPOConfig):
            raise TypeError(f"dpo_config must be a DPOConfig, got {type(dpo_config).__name__}")
        # `to_dict` would mask tokens and turn objects into text.
        names = [f.name for f in fields(cls) if f.init and hasattr(dpo_config, f.name)]
        values = {name: getattr(dpo_config, name) for name in names}
        if not isinstance(dpo_config, AMaPOConfig):
            if dpo_config.loss_type == ["sigmoid"]:  # the default
                del values["loss_type"]
            if dpo_config.beta == DPOConfig.beta and options.get("length_average", True):
                del values["beta"]
            sets_metric = dpo_config.load_best_model_at_end or dpo_config.lr_scheduler_type in _SCHEDULERS_BY_METRIC
            if sets_metric and dpo_config.metric_for_best_model == "loss":
                del values["metric_for_best_model"]
        return cls(**values | options)

    @property
    def has_adaptive_margin(self) -> bool:
        """Whether the margins are made from the statistics of the scores."""
        return self.constant_margin is None and self.margin_column is None

    @property
    def margin(self) -> AdaptiveMargin | float:
        """`constant_margin`, or what `formula`, `normalize`, `scaling`, `clip` and `floor` describe.

        With `margin_column`, the margins of the data take its place.
        """
        if self.constant_margin is not None:
            return self.constant_margin
        return AdaptiveMargin(**{name: getattr(self, name) for name in _OPTIONS_OF_THE_MARGIN})


def _option_for(argument: str) -> str:
    """Return the option that names the column for "margin" or "weights"."""
    return f"{argument.removesuffix('s')}_column"


def _missing_column(column: str, argument: str, data: str) -> ValueError:
    return ValueError(f"{data} has no column {column!r}, which {_option_for(argument)} names")


def _column_names(data: Any) -> list[str]:
    """Return the names of the columns of a data set, or [] if there is none.

    A streamed data set may know them only from its first example, which TRL reads as well.
    """
    if data is None:
        return []
    names = getattr(data, "column_names", None)
    return list(next(iter(data), {}) if names is None else names)


class _WindowReset(TrainerCallback):
    """Forgets the scores of the window when TRL replaces the reference, because they are relative to the old one."""

    def __init__(self, window: ScoreWindow) -> None:
        self.window = window

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reset the window in the steps in which `SyncRefModelCallback` replaces the reference."""
        if state.global_step % args.ref_model_sync_steps == 0:
            self.window.reset()


class _CollatorWithColumns(NamedTuple):
    """A collator that adds columns of the data to the batches of TRL's collator, which drops them."""

    collator: Any
    columns: dict[str, str]  # the column of the data, by the argument of `amapo_loss` that it becomes

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(examples)
        for argument, column in self.columns.items():
            if column not in examples[0]:
                raise _missing_column(column, argument, "the data")
            values = [example[column] for example in examples]
            if None in values:
                raise ValueError(f"the column {column!r}, which {_option_for(argument)} names, has a missing value")
            lowest, expected = (0.0, "at least 0 and finite") if argument == "weights" else (-math.inf, "finite")
            for value in values:  # one NaN would make all weights of the model NaN, and the log would show a loss of 0
                is_number = isinstance(value, Real | Tensor)
                if not (is_number and math.isfinite(value) and value >= lowest):
                    raise ValueError(
                        f"the column {column!r}, which {_option_for(argument)} names, must be {expected}, got {value!r}"
                    )
            batch[argument] = torch.tensor(values, dtype=torch.float32)
        return batch


def _has_log_probs(outputs: Any) -> bool:
    """Return whether TRL's fused head has computed the log-probs of the tokens, as it does from TRL 1.15 on."""
    return getattr(outputs, "log_probs", None) is not None


def _with_float32_logps(model: Any) -> Any:
    """Return a function that calls a model, and gives log-probs of TRL's fused head at least in float32.

    The head computes them in float32, but accelerate lets FSDP2 cast them to bfloat16 if bf16 is set. Their sum over a
    response would then be rounded to bfloat16, too, which has steps of 1 from 128 on.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        outputs = model(*arguments, **options)
        if _has_log_probs(outputs):
            outputs.log_probs = outputs.log_probs.to(torch.promote_types(outputs.log_probs.dtype, torch.float32))
        return outputs

    return call


def _summed_logps(outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the summed log-probs [2B] of the responses, the chosen ones first, from the output of the model.

    Prompt-learning PEFT puts virtual tokens in front of the others, which are cut off here.
    """
    input_ids, mask = inputs["input_ids"], inputs["completion_mask"]
    if _has_log_probs(outputs):  # [2B, T - 1], 0 for tokens that do not count
        token_logps: Tensor = outputs.log_probs
        return token_logps[:, -(input_ids.shape[1] - 1) :].sum(1)
    labels = input_ids.masked_fill(mask == 0, -100)
    return sequence_logps(outputs.logits[:, -labels.shape[1] :], labels, average=False)


def _summary_as_floats(totals: Totals) -> dict[str, float]:
    """Return the summary as Python numbers, with one wait for the device."""
    summary = totals.summary()
    return dict(zip(summary, torch.stack(list(summary.values())).tolist()))


# From TRL 1.6 on, `compute_ref_log_probs` takes the reference model. Before, it takes that of the trainer.
_REFERENCE_IS_AN_ARGUMENT = "model" in inspect.signature(DPOTrainer.compute_ref_log_probs).parameters
# Up to TRL 1.14, `use_liger_kernel` leads to a DPO loss in one of these: the first up to 1.13, the second in 1.14.
_METHODS_OF_OTHER_LIGER_LOSSES = ("_compute_loss_liger", "_get_per_token_logps_and_entropies")
_NO_REFERENCE: Any = object()  # stands for the reference model, so that DPOTrainer does not build a second model


class AMaPOTrainer(DPOTrainer):
    """`DPOTrainer` with the AMaPO loss. It takes the arguments of `DPOTrainer`, with an `AMaPOConfig` as `args`.

    In training, the statistics are taken over the pairs of all processes. In evaluation, they are those of the whole
    evaluation set, so that this loss depends neither on the batch size nor on the number of processes. (The SFT loss of
    `sft_weight` is averaged over the batches, as in TRL.)

    The trainer logs what `DPOTrainer` logs, with the rewards of this loss, and in addition the values of
    `Diagnostics.summary` that start with `amapo/`. They are those of all pairs since the last log, or of the whole
    evaluation set, on all processes. Checkpoints contain the state of the `ScoreWindow`, so that a resumed run ends
    with bitwise the same weights. (From the second epoch of a streamed data set on, Transformers resumes with other
    pairs.) The first log of such a run has only the pairs since it was resumed.

    Example:
        >>> batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 32, "statistics_window": 128}
        >>> options = {"formula": "released", "beta": 2.5, "learning_rate": 6e-7, **batches}
        >>> args = AMaPOConfig("out", **options)  # doctest: +SKIP
        >>> trainer = AMaPOTrainer("Qwen/Qwen3-0.6B", args=args, train_dataset=dataset)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    Source: arXiv 2511.09385.
    """

    _tag_names = ["trl", "amapo"]  # noqa: RUF012
    _name = "AMaPO"
    _paper = {"title": _TITLE, "id": "2511.09385", "citation": _CITATION}  # noqa: RUF012

    precompute_ref_logps: bool

    def __init__(
        self, model: Any, ref_model: Any = None, args: AMaPOConfig | None = None, *others: Any, **options: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = AMaPOConfig(f"{name.split('/')[-1]}-AMaPO")
        if not isinstance(args, AMaPOConfig):
            advice = ": pass AMaPOConfig.of(args)" if isinstance(args, DPOConfig) else ""
            raise TypeError(f"args must be an AMaPOConfig, got {type(args).__name__}{advice}")
        if args.reference_free and ref_model is not None:
            raise ValueError("ref_model was given, but reference_free is True: pass AMaPOConfig(reference_free=False)")
        if args.use_liger_kernel and any(hasattr(DPOTrainer, name) for name in _METHODS_OF_OTHER_LIGER_LOSSES):
            raise ValueError(
                f"use_liger_kernel must be False with TRL {version('trl')}, which would compute a DPO loss of its own: "
                "leave it out, or install trl>=1.15"
            )
        super().__init__(model, _NO_REFERENCE if args.reference_free else ref_model, args, *others, **options)
        _require(self, _ATTRIBUTES)
        self._require_data_parallelism()
        self._warn()
        self._check_data_sets()
        if self._columns():
            self.data_collator: Any = _CollatorWithColumns(self.data_collator, self._columns())
        size = args.statistics_window
        self.window = None if size is None else ScoreWindow(size)
        if args.sync_ref_model and self.window is not None:
            self.add_callback(_WindowReset(self.window))
        # TRL's computation of its loss always runs, because it fills the metrics and has the auxiliary loss. The loss
        # itself is the SFT loss with sft_weight > 0, and otherwise 0, the sum over an empty list.
        self.loss_types = ["sft"] if args.sft_weight else []
        self.loss_weights = [args.sft_weight] if args.sft_weight else []
        self._totals = Totals.none()  # of the pairs of this process since the last log
        self._evaluated: list[dict[str, Tensor]] | None = None  # the pairs of an evaluation so far, one entry per batch

    def _require_data_parallelism(self) -> None:
        """Raise if several processes have the same pairs, which the statistics would count more than once."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        sizes = {name: getattr(parallelism, name, 1) or 1 for name in ("tp_size", "cp_size", "sp_size")}
        sizes["tp_size"] = max(sizes["tp_size"], self.get_tp_size())  # DeepSpeed and Transformers have their own, too
        for name, size in sizes.items():
            if size > 1:
                raise ValueError(
                    f"AMaPOTrainer takes its statistics over all processes, got {name}={size}: "
                    "use data parallelism only"
                )

    def _check_data_sets(self) -> None:
        """Raise for columns that a data set lacks, and for a metric of no evaluation set.

        Otherwise the first evaluation would raise, hours after the start.
        """
        eval_sets = {"eval_dataset": self.eval_dataset}
        if several := isinstance(self.eval_dataset, dict):
            eval_sets = {f"eval_dataset[{name!r}]": data for name, data in self.eval_dataset.items()}
        for name, data in {"train_dataset": self.train_dataset, **eval_sets}.items():
            known = _column_names(data)
            for argument, column in self._columns().items():
                if data is not None and column not in known:
                    raise _missing_column(column, argument, name)
        metric = self.args.metric_for_best_model
        if several and metric is not None and self.args.eval_strategy != "no":
            prefixes = tuple(f"eval_{name}_" for name in self.eval_dataset)
            if not f"eval_{metric.removeprefix('eval_')}".startswith(prefixes):
                raise ValueError(
                    "metric_for_best_model must name one of the evaluation sets, as in "
                    f"{prefixes[0] + 'rewards/accuracies'!r}, got {metric!r}"
                )

    def _warn(self) -> None:
        """Warn of settings with which training runs, but not as intended."""
        args = self.args
        if args.length_average and args.beta < 0.5:
            warnings.warn(
                f"beta={args.beta:g} is meant for sums of log-probs, and length_average is True: with averages, all "
                "scores stay near 0. Start with beta=2.0.",
                stacklevel=3,
            )
        if args.has_adaptive_margin and not args.length_average and args.beta >= 1:
            warnings.warn(
                f"beta={args.beta:g} is meant for averaged log-probs, and length_average is False: with sums, margins "
                "grow beyond all bounds. Start with beta=0.1.",
                stacklevel=3,
            )
        pairs = args.per_device_train_batch_size * self.accelerator.num_processes
        if args.has_adaptive_margin and str(args.metric_for_best_model).endswith("loss"):
            warnings.warn(
                f"metric_for_best_model={args.metric_for_best_model!r} prefers early checkpoints, because the loss "
                "grows with the margins while the model improves: leave it out, or take 'rewards/accuracies'",
                stacklevel=3,
            )
        if args.has_adaptive_margin and pairs == 1 and args.statistics_window is None:
            warnings.warn(
                f"every micro-batch has a single pair, so all margins are {args.floor:g}: set statistics_window to the "
                "number of pairs per optimizer step",
                stacklevel=3,
            )
        # DeepSpeed and FSDP update float32 copies of the weights. The product of an adapter's weights starts at 0,
        # where bfloat16 resolves small steps, but the layers in `modules_to_save` start at the pretrained weights.
        has_copies = self.is_deepspeed_enabled or self.is_fsdp_enabled
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        if hasattr(self.model, "peft_config"):
            trained = {name: weight for name, weight in trained.items() if "modules_to_save" in name}
        dtypes = {weight.dtype for weight in trained.values()}
        if torch.bfloat16 in dtypes and args.learning_rate < 1e-4 and not has_copies:
            warnings.warn(
                f"the weights are in bfloat16, where most steps of learning_rate={args.learning_rate:g} are lost in "
                "rounding: load the model with dtype=torch.float32, and set bf16=True for the computation",
                stacklevel=3,
            )
        columns = _column_names(self.train_dataset)
        for name in {"weight", "weights", "margin", "margins"} & set(columns) - set(self._columns().values()):
            option = _option_for(name)
            warnings.warn(
                f"AMaPOTrainer ignores the column {name!r} of the training data: set {option}={name!r} to use it",
                stacklevel=3,
            )

    def _warn_of_window(self, pairs_per_micro_batch: int) -> None:
        """Warn of statistics over far fewer or far more scores than an optimizer step has on all processes."""
        size = self.args.statistics_window
        pairs_per_step = pairs_per_micro_batch * self.args.gradient_accumulation_steps
        advice = f"set statistics_window={pairs_per_step}, the number of pairs per optimizer step on all processes"
        if not self.args.has_adaptive_margin:
            return
        if size is None and pairs_per_micro_batch < min(pairs_per_step, _ENOUGH_PAIRS):
            warnings.warn(
                f"the statistics are taken over a micro-batch, with {pairs_per_micro_batch} pairs: {advice}",
                stacklevel=2,
            )
        if size is not None and not pairs_per_step / 2 <= size <= 2 * pairs_per_step:
            warnings.warn(f"statistics_window={size} is far from the pairs per step: {advice}", stacklevel=2)

    def _columns(self) -> dict[str, str]:
        """Return the columns of the data that the loss uses, by the argument of `amapo_loss` that each becomes."""
        names = {"margin": self.args.margin_column, "weights": self.args.weight_column}
        return {argument: column for argument, column in names.items() if column is not None}

    def _without_columns(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch without the columns. `DPOTrainer` passes every key that it does not know to the model."""
        return {name: value for name, value in inputs.items() if name not in self._columns()}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the batch on the device. DeepSpeed with bf16 would also round every number in it to bfloat16."""
        names = {"ref_chosen_logps", "ref_rejected_logps", *self._columns()} & inputs.keys()
        kept = {name: inputs[name].to(self.args.device) for name in names}
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared | kept

    def compute_ref_log_probs(self, *arguments: Any) -> Any:
        """Return what `DPOTrainer` returns: the log-probs of the reference for a batch, which is the last argument."""
        *models, inputs = arguments
        return super().compute_ref_log_probs(*map(_with_float32_logps, models), self._without_columns(inputs))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self._columns().values() if name not in self._signature_columns]

    @property
    def ref_model(self) -> Any:
        """The reference model that `DPOTrainer` sets, or None with `reference_free`."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        self._ref_model = None if model is _NO_REFERENCE else model

    def _inner_training_loop(self, batch_size: int | None = None, *arguments: Any, **options: Any) -> Any:
        """Train as `DPOTrainer` does, without the scores of an earlier training or of a try that ran out of memory."""
        self._totals = Totals.none()
        self._warn_of_window((batch_size or self._train_batch_size) * self.accelerator.num_processes)
        if self.window is not None:
            self.window.reset()
        return super()._inner_training_loop(batch_size, *arguments, **options)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        logps: list[Tensor] = []

        def recording_model(*arguments: Any, **options: Any) -> Any:
            outputs = _with_float32_logps(model)(*arguments, **options)
            if not logps:  # DPOTrainer calls the model again where `compute_metrics` needs the logits
                logps.append(_summed_logps(outputs, inputs))
            if not self.args.sft_weight and not _has_log_probs(outputs):
                outputs.logits = outputs.logits.detach()  # TRL would keep their log-probs for a backward pass
            return outputs

        # With reference log-probs in its inputs, DPOTrainer makes no forward pass for them.
        inputs = inputs | self._reference_logps(inputs)
        trl_inputs = self._without_columns(inputs)
        if self.args.sft_weight:
            mask = inputs["completion_mask"]
            counted = has_tokens = mask[:, 1:].sum(1).chunk(2)[0] > 0
            if "weights" in inputs:
                counted = counted & (inputs["weights"].to(counted.device) != 0)
            # Where no pair counts, TRL gets all of them with the weight 0: averages over no tokens would be NaN.
            trl_inputs["completion_mask"] = torch.where(counted.any(), mask * counted.repeat(2).unsqueeze(1), mask)
            self.loss_weights = [self.args.sft_weight * counted.any()]
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            trl_result = super()._compute_loss(recording_model, trl_inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        trl_loss, *trl_outputs = trl_result if return_outputs else (trl_result,)
        if self.args.sft_weight:
            trl_loss = torch.where(has_tokens.any(), trl_loss, 0)  # NaN if there are no tokens at all
        loss = self._amapo_loss(logps[0], inputs) + trl_loss
        return (loss, *trl_outputs) if return_outputs else loss

    def _reference_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Return the summed reference log-probs under TRL's names for precomputed ones.

        They are zeros with `reference_free`. If they were precomputed, `inputs` has them already, and this returns {}.
        """
        if self.precompute_ref_logps:
            return {}
        if self.args.reference_free:
            chosen = rejected = torch.zeros(len(inputs["input_ids"]) // 2, device=self.accelerator.device)
        else:
            # Not `or`: a compiled model has no truth value.
            model = self.model if self.ref_model is None else self.ref_model
            models = [model] if _REFERENCE_IS_AN_ARGUMENT else []
            chosen, rejected = self.compute_ref_log_probs(*models, inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _amapo_loss(
        self,
        logps: Tensor,  # [2B] sums, the chosen responses first
        inputs: dict[str, Any],
    ) -> Tensor:
        """Return the loss of a batch and keep its totals; in an evaluation, return 0 and keep its log-probs."""
        chosen_logps, rejected_logps = logps.chunk(2)
        chosen_lengths, rejected_lengths = inputs["completion_mask"][:, 1:].sum(1).chunk(2)
        pairs = {
            "chosen_logps": chosen_logps,
            "rejected_logps": rejected_logps,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }
        others = [] if self.args.reference_free else ["ref_chosen_logps", "ref_rejected_logps"]
        pairs |= {name: inputs[name].to(logps.device) for name in [*others, *self._columns()]}
        if self._evaluated is not None:
            dtype = torch.promote_types(chosen_logps.dtype, torch.float32)  # bfloat16 would round lengths above 256
            stacked = torch.stack([column.to(dtype) for column in pairs.values()], dim=1)
            gathered = self.accelerator.gather_for_metrics(stacked).unbind(1)
            self._evaluated.append(dict(zip(pairs, gathered)))
            return chosen_logps.new_zeros(())  # `evaluation_loop` adds the loss of the whole evaluation set
        training = self.model.training
        loss, diagnostics = self._loss_of(
            pairs,
            statistics=self.window if training else None,
            process_group=dist.group.WORLD if self.accelerator.num_processes > 1 else None,
        )
        if training:
            self._totals += diagnostics.totals()
        return loss

    def _loss_of(
        self,
        pairs: dict[str, Tensor],  # [B] by argument of `amapo_loss`; the log-probs are sums
        **options: Any,
    ) -> AMaPOOutput:
        """Return the loss of some pairs with the options of the configuration. Empty responses leave a pair out."""
        num_pairs, has_weights = len(pairs["chosen_logps"]), "weights" in pairs
        if not self.args.length_average:
            pairs = dict(pairs)
            counted = (pairs.pop("chosen_lengths") > 0) & (pairs.pop("rejected_lengths") > 0)
            pairs["weights"] = torch.where(counted, pairs["weights"], 0) if "weights" in pairs else counted
        loss, diagnostics = amapo_loss(
            **{"margin": self.args.margin} | pairs,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            reduction="sum" if has_weights else "mean",
            **options,
        )
        # A mean that divides by the weights of the micro-batch would weight pairs only against their neighbors in it.
        return AMaPOOutput(loss / num_pairs if has_weights else loss, diagnostics)

    def evaluation_loop(self, dataloader: Any, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """Evaluate as `DPOTrainer` does, with the loss and the summary of the whole evaluation set."""
        self._evaluated = []
        try:
            output = super().evaluation_loop(dataloader, *arguments, metric_key_prefix=metric_key_prefix, **options)
            batches = self._evaluated
        finally:
            self._evaluated = None
        if not batches:  # with `dataloader_drop_last`, if there are fewer pairs than in a batch
            return output
        loss, diagnostics = self._loss_of({name: torch.cat([batch[name] for batch in batches]) for name in batches[0]})
        output.metrics[f"{metric_key_prefix}_loss"] += loss.item()
        for key, value in _summary_as_floats(diagnostics.totals()).items():
            self._metrics["eval"].pop(key, None)  # DPOTrainer's, an average over the batches
            output.metrics[f"{metric_key_prefix}_{key}"] = value
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `DPOTrainer` does, with the summary of all pairs since the last log in place of averages."""
        # An evaluation with the prefix "train" has a "train_loss", too, but only the end of a training "total_flos".
        is_training_log = not logs.keys().isdisjoint(("loss", "total_flos"))
        in_training_mode = self.model.training
        if in_training_mode and not is_training_log:
            # These are values of a callback. It may run on one process only, so nothing is gathered for them.
            super(DPOTrainer, self).log(logs, start_time)
            return
        if is_training_log and self._totals:
            group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
            self._metrics["train"] |= {
                key: [value] for key, value in _summary_as_floats(self._totals.reduced(group)).items()
            }
            self._totals = Totals.none()
        # DPOTrainer logs the metrics of the mode that the model is in, and an evaluation leaves it in evaluation mode.
        follows_evaluation = is_training_log and not in_training_mode
        if follows_evaluation:
            self.model.train()
        super().log(logs, start_time)
        if follows_evaluation:
            self.model.eval()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.window is not None and self.args.should_save:
            torch.save(self.window.state_dict(), Path(output_dir) / _WINDOW_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.window is not None and checkpoint is not None and (Path(checkpoint) / _WINDOW_FILE).exists():
            state = torch.load(Path(checkpoint) / _WINDOW_FILE, map_location="cpu", weights_only=True)
            self.window.load_state_dict(state)

    def create_model_card(self, *arguments: Any, **options: Any) -> None:
        """Write the model card of `DPOTrainer`, and say in it which loss the model was trained with."""
        super().create_model_card(*arguments, **options)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            text, marker = card.read_text(encoding="utf-8"), "### Framework versions"
            card.write_text(text.replace(marker, f"{self._loss_for_model_card()}\n{marker}", 1), encoding="utf-8")

    def _loss_for_model_card(self) -> str:
        args = self.args
        margin = f"column {args.margin_column}" if args.margin_column is not None else args.margin
        scores = "the scores of a micro-batch" if self.window is None else f"the latest {args.statistics_window} scores"
        lines = {
            "amapo-loss": __version__,
            "beta": args.beta,
            "label smoothing": args.label_smoothing,
            "margin": margin,
            "log-probs": "averages" if args.length_average else "sums",
            "reference model": "none" if args.reference_free else "yes",
        }
        if isinstance(margin, AdaptiveMargin):
            lines["statistics over"] = f"{scores} on all processes"
        if args.weight_column is not None:
            lines["weights"] = f"column {args.weight_column}"
        if args.sft_weight:
            lines["weight of the SFT loss"] = args.sft_weight
        return "### Loss\n\n" + "".join(f"- {name}: {value}\n" for name, value in lines.items())


def _main() -> None:
    """Run TRL's script for DPO with this trainer and its configuration."""
    import trl
    from trl.scripts import dpo

    # The classes of this file belong to __main__ here, and a checkpoint with them could not be loaded elsewhere.
    from amapo_loss.trl import AMaPOConfig, AMaPOTrainer

    with patch.multiple(trl, DPOConfig=AMaPOConfig, DPOTrainer=AMaPOTrainer):
        parser = dpo.make_parser(prog="python -m amapo_loss.trl")
        dpo.main(*parser.parse_args_and_config())


if __name__ == "__main__":
    _main()
