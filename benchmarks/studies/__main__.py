"""Run the paper's experiments on generated pairs or on your own, and report the results.

    python -m benchmarks.studies ranking
    python -m benchmarks.studies ranking --data train.jsonl.gz --eval test.jsonl.gz --rm-bench rm_bench_chat.json.gz
    python -m benchmarks.studies ranking --data a.jsonl.gz --eval b.jsonl.gz --model directory --learning-rate 1e-4 3e-4
    python -m benchmarks.studies ranking ablation --data a.jsonl.gz --eval b.jsonl.gz
    python -m benchmarks.studies all --scale gpu --data train.jsonl.gz --eval test.jsonl.gz

Each study prints a table, writes a JSON file with the table and with every run, and draws a picture. If a study is
interrupted, the same command continues it. With `--redraw`, the command rebuilds table and picture from the JSON file
without running anything. With RESULTS=benchmarks/results in the environment, that is the committed file.
"""

import argparse
import json
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

from benchmarks.record import RESULTS, write_json, write_picture, write_record
from benchmarks.studies.data import count_trained_prompts, name_of
from benchmarks.studies.evaluation import BANDS, indices_by_source, indices_in_band
from benchmarks.studies.jobs import Settings, load, new_model
from benchmarks.studies.report import draw_tuning, print_table, print_tuning, tabulate
from benchmarks.studies.studies import STUDIES, draw_accuracy
from benchmarks.studies.sweep import Run, Workers, available_cores, start_workers, sweep

matplotlib.use("Agg")  # draws without a display, which servers do not have
import matplotlib.pyplot as plt

DEFAULTS: dict[str, Any] = {
    "learning_rate": [3e-4],
    "imitation_steps": 0,
    "imitation_learning_rate": 2e-3,
    "generated": 4096,
    "width": 0,  # the size of the built-in model is 0 with --model
    "layers": 0,
    "trained_blocks": 0,
    "train_pairs": None,
    "eval_pairs": None,
    "rm_bench_entries": None,
}
SCALES: dict[str, dict[str, Any]] = {  # these values replace those of DEFAULTS or add to them
    "smoke": {  # takes seconds, to check that the files and the model work
        "width": 16,
        "layers": 1,
        "max_prompt": 32,
        "max_answer": 24,
        "imitation_steps": 8,
        "steps": 4,
        "batch_size": 16,
        "probe_every": 2,
        "generated": 512,
        "seeds": 2,
    },
    "small": {  # takes minutes on two cores, for generated pairs
        "width": 64,
        "layers": 2,
        "max_prompt": 32,
        "max_answer": 32,
        "imitation_steps": 600,
        "steps": 24,
        "batch_size": 64,
        "probe_every": 4,
        "seeds": 5,
    },
    "medium": {  # takes an hour on two cores, for real pairs
        "width": 64,
        "layers": 2,
        "max_prompt": 32,
        "max_answer": 128,
        "imitation_steps": 300,
        "steps": 64,
        "batch_size": 64,
        "learning_rate": [1e-3],
        "probe_every": 8,
        "seeds": 3,
    },
    "pretrained": {  # takes hours on two cores, for real pairs and the model of `make pretrained`
        "max_prompt": 80,
        "max_answer": 128,
        "steps": 24,
        "batch_size": 32,
        "trained_blocks": 2,
        "train_pairs": 768,
        "eval_pairs": 400,
        "rm_bench_entries": 72,
        "probe_every": 8,
        "seeds": 3,
    },
    "sizes": {  # for the comparison of models of different sizes with "pretrained"
        "width": 64,
        "layers": 2,
        "max_prompt": 32,
        "max_answer": 128,
        "imitation_steps": 300,
        "steps": 24,
        "batch_size": 32,
        "learning_rate": [3e-4],
        "train_pairs": 768,
        "eval_pairs": 400,
        "probe_every": 8,
        "seeds": 3,
    },
    "gpu": {  # trains 17 million parameters from scratch, with the batch size of the paper
        "width": 512,
        "layers": 8,
        "max_prompt": 256,
        "max_answer": 1024,
        "imitation_steps": 2000,
        "steps": 250,
        "batch_size": 128,
        "learning_rate": [1e-4],
        "imitation_learning_rate": 5e-4,
        "probe_every": 25,
        "seeds": 5,
    },
}
TUNING = "tuning of the learning rates on the validation pairs"  # a key of the JSON of a study
GROUPS = ("train", "validation", "held out")
RESERVED_NAMES = ("demonstrations", *GROUPS)  # a file of this name would take the place of other texts
OVERRIDES = {  # options that replace a value of the scale: their type and help
    "steps": (int, "steps of preference training"),
    "batch_size": (int, "pairs per step of preference training, and texts per step of imitation"),
    "imitation_steps": (int, "steps of supervised fine-tuning before preference training; 0 by default with --model"),
    "imitation_learning_rate": (float, "learning rate of the imitation steps"),
    "max_prompt": (int, "tokens kept from the end of a prompt; the built-in model's tokens are bytes"),
    "max_answer": (int, "tokens kept from the start of an answer"),
    "width": (int, "hidden size of the built-in model"),
    "layers": (int, "number of layers of the built-in model"),
    "trained_blocks": (int, "train only so many blocks of --model, counted from the last one; 0 trains all weights"),
    "train_pairs": (int, "largest number of training pairs"),
    "eval_pairs": (int, "largest number of validation pairs, and of pairs of --eval and of each file of --also-eval"),
    "rm_bench_entries": (int, "largest number of entries of each file of --rm-bench"),
    "seeds": (int, "number of seeds; each seed has its own checkpoint and its own order of the pairs"),
}


