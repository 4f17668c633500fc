"""Preference pairs: generated with a known difficulty, or from a file in TRL's format. Knows text, not tensors."""

import gzip
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KEYS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    """A prompt with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str
    difficulty: str = ""
    """For generated pairs, a key of `SLIP_RATES`."""


class Corpus(NamedTuple):
    """What an experiment needs: answers to imitate first, then pairs to learn a preference from, then unseen ones."""

    demonstrations: list[tuple[str, str]]  # prompt, answer
    train: list[Pair]
    held_out: list[Pair]


# How often the demonstrator, whom the model imitates first, gives the answer that is rejected later. Imitation ranks
# the easy pairs right and the hard ones wrong; only the preference pairs can tell.
SLIP_RATES = {"easy": 0.1, "even": 0.5, "hard": 0.9}

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
    the difficulty, so that a model can learn from the demonstrations when the demonstrator slips.
    """
    rng = random.Random(seed)
    scenes = [
        (difficulty, adjective, animal, place)
        for difficulty, adjectives in _ADJECTIVES.items()
        for adjective in adjectives
        for animal in range(len(_ANIMALS))
        for place in _PLACES
    ]
    rng.shuffle(scenes)
    if pairs + held_out > len(scenes):
        raise ValueError(
            f"pairs + held_out must be at most {len(scenes)}, the number of scenes, got {pairs + held_out}"
        )

    def pair(difficulty: str, adjective: str, animal: int, place: str) -> Pair:
        prompt = f"{adjective} {_ANIMALS[animal]}, {place}: "
        chosen, rejected = (f"it {_SOUNDS[sound % len(_SOUNDS)]}." for sound in (animal, animal + 7))
        return Pair(prompt, chosen, rejected, difficulty)

    train = [pair(*scene) for scene in scenes[held_out : held_out + pairs]]
    imitated = rng.choices(train, k=demonstrations)
    answers = [(p.prompt, p.rejected if rng.random() < SLIP_RATES[p.difficulty] else p.chosen) for p in imitated]
    return Corpus(answers, train, [pair(*scene) for scene in scenes[:held_out]])


def file_corpus(train: Path, held_out: Path) -> Corpus:
    """A user's pairs; the chosen answers are the demonstrations."""
    pairs = list(read_pairs(train))
    return Corpus([(pair.prompt, pair.chosen) for pair in pairs], pairs, list(read_pairs(held_out)))


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file of JSON lines with the strings `prompt`, `chosen` and `rejected`, gzipped if it ends in .gz.

    Raises:
        ValueError: naming the file and the line, for a line that is no such object, an empty answer, or an empty file.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parse(line, f"{path}, line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} after line {number}: {error}") from error
    if number == 0:
        raise ValueError(f"{path}: the file is empty, expected a preference pair a line")


def _parse(line: bytes, place: str) -> Pair:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object with {', '.join(KEYS)}, got {type(record).__name__}")
    for key in KEYS:
        if key not in record:
            raise ValueError(f"{place}: the key {key!r} is missing, found {', '.join(map(repr, record)) or 'none'}")
        if not isinstance(record[key], str):
            raise ValueError(f"{place}: {key!r} must be a string, got {type(record[key]).__name__}")
        if key != "prompt" and not record[key]:
            raise ValueError(f"{place}: the answer {key!r} is empty")
    return Pair(*(record[key] for key in KEYS))
