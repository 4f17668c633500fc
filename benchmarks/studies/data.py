"""Preference pairs for the studies: generated with a known difficulty, or read from preference and RM-Bench files.

Depends only on the standard library.
"""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
KEYS = ("prompt", "chosen", "rejected")
STYLES = ("concise", "plain", "markdown")


class Pair(NamedTuple):
    """A prompt with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str
    confidence: float | None = None
    """The judge's confidence that `chosen` is better, from 0 to 1; None if the file does not say.

    For a generated pair, it is the probability that the demonstrator gives the chosen answer.
    """
    source: str = ""
    """The data set that the prompt comes from; empty if the file does not say.

    For a generated pair, it is the difficulty, a key of `SLIP_RATES`.
    """


class StyledPair(NamedTuple):
    """A prompt with a better and a worse answer, each written in the three `STYLES` of RM-Bench."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


class Corpus(NamedTuple):
    """All texts of an experiment."""

    demonstrations: list[tuple[str, str]]  # (prompt, answer) texts for imitation, the first phase of training
    train: list[Pair]  # for preference training, the second phase
    validation: list[Pair]  # for the choice of hyperparameters
    held_out: list[Pair]  # for the evaluation
    styled: dict[str, list[StyledPair]]  # for the evaluation by style, keyed by the name of the file
    further: dict[str, list[Pair]]  # for the evaluation on other tasks, keyed by the name of the file


# The model first imitates a demonstrator, who sometimes slips: the demonstrator then gives the answer that the
# preference pairs reject. Each adjective has its own slip rate. The rates of a difficulty are spread evenly between the
# two bounds given here. After imitation, the model therefore ranks most easy pairs correctly and most hard pairs
# wrongly. Only preference training can correct that.
SLIP_RATES = {"easy": (0.0, 0.2), "even": (0.4, 0.6), "hard": (0.8, 1.0)}

_ADJECTIVES = {
    "easy": [
        "calm",
        "young",
        "quiet",
        "gentle",
        "happy",
        "small",
        "brave",
        "early",
        "grey",
        "tired",
        "hungry",
        "lonely",
    ],
    "even": ["silent", "wet", "dusty", "pale", "warm", "round"],
    "hard": ["old", "fierce", "strange", "hidden", "frozen", "giant"],
}
_ANIMALS = [
    "wolf",
    "cat",
    "dog",
    "lion",
    "frog",
    "owl",
    "crow",
    "duck",
    "horse",
    "sheep",
    "pig",
    "cow",
    "bee",
    "snake",
    "mouse",
    "goat",
    "bear",
    "hen",
    "dove",
    "seal",
]
_SOUNDS = [
    "howls",
    "purrs",
    "barks",
    "roars",
    "croaks",
    "hoots",
    "caws",
    "quacks",
    "neighs",
    "baas",
    "grunts",
    "moos",
    "buzzes",
    "hisses",
    "squeaks",
    "bleats",
    "growls",
    "clucks",
    "coos",
    "yelps",
]
_PLACES = ["barn", "hill", "river", "road", "gate", "wood", "mill", "bridge", "tower", "shore", "field", "well"]


def generated_corpus(pairs: int, held_out: int, demonstrations: int, seed: int) -> Corpus:
    """Generate pairs about the sounds of animals.

    A prompt names an animal with an adjective and a place, and no such scene occurs twice. The chosen answer is the
    sound of that animal. The rejected answer is the sound of another animal, and it is always the same other animal
    for a given animal. The adjective sets the difficulty, so a model can learn from the demonstrations how often the
    demonstrator slips. The styled answers are wordings that no demonstration contains.

    Args:
        pairs: number of pairs for training and validation together. A tenth of them is for validation.
        held_out: number of pairs for the evaluation.
        demonstrations: number of texts to imitate, drawn with replacement from the training prompts.
        seed: seed of the random generator.

    Raises:
        ValueError: if `pairs + held_out` is larger than the number of scenes.
    """
    rng = random.Random(seed)
    scenes = [
        (difficulty, adjective, animal, place)
        for difficulty, adjectives in _ADJECTIVES.items()
        for adjective in range(len(adjectives))
        for animal in range(len(_ANIMALS))
        for place in _PLACES
    ]
    rng.shuffle(scenes)
    if pairs + held_out > len(scenes):
        raise ValueError(
            f"pairs + held_out must be at most {len(scenes)}, the number of scenes, got {pairs + held_out}"
        )

    held_out_pairs = [_generated_pair(*scene) for scene in scenes[:held_out]]
    train, validation = split_off_validation([_generated_pair(*scene) for scene in scenes[held_out : held_out + pairs]])
    demonstrated = [
        (pair.prompt, pair.chosen if rng.random() < (pair.confidence or 0) else pair.rejected)
        for pair in rng.choices(train, k=demonstrations)
    ]
    styled = {"styles": [_in_styles(pair) for pair in held_out_pairs[:128]]}
    return Corpus(demonstrated, train, validation, held_out_pairs, styled, further={})


