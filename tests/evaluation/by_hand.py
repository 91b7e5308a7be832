"""A task whose memories are written down, a method that says what it is told to, and a clock that is set by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from msa_train.evaluation.evaluate import Record, Row
from msa_train.evaluation.methods import Method, Ranking, Reply
from msa_train.evaluation.scores import containment
from msa_train.evaluation.task import Asked, Memory, Task, Trial
from msa_train.memory import Passage
from msa_train.protocol import Protocol
from msa_train.source import PackSource
from tests.memory.conftest import TEXTS

POOL = 24  # texts of the animals that are the pool's, from the 30th on


class HandTask(Task):
    """Memories as they are listed.

    Args:
        pool: The whole pool.
        listed: Trials by length.
        name: Its own.
        answers: Whether answers are written.
        reach: Tokens that there are documents for.
    """

    def __init__(
        self,
        pool: Sequence[Passage],
        listed: Mapping[int, Sequence[Trial]],
        name: str = "rivers",
        answers: bool = True,
        reach: int | None = None,
    ) -> None:
        self.name, self.answers, self.metric = name, answers, "right" if answers else "recall@1"
        self.judged = answers
        self.passages, self.listed, self.end = pool, listed, reach

    def open(self, protocol: Protocol, data: PackSource) -> None:
        raise AssertionError("it is open")

    def reach(self) -> int | None:
        return self.end

    @property
    def pool_name(self) -> str:
        return "animals"

    def pool(self, length: int) -> Sequence[Passage]:
        return self.passages[: max(trial.pool for trial in self.listed[length])]

    def trials(self, length: int) -> Iterator[Trial]:
        yield from self.listed[length]

    def score(self, asked: Asked, answer: str) -> dict[str, float]:
        return {"right": containment(answer, asked.answers), "letters": min(len(answer), 100) / 100}


class ToldMethod(Method):
    """Answers and ranks what it is told to, and takes its time.

    Args:
        reply: What it replies to a question; a list of numbers where documents are ranked.
        name: Its own.
        clock: Goes on while it works.
        seconds: Seconds that it takes for memories of so many tokens, batch by batch.
        growth: See `Method`.
        log: Keeps what was asked of it.
    """

    def __init__(
        self,
        reply: Callable[[Memory, Asked], Any] = lambda memory, asked: Reply("", None),
        name: str = "told",
        clock: Clock | None = None,
        seconds: Callable[[int], float] = lambda length: 0.0,
        growth: float = 1.0,
        log: list[Any] | None = None,
    ) -> None:
        self.reply, self.name, self.clock, self.seconds, self.growth = reply, name, clock, seconds, growth
        self.log = [] if log is None else log
        self.log.append(f"{name} made")

    def prepare(self, task: Task, length: int) -> None:
        self.length = length

    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> Ranking:
        return [[row[:k] for row in rows] for rows in self.replies(memories)]

    def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
        return self.replies(memories)

    def replies(self, memories: Sequence[Memory]) -> list[list[Any]]:
        if self.clock is not None:
            self.clock.now += self.seconds(self.length)
        self.log.append([asked.id for memory in memories for asked in memory.trial.asked])
        return [[self.reply(memory, asked) for asked in memory.trial.asked] for memory in memories]

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


class Clock:
    """Tells the time that it was set to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def document(protocol: Protocol, place: int, name: str = "") -> Passage:
    """A text of the animals as a document."""
    return Passage(name or f"a{place}", TEXTS[place], protocol.text(f" {TEXTS[place]}"))


def pool(protocol: Protocol) -> list[Passage]:
    """Documents 1 to POOL are a30, a31 and so on."""
    return [document(protocol, 30 + place) for place in range(POOL)]


def trial(protocol: Protocol, documents: int, golds: Mapping[int, int], depths: Sequence[float] = ()) -> Trial:
    """A memory of this many documents of the pool, with the texts `golds` by number, each asked for.

    Args:
        protocol: Tokenises.
        documents: Documents of the pool.
        golds: Places of the texts of its own, by number.
        depths: Of every question; 0 by default.
    """
    own = {number: document(protocol, place) for number, place in golds.items()}
    asked = []
    for number, place in golds.items():
        _, colour, animal, *_ = TEXTS[place].split()
        asked.append(Asked(f"q{place}", f"Where does the {colour} {animal} live?", (number,), (f"river {place}",)))
    if depths:
        asked = [replace(one, depth=depth) for one, depth in zip(asked, depths, strict=True)]
    return Trial(documents, own, tuple(asked), tokens=100 * max([documents, *golds]))


def untimed(row: Row) -> Row:
    """A row without what a clock measured."""
    return replace(row, seconds=0.0)


def notes(rows: Sequence[Row]) -> dict[tuple[str, int], str]:
    """What is said of every cell that something is said of."""
    return {(row.method, row.length): row.note for row in rows if row.note}


def by_id(records: Sequence[Record]) -> dict[str, Record]:
    """Records of one cell by their questions."""
    found = {record.id: record for record in records}
    assert len(found) == len(records)
    return found