def parse_args(arguments: list[str] | None = None) -> tuple[argparse.Namespace, Settings, int]:
    """Return the arguments, the settings of all runs, and the number of seeds."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "studies", nargs="+", metavar="study", choices=[*STUDIES, "all"], help=f"{', '.join(STUDIES)}, or all of them"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="training pairs: a file of JSON lines with prompt, chosen and rejected, gzipped or not "
        "(default: generated pairs)",
    )
    parser.add_argument("--eval", type=Path, help="held-out pairs, in the format of --data")
    parser.add_argument("--rm-bench", type=Path, nargs="+", default=[], help="RM-Bench files to evaluate on as well")
    parser.add_argument(
        "--also-eval",
        type=Path,
        nargs="+",
        default=[],
        help="other files in the format of --data to evaluate on as well",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="directory of a Hugging Face causal language model. It is the checkpoint that preference training starts "
        "from, unless --imitation-steps is given. It needs --learning-rate. (default: a small byte model)",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        help="size of the experiment (default: pretrained with --model, else medium with --data, else small)",
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        nargs="+",
        help="learning rate of preference training (default: given by --scale). With several, each loss gets the one "
        "with the highest accuracy on the validation pairs after one run",
    )
    parser.add_argument("--only-tune", action="store_true", help="stop after the tuning of --learning-rate")
    parser.add_argument(
        "--treatments",
        nargs="+",
        metavar="NAME",
        help="run only these treatments, by their names in the study's table; the picture is then a plain one of their "
        "accuracies (default: all)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="dtype of the matrix products of --model; weights and sums stay in float32 (default: bfloat16 where the "
        "device multiplies it fast, else float32)",
    )
    for name, (value_type, description) in OVERRIDES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=value_type, help=f"{description} (default: given by --scale)"
        )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the models (default: cuda if available, else cpu)",
    )
    parser.add_argument("--jobs", type=int, help="number of processes (default: one per core, or one on a GPU)")
    parser.add_argument(
        "--store", type=Path, default=Path("build/studies"), help="folder of the finished runs (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON files and pictures (default: build/results/studies, or "
        "studies_own with --data, or studies_pretrained with --model)",
    )
    parser.add_argument(
        "--redraw", action="store_true", help="run nothing, and only rebuild table and picture from the JSON file"
    )
    args = parser.parse_args(arguments)
    if "all" in args.studies:
        args.studies = list(STUDIES)
    if (args.data is None) != (args.eval is None):
        parser.error("--data and --eval must be given together")
    if (args.rm_bench or args.also_eval) and not args.data:
        parser.error(
            "--rm-bench and --also-eval need --data and --eval: a model of generated pairs has not learned natural "
            "language"
        )
    if args.model and args.learning_rate is None and not args.redraw:
        parser.error("--model needs --learning-rate: the default is far too large for a pretrained model")
    if args.only_tune and len(args.learning_rate or ()) < 2:
        parser.error("--only-tune needs two or more values of --learning-rate")
    if args.model and (args.width or args.layers):
        parser.error("--width and --layers set the size of the built-in model and cannot be combined with --model")
    if args.trained_blocks and not args.model:
        parser.error("--trained-blocks needs --model")
    if args.scale == "pretrained" and not args.model:
        parser.error("--scale pretrained needs --model")
    if args.dtype and not args.model:
        parser.error("--dtype needs --model: the built-in model computes in float32")
    if (args.train_pairs or args.eval_pairs) and not args.data:
        parser.error("--train-pairs and --eval-pairs need --data and --eval")
    for name in args.studies:
        if args.data or not STUDIES[name].generated_settings:
            continue
        if args.model:
            parser.error(f"the generated pairs of {name} need the built-in model; with --model, give --data and --eval")
        if args.max_prompt or args.max_answer:
            parser.error(f"--max-prompt and --max-answer cannot be set for the generated pairs of {name}")
    for name in args.studies:
        if unknown := {*(args.treatments or ())} - {*STUDIES[name].treatments}:
            known = ", ".join(map(repr, STUDIES[name].treatments))
            parser.error(f"--treatments has {sorted(unknown)[0]!r}, but the treatments of {name} are {known}")
    names = [*RESERVED_NAMES, *map(name_of, [*args.rm_bench, *args.also_eval])]
    if repeated := [name for name in names if names.count(name) > 1]:
        parser.error(f"no file of --rm-bench and --also-eval can be called {repeated[0]}: this name is already taken")

    values = DEFAULTS | SCALES[args.scale or ("pretrained" if args.model else "medium" if args.data else "small")]
    if args.model:
        values |= {"imitation_steps": 0, "width": 0, "layers": 0}
    options = (*OVERRIDES, "learning_rate")
    values |= {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    may_be_zero = {"imitation_steps", "trained_blocks"} | ({"width", "layers"} if args.model else set())
    for name, (value_type, _) in OVERRIDES.items():
        smallest = 0 if name in may_be_zero else 1
        if value_type is int and values[name] is not None and values[name] < smallest:
            parser.error(f"--{name.replace('_', '-')} must be at least {smallest}, got {values[name]}")
    args.learning_rates = values["learning_rate"]
    values["learning_rate"] = args.learning_rates[0]
    seeds = values.pop("seeds")
    settings = Settings(
        data=args.data,
        eval=args.eval,
        rm_bench=tuple(args.rm_bench),
        also_eval=tuple(args.also_eval),
        task=None if args.data else "sounds",
        model=args.model,
        dtype=(args.dtype or fast_dtype(args.device)) if args.model else "float32",
        **values,
    )
    args.out = args.out or RESULTS / f"studies{'_pretrained' if args.model else '_own' if args.data else ''}"
    args.jobs = args.jobs or (1 if args.device.startswith("cuda") else available_cores())
    return args, settings, seeds


def fast_dtype(device: str) -> str:
    """Return "bfloat16" if the device has instructions for its matrix products, else "float32"."""
    if device == "cpu":
        return "bfloat16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "float32"
    return "bfloat16"


def main() -> None:
    """Run and report the studies of the command line."""
    args, settings, seeds = parse_args()
    console = Console()
    try:
        with start_workers(args.jobs) as workers:
            for name in args.studies:
                path = args.out / f"{name}.json"
                if not args.redraw:
                    run_study(console, name, settings, seeds, workers, args, path)
                report_study(console, name, path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"studies: {error}") from error
    except BrokenProcessPool as error:
        raise SystemExit(
            "studies: a process died, most likely because memory ran out; try again with a smaller --jobs"
        ) from error
    except KeyboardInterrupt as error:
        raise SystemExit(
            f"studies: interrupted; the finished runs are in {args.store}, and the same command continues from them"
        ) from error


def run_study(
    console: Console,
    name: str,
    settings: Settings,
    seeds: int,
    workers: Workers,
    args: argparse.Namespace,
    path: Path,
) -> None:
    """Perform all runs of a study and write them to its JSON file."""
    study = STUDIES[name]
    if not settings.data:
        settings = replace(settings, **study.generated_settings)
        if args.scale != "smoke":
            defaults = study.generated_defaults.items()
            settings = replace(settings, **{option: v for option, v in defaults if getattr(args, option) is None})
    selected = args.treatments or study.treatments
    treatments = {treatment: fields for treatment, fields in study.treatments.items() if treatment in selected}
    console.print(f"{name}: {study.question} {len(treatments)} treatments, {seeds} seeds")
    data = load(settings)
    for group, num_truncated in data.num_truncated.items():
        if num_truncated:
            console.print(
                f"{num_truncated} of {len(data.texts[group].tokens)} texts ({group}) are longer than "
                f"--max-prompt {settings.max_prompt} or --max-answer {settings.max_answer} and are truncated"
            )
    trained_prompts = count_trained_prompts(data.corpus, settings.imitation_steps > 0)
    for group, count in trained_prompts.items():
        if count:
            console.print(
                f"{count} entries of the evaluation ({group}) have a prompt that is trained on, with other answers"
            )
    result = sweep(settings, treatments, seeds, workers, args.store, args.device, args.learning_rates, args.only_tune)
    runs = result.runs if study.needs_curves else [run.without_curves() for run in result.runs]
    record = {
        "asks": study.question,
        "settings": {option: as_json(value) for option, value in asdict(settings).items()},
        "parameters": count_parameters(settings),
        "pairs": {group: len(data.texts[group].tokens) // 2 for group in GROUPS if group in data.texts},
        "problems": {group: len(prompts) for group, prompts in data.problems.items()},
        "held-out pairs by confidence": {
            band: len(indices_in_band(data.corpus.held_out, bounds)) for band, bounds in BANDS.items()
        },
        "held-out pairs by source": {
            source: len(indices) for source, indices in indices_by_source(data.corpus.held_out).items()
        },
        "prompts of the held-out pairs": numbered([pair.prompt for pair in data.corpus.held_out]),
        "texts cut": data.num_truncated,
        "entries of the evaluation with a prompt of training": trained_prompts,
        "treatments": {treatment: asdict(fields) for treatment, fields in result.treatments.items()},
        TUNING: result.tuning,
        "runs": [run.to_json() for run in runs],
    }
    write_json(path, "benchmarks.studies", record)


def count_parameters(settings: Settings) -> int:
    """Return the number of parameters of the whole model, trained or frozen, without loading its weights."""
    if settings.model is None:
        return sum(parameter.numel() for parameter in new_model(settings, 0, "meta").parameters())
    from transformers import AutoConfig, AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM  # Transformers has no types for `from_config`
    with torch.device("meta"):
        model = auto_model.from_config(AutoConfig.from_pretrained(settings.model, local_files_only=True))
    return int(model.num_parameters())


def numbered(prompts: list[str]) -> list[int]:
    """Return a number for each prompt, the same for equal ones, in the order of their first appearance."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return [numbers[prompt] for prompt in prompts]