def _generated_pair(difficulty: str, adjective: int, animal: int, place: str) -> Pair:
    adjectives, (lowest, highest) = _ADJECTIVES[difficulty], SLIP_RATES[difficulty]
    prompt = f"{adjectives[adjective]} {_ANIMALS[animal]}, {place}: "
    chosen, rejected = (f"it {_SOUNDS[sound % len(_SOUNDS)]}." for sound in (animal, animal + 7))
    slip_rate = lowest + (highest - lowest) * adjective / (len(adjectives) - 1)
    return Pair(prompt, chosen, rejected, round(1 - slip_rate, 6), difficulty)


def _in_styles(pair: Pair) -> StyledPair:
    subject = pair.prompt.partition(",")[0]

    def styles(answer: str) -> tuple[str, ...]:
        return answer, f"the {subject} there, {answer}", f"**{subject}**: {answer}"

    return StyledPair(pair.prompt, styles(pair.chosen), styles(pair.rejected))


def file_corpus(
    train: Path,
    held_out: Path,
    styled: Sequence[Path] = (),
    further: Sequence[Path] = (),
    train_pairs: int | None = None,
    eval_pairs: int | None = None,
    styled_entries: int | None = None,
) -> Corpus:
    """Read a corpus from files.

    A tenth of the training prompts is for validation. The chosen answers of the other training prompts are also the
    demonstrations.

    Args:
        train: preference file for training and validation, see `read_pairs`.
        held_out: preference file for the evaluation.
        styled: RM-Bench files for the evaluation by style, see `read_rm_bench`.
        further: other preference files for the evaluation.
        train_pairs: largest number of training pairs, see `sample`; None keeps all. All demonstrations are kept.
        eval_pairs: the same for the validation pairs, for `held_out` and for each file of `further`.
        styled_entries: the same for the entries of each file of `styled`.
    """
    train_part, validation = split_off_validation(list(read_pairs(train)))
    return Corpus(
        demonstrations=[(pair.prompt, pair.chosen) for pair in train_part],
        train=sample(train_part, train_pairs),
        validation=sample(validation, eval_pairs),
        held_out=sample(list(read_pairs(held_out)), eval_pairs),
        styled={name_of(path): sample(read_rm_bench(path), styled_entries) for path in styled},
        further={name_of(path): sample(list(read_pairs(path)), eval_pairs) for path in further},
    )


def name_of(path: Path) -> str:
    """Return the name of a file without its extensions, as it stands in tables."""
    return path.name.partition(".")[0]


def sample(items: list[T], count: int | None) -> list[T]:
    """Return `count` of the items, drawn once and for all, in their order; all of them if there are no more."""
    if count is None or len(items) <= count:
        return items
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), count))]


