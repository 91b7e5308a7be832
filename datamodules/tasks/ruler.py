"""RULER's needle-in-a-haystack tasks: the eight settings, their words, and what is drawn for a sample.

Definitions and wording follow NVIDIA's RULER (https://github.com/NVIDIA/RULER at c3f5e3b, Apache-2.0);
docs/evaluation.md goes through them point by point. The invariant: a sample's needles depend on its random generator
and its task alone, not on the haystack.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random
from typing import Literal

Name = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery",
]  # fmt: skip
Kind = Literal["words", "numbers", "uuids"]
Half = Literal["evaluation", "training"]
HALVES: tuple[Half, ...] = ("evaluation", "training")

ANSWER_TOKENS = 128  # room that a length has for the answer
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PREAMBLE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
QUESTION = "What are all the special magic {kind} for {query} mentioned in the provided text?"
LEAD = "The special magic {kind} for {query} mentioned in the provided text are"
ONE_PREAMBLE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards."
)
ONE_QUESTION = "What is the special magic {kind} for {query} mentioned in the provided text?"
ONE_LEAD = "The special magic {kind} for {query} mentioned in the provided text is"

DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # percent
# RULER shuffles the needles with a generator that it seeds anew for every sample, so always like this
ORDER = {1: (0,), 4: (2, 1, 3, 0)}


@dataclass(frozen=True)
class Setting:
    """One of the eight tasks.

    Args:
        haystack: What the needles lie in: one line over and over, prose, or other needles.
        key: What a needle is asked by.
        value: What it says.
        keys: Keys of a sample.
        values: Needles for every key.
        asked: Keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1


SETTINGS: dict[Name, Setting] = {
    "niah_single_1": Setting("noise"),
    "niah_single_2": Setting("essay"),
    "niah_single_3": Setting("essay", value="uuids"),
    "niah_multikey_1": Setting("essay", keys=4),
    "niah_multikey_2": Setting("needle"),
    "niah_multikey_3": Setting("needle", key="uuids", value="uuids"),
    "niah_multivalue": Setting("essay", values=4),
    "niah_multiquery": Setting("essay", keys=4, asked=4),
}


@dataclass(frozen=True)
class Drawn:
    """What a sample hides and asks.

    Args:
        needles: The sentences to hide, in the order in which they are placed.
        wanted: Which of them answer.
        keys: What is asked for.
        preamble: What is said before the text.
        question: What is asked.
        lead: What RULER begins the answer with, without the space before it.
        answers: What is right.
    """

    needles: tuple[str, ...]
    wanted: tuple[bool, ...]
    keys: tuple[str, ...]
    preamble: str
    question: str
    lead: str
    answers: tuple[str, ...]


def draw(setting: Setting, random: Random, half: Half = "evaluation") -> Drawn:
    """Draws a sample's needles and which of them are asked for."""
    keys = [one(setting.key, random, half) for _ in range(setting.keys)]
    needles = [(key, one(setting.value, random)) for key in range(setting.keys) for _ in range(setting.values)]
    asked = random.sample(range(setting.keys), setting.asked)
    placed = [needles[place] for place in ORDER[len(needles)]]
    single = setting.asked * setting.values == 1
    words = {"kind": setting.value.removesuffix("s") if single else setting.value}
    names = tuple(keys[key] for key in asked)
    words["query"] = listed(names)
    return Drawn(
        needles=tuple(NEEDLE.format(kind=setting.value, key=keys[key], value=value) for key, value in placed),
        wanted=tuple(key in asked for key, _ in placed),
        keys=names,
        preamble=(ONE_PREAMBLE if single else PREAMBLE).format(**words),
        question=(ONE_QUESTION if single else QUESTION).format(**words),
        lead=(ONE_LEAD if single else LEAD).format(**words),
        answers=tuple(value for wanted in asked for key, value in needles if key == wanted),
    )


def lines(setting: Setting, random: Random, half: Half = "evaluation") -> Iterator[str]:
    """Needles without end: the haystack of the tasks that hide a needle among needles."""
    while True:
        key = one(setting.key, random, half)
        yield NEEDLE.format(kind=setting.value, key=key, value=one(setting.value, random))


def one(kind: Kind, random: Random, half: Half = "evaluation") -> str:
    """A key or a value.

    Args:
        kind: What it is made of.
        random: Draws it.
        half: Words for evaluation are RULER's, an adjective and a noun. Those for training are two nouns, so that no
            pair of words is in both: nouns that are adjectives too never come first.
    """
    if kind == "numbers":
        return str(random.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=random.getrandbits(128), version=4))
    first = word_list("adjective") if half == "evaluation" else first_nouns()
    return f"{random.choice(first)}-{random.choice(word_list('noun'))}"


@cache
def first_nouns() -> tuple[str, ...]:
    """Nouns that are no adjective, nor begin with one and a hyphen."""
    adjectives = set(word_list("adjective"))
    return tuple(noun for noun in word_list("noun") if noun.split("-")[0] not in adjectives)


@cache
def word_list(kind: Literal["adjective", "noun"]) -> tuple[str, ...]:
    """Distinct words of wonderwords' list, sorted."""
    text = files("wonderwords").joinpath("assets", f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.rstrip() for line in text.splitlines()}))


def listed(keys: Sequence[str]) -> str:
    """Keys as a question names them: "a", or "a, b, c, and d"."""
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
