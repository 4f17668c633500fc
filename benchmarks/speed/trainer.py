"""Compare a training step of AMaPOTrainer with one of TRL's DPOTrainer, on the same model and the same pairs.

    python -m benchmarks.speed.trainer

DPOTrainer uses precomputed reference log-probs, so neither trainer runs a reference model. The trainers take turns with
short runs, so that a slowdown of the machine affects all of them. The first steps of each run are discarded. Each time
is divided by DPOTrainer's time of the same round, and the table shows the median ratio over the rounds. The script also
writes JSON.
"""

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from datasets.utils import disable_progress_bars
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer

from amapo_loss.trl import AMaPOConfig, AMaPOTrainer
from benchmarks.record import RESULTS, version_of, write_json
from benchmarks.speed.memory import peak_bytes

WARM_UP_STEPS = 2

# The config class, the trainer class and the config options of every trainer. The first is the baseline.
TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "DPOTrainer, precomputed reference": (DPOConfig, DPOTrainer, {"precompute_ref_log_probs": True}),
    "AMaPOTrainer": (AMaPOConfig, AMaPOTrainer, {}),
    "AMaPOTrainer, window of 128 scores": (AMaPOConfig, AMaPOTrainer, {"statistics_window": 128}),
}


def byte_tokenizer() -> Any:
    """Return a tokenizer with one token per byte, a padding token and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def llama(vocab_size: int, hidden_size: int, num_layers: int, seed: int = 0) -> Any:
    """Return a Llama model with random weights."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size // 2,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


class StepTimer(transformers.TrainerCallback):
    """Record the seconds of each training step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock once the device has finished the step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def generate_pairs(n: int) -> Any:
    """Return n pairs with prompts of 64 bytes, chosen answers of 64 and rejected answers of 60."""
    pairs = [{"prompt": f"{i:064d}", "chosen": f"{7 * i:064d}", "rejected": f"{11 * i:060d}"} for i in range(n)]
    return Dataset.from_list(pairs)


def make_trainer(
    name: str, folder: str, steps: int, batch_size: int, make_model: Callable[[], Any]
) -> tuple[Any, StepTimer]:
    """Return a trainer that is ready to train, and the timer of its steps."""
    config_class, trainer_class, options = TRAINERS[name]
    on_gpu = torch.cuda.is_available()
    config = config_class(
        folder,
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        logging_steps=1,
        report_to="none",
        use_cpu=not on_gpu,
        bf16=on_gpu,
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=1e-6,
        **options,
    )
    timer = StepTimer()
    trainer = trainer_class(
        make_model(),
        args=config,
        train_dataset=generate_pairs(steps * batch_size),
        processing_class=byte_tokenizer(),
        callbacks=[timer],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, timer


def main() -> None:
    """Time the trainers in alternating runs, then measure the memory of each in a run of one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--rounds", type=int, default=8, help="runs of each trainer")
    parser.add_argument("--steps", type=int, default=6, help="training steps in each run")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in each step")
    parser.add_argument("--vocabulary", type=int, default=8192, help="vocabulary size of the model")
    parser.add_argument("--width", type=int, default=256, help="hidden size of the model")
    parser.add_argument("--layers", type=int, default=4, help="number of layers of the model")
    parser.add_argument("--out", type=Path, default=RESULTS / f"trainer_{device}.json", help="JSON file to write")
    args = parser.parse_args()
    if args.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be above {WARM_UP_STEPS}, the number of steps that are not timed, got {args.steps}")
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")  # the warnings of TRL and transformers would hide the table
    transformers.logging.set_verbosity_error()
    disable_progress_bars()

    seconds: dict[str, list[float]] = {name: [] for name in TRAINERS}
    with tempfile.TemporaryDirectory() as folder:
        prepare = partial(
            make_trainer,
            folder=folder,
            steps=args.steps,
            batch_size=args.batch_size,
            make_model=partial(llama, args.vocabulary, args.width, args.layers),
        )
        for _ in track(range(args.rounds), "timing"):
            for name in TRAINERS:
                trainer, timer = prepare(name)
                trainer.train()
                seconds[name].append(statistics.median(timer.seconds[WARM_UP_STEPS:]))
        memory = {}
        for name in TRAINERS:
            trainer, _ = prepare(name, steps=1)
            memory[name] = peak_bytes(trainer.train, device)

    baseline_seconds = seconds[next(iter(TRAINERS))]
    rows: list[dict[str, Any]] = [
        {
            "trainer": name,
            "ms": statistics.median(seconds[name]) * 1e3,
            "ratio": statistics.median(own / baseline for own, baseline in zip(seconds[name], baseline_seconds)),
            "peak_mb": memory[name] / 2**20,
        }
        for name in TRAINERS
    ]
    table = Table(title="One training step (ratio: time relative to the first row)", box=SIMPLE)
    table.add_column("trainer", no_wrap=True)
    for heading in ("ms", "ratio", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["trainer"], f"{row['ms']:,.0f}", f"{row['ratio']:.2f}", f"{row['peak_mb']:,.0f}")
    console = Console()
    console.print(table)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    packages = {package: version_of(package) for package in ("trl", "transformers", "accelerate")}
    write_json(args.out, "benchmarks.speed.trainer", {"settings": settings, "packages": packages, "rows": rows})
    console.print(f"wrote {args.out.name} in {args.out.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