def split_off_validation(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs of nine tenths of the prompts, for training, and those of the other tenth, for validation.

    The split is by prompt, so that no validation prompt is seen in training.
    """
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise ValueError(
            f"the training pairs need at least two different prompts, one of them for validation, got {len(prompts)}"
        )
    random.Random(0).shuffle(prompts)
    tenth = -(-len(prompts) // 10)
    validation_prompts = set(prompts[:tenth])
    train = [pair for pair in pairs if pair.prompt not in validation_prompts]
    return train, [pair for pair in pairs if pair.prompt in validation_prompts]


def count_trained_prompts(corpus: Corpus, with_imitation: bool) -> dict[str, int]:
    """Return how many entries of each group of the evaluation have a prompt that the model is also trained on.

    Args:
        corpus: the pairs.
        with_imitation: whether the model is trained on the demonstrations, too.
    """
    trained = {pair.prompt for pair in corpus.train}
    if with_imitation:
        trained |= {prompt for prompt, _ in corpus.demonstrations}
    groups: dict[str, Sequence[Pair | StyledPair]] = {"held out": corpus.held_out, **corpus.further, **corpus.styled}
    return {name: sum(entry.prompt in trained for entry in entries) for name, entries in groups.items()}


def both_answers(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Return (prompt, chosen) of all pairs, followed by (prompt, rejected) of all pairs."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def read_pairs(path: Path) -> Iterator[Pair]:
    """Read preference pairs from a file of JSON lines, which is gzipped if its name ends in .gz.

    Each line is an object with the strings `prompt`, `chosen` and `rejected`. It may also have `confidence`, a number
    from 0 to 1, and `source`, a string.

    Raises:
        ValueError: if a line is not such an object, if an answer is empty, or if the file is empty. The message names
            the file and the line.
    """
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                location = f"{path}, line {number}"
                yield _parse_pair(_parse_json(line, location), location)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} after line {number}: {error}") from error
    if number == 0:
        raise ValueError(f"{path}: the file is empty, expected one preference pair per line")


def read_rm_bench(path: Path) -> list[StyledPair]:
    """Read an RM-Bench file, which is gzipped if its name ends in .gz.

    The file is a JSON list of objects with `prompt` and with three answers each in `chosen` and `rejected`, in the
    order of `STYLES`.

    Raises:
        ValueError: if the file is not such a list. The message names the file and the entry.
    """
    try:
        with _open(path) as file:
            records = _parse_json(file.read(), str(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list of RM-Bench entries, got {type(records).__name__}")
    if not records:
        raise ValueError(f"{path}: expected a JSON list of RM-Bench entries, got an empty list")
    return [_parse_styled_pair(record, f"{path}, entry {number}") for number, record in enumerate(records, start=1)]


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse_json(text: bytes, location: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # the bytes are not valid UTF-8, or the text is not valid JSON
        raise ValueError(f"{location}: not valid JSON ({error})") from error


def _check_keys(record: Any, location: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{location}: expected a JSON object with {', '.join(KEYS)}, got {type(record).__name__}")
    for key in KEYS:
        if key not in record:
            raise ValueError(f"{location}: the key {key!r} is missing, found {', '.join(map(repr, record)) or 'none'}")


def _parse_pair(record: Any, location: str) -> Pair:
    _check_keys(record, location)
    for key in KEYS:
        if not isinstance(record[key], str):
            raise ValueError(f"{location}: {key!r} must be a string, got {type(record[key]).__name__}")
        if key != "prompt" and not record[key]:
            raise ValueError(f"{location}: the answer {key!r} is empty")
    confidence = record.get("confidence")
    is_number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
    if confidence is not None and not (is_number and 0 <= confidence <= 1):
        raise ValueError(f"{location}: 'confidence' must be a number from 0 to 1, got {confidence!r}")
    source = record.get("source")
    # Other tools store numbers or objects under this key. An error here would reject their otherwise valid files.
    source_name = source if isinstance(source, str) else ""
    return Pair(record["prompt"], record["chosen"], record["rejected"], confidence, source_name)


def _parse_styled_pair(record: Any, location: str) -> StyledPair:
    _check_keys(record, location)
    if not isinstance(record["prompt"], str):
        raise ValueError(f"{location}: 'prompt' must be a string, got {type(record['prompt']).__name__}")
    for key in ("chosen", "rejected"):
        answers = record[key]
        if not (isinstance(answers, list) and len(answers) == len(STYLES) and all(map(_is_nonempty_text, answers))):
            raise ValueError(
                f"{location}: {key!r} must be a list of {len(STYLES)} non-empty answers ({', '.join(STYLES)})"
            )
    return StyledPair(record["prompt"], tuple(record["chosen"]), tuple(record["rejected"]))


def _is_nonempty_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