def as_json(value: Any) -> Any:
    """Return the value of a setting as it stands in JSON."""
    if isinstance(value, tuple):
        return [str(path) for path in value]
    return str(value) if isinstance(value, Path) else value


def report_study(console: Console, name: str, path: Path) -> None:
    """Print the table of a study, add it to the study's JSON file, and draw the pictures next to this file.

    There is another table and another picture if the learning rates were tuned.
    """
    study, record = STUDIES[name], json.loads(path.read_text())
    runs = [Run.from_json(entry) for entry in record.pop("runs")]
    pictures = {}
    if tuning := record.get(TUNING):  # the key is missing in files of earlier versions
        print_tuning(console, tuning)
        figure = plt.figure(figsize=(14, 4.2))
        draw_tuning(figure, tuning)
        figure.suptitle(f"Learning rates of the study {name!r}", fontsize=11)
        figure.tight_layout()
        pictures[path.with_name(f"{name}-rates.png")] = figure
    if runs:  # there are none with --only-tune
        prompts = record.get("prompts of the held-out pairs", ())  # the key is missing in files of earlier versions
        table = tabulate(runs, study.columns, study.baseline, study.other_baselines, study.compared, prompts)
        print_table(console, study.question, table)
        record["table, mean and standard deviation over the seeds"] = table
        figure = plt.figure(figsize=(11, study.picture_height))
        if {*study.treatments} <= {run.treatment for run in runs}:
            if remark := study.remark(runs):
                console.print(remark)
            study.draw(figure, runs)
        else:  # with --treatments, the study's own picture would fail
            draw_accuracy(figure, runs, study.baseline)
        figure.suptitle(study.question, fontsize=11)
        figure.tight_layout(rect=(0, study.legend_share, 1, 1))
        pictures[path.with_suffix(".png")] = figure
    record["runs"] = [run.to_json() for run in runs]  # the last key, so that the long list does not hide the table
    write_record(path, record)
    for picture_path, figure in pictures.items():
        write_picture(picture_path, figure)
        plt.close(figure)
    written = " and ".join(written.name for written in (path, *pictures))
    console.print(f"wrote {written} in {path.parent}", soft_wrap=True)


if __name__ == "__main__":
    main()
