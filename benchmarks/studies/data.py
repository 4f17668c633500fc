"""Preference data: generated with a known difficulty, or from files, TRL's and RM-Bench's. Knows text, not tensors."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

KEYS = ("prompt", "chosen", "rejected")
STYLES = ("concise", "plain", "markdown")


class Pair(NamedTuple):
    """A prompt with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str
    confidence: float | None = None
    """How sure the judge was, from 0 to 1. Of a generated pair: how often the demonstrator is right on its like."""
    source: str = ""
    """Where the file says that the prompt is from. Of a generated pair: its difficulty, a key of `SLIP_RATES`."""


class Styled(NamedTuple):
    """A prompt with a better and a worse answer in each of the three `STYLES`, as RM-Bench has them."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]


class Corpus(NamedTuple):
    """What an experiment needs: answers to imitate first, then pairs to learn a preference from, then unseen ones."""

    demonstrations: list[tuple[str, str]]  # prompt, answer
    train: list[Pair]
    validation: list[Pair]  # to tune on
    held_out: list[Pair]
    styled: dict[str, list[Styled]]  # by name


# How often the demonstrator, whom the model imitates first, gives the answer that is rejected later: each adjective has
# a rate of its own, spread evenly between these. Imitation ranks the easy pairs right and the hard ones wrong; only the
# preference pairs can tell.
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
    """Which sound an animal makes, for animals, adjectives and places in combinations that never repeat.

    The rejected answer names the sound of another animal, always the same other one. The adjective in the prompt sets
    the difficulty, so that a model can learn from the demonstrations when the demonstrator slips. A tenth of the pairs
    is for validation; the styles are wordings that no demonstration has.
    """
    rng = random.Random(seed)
    scenes = [
        (difficulty, number, animal, place)
        for difficulty, adjectives in _ADJECTIVES.items()
        for number in range(len(adjectives))
        for animal in range(len(_ANIMALS))
        for place in _PLACES
    ]
    rng.shuffle(scenes)
    if pairs + held_out > len(scenes):
        raise ValueError(
            f"pairs + held_out must be at most {len(scenes)}, the number of scenes, got {pairs + held_out}"
        )

    def pair(difficulty: str, number: int, animal: int, place: str) -> Pair:
        adjectives, (least, most) = _ADJECTIVES[difficulty], SLIP_RATES[difficulty]
        prompt = f"{adjectives[number]} {_ANIMALS[animal]}, {place}: "
        chosen, rejected = (f"it {_SOUNDS[sound % len(_SOUNDS)]}." for sound in (animal, animal + 7))
        slips = least + (most - least) * number / (len(adjectives) - 1)
        return Pair(prompt, chosen, rejected, round(1 - slips, 6), difficulty)

    unseen = [pair(*scene) for scene in scenes[:held_out]]
    train, validation = split([pair(*scene) for scene in scenes[held_out : held_out + pairs]])
    answers = [
        (p.prompt, p.chosen if rng.random() < (p.confidence or 0) else p.rejected)
        for p in rng.choices(train, k=demonstrations)
    ]
    return Corpus(answers, train, validation, unseen, {"styles": [_in_styles(pair) for pair in unseen[:128]]})


def _in_styles(pair: Pair) -> Styled:
    def styles(answer: str) -> tuple[str, ...]:
        name = pair.prompt.partition(",")[0]
        return answer, f"the {name} there, {answer}", f"**{name}**: {answer}"

    return Styled(pair.prompt, styles(pair.chosen), styles(pair.rejected))


def file_corpus(train: Path, held_out: Path, styled: Sequence[Path] = ()) -> Corpus:
    """A user's pairs; a tenth of the training prompts is for validation, the other chosen answers are imitated."""
    pairs, validation = split(list(read_pairs(train)))
    demonstrations = [(pair.prompt, pair.chosen) for pair in pairs]
    rm_bench = {path.name.partition(".")[0]: read_styled(path) for path in styled}
    return Corpus(demonstrations, pairs, validation, list(read_pairs(held_out)), rm_bench)


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """All pairs of nine prompts in ten, and those of the tenth."""
    prompts = sorted({pair.prompt for pair in pairs})
    if len(prompts) < 2:
        raise ValueError("the training pairs need two different prompts or more, one of them for validation, got one")
    random.Random(0).shuffle(prompts)
    tenth = set(prompts[: -(-len(prompts) // 10)])
    validation = [pair for pair in pairs if pair.prompt in tenth]
    return [pair for pair in pairs if pair.prompt not in tenth], validation


def both_answers(pairs: list[Pair]) -> list[tuple[str, str]]:
    """Prompts with the chosen answers, then prompts with the rejected ones."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file of JSON lines with the strings `prompt`, `chosen` and `rejected`, gzipped if it ends in .gz.

    `confidence`, a number from 0 to 1, and the string `source` are read where they are there.

    Raises:
        ValueError: naming the file and the line, for a line that is no such object, an empty answer, or an empty file.
    """
    number = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                yield _pair(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} after line {number}: {error}") from error
    if number == 0:
        raise ValueError(f"{path}: the file is empty, expected a preference pair a line")


def read_styled(path: Path) -> list[Styled]:
    """RM-Bench: a JSON list of objects with `prompt` and three answers each in `chosen` and `rejected`.

    Raises:
        ValueError: naming the file and the entry, for what is no such list.
    """
    try:
        with _open(path) as file:
            records = _parse(file.read(), str(path))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a JSON list of RM-Bench entries, got {type(records).__name__}")
    return [_styled(record, f"{path}, entry {number}") for number, record in enumerate(records, start=1)]


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{place}: not valid JSON ({error})") from error


def _has_keys(record: Any, place: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object with {', '.join(KEYS)}, got {type(record).__name__}")
    for key in KEYS:
        if key not in record:
            raise ValueError(f"{place}: the key {key!r} is missing, found {', '.join(map(repr, record)) or 'none'}")


def _pair(record: Any, place: str) -> Pair:
    _has_keys(record, place)
    for key in KEYS:
        if not isinstance(record[key], str):
            raise ValueError(f"{place}: {key!r} must be a string, got {type(record[key]).__name__}")
        if key != "prompt" and not record[key]:
            raise ValueError(f"{place}: the answer {key!r} is empty")
    confidence = record.get("confidence")
    number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
    if confidence is not None and not (number and 0 <= confidence <= 1):
        raise ValueError(f"{place}: 'confidence' must be a number from 0 to 1, got {confidence!r}")
    source = record.get("source")
    named = source if isinstance(source, str) else ""  # other tools keep other things under this name
    return Pair(record["prompt"], record["chosen"], record["rejected"], confidence, named)


def _styled(record: Any, place: str) -> Styled:
    _has_keys(record, place)
    if not isinstance(record["prompt"], str):
        raise ValueError(f"{place}: 'prompt' must be a string, got {type(record['prompt']).__name__}")
    for key in KEYS[1:]:
        answers = record[key]
        if not (isinstance(answers, list) and len(answers) == len(STYLES) and all(map(_is_text, answers))):
            raise ValueError(f"{place}: {key!r} must be {len(STYLES)} answers, {', '.join(STYLES)}, none of them empty")
    return Styled(record["prompt"], tuple(record["chosen"]), tuple(record["rejected"]))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
