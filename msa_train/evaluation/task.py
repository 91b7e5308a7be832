"""Task: memories of any length, and what is asked of them.

A task has a pool of documents that its memories share, and trials: a stretch of the pool, some documents of the trial's
own in the place of the pool's, and questions. Documents do not depend on their neighbours, so the pool is encoded once,
and every trial of every length is read from that one encoding. The invariant: a shorter memory's stretch of the pool
is the beginning of a longer one's, under the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from msa_train.errors import UserError
from msa_train.memory import Passage
from msa_train.protocol import Protocol
from msa_train.source import PackSource


@dataclass(frozen=True)
class Asked:
    """A question of a trial.

    Args:
        id: Its name, the same at every length where the question is.
        text: What is asked.
        gold: Numbers of the documents that hold the answer.
        answers: What is right; the task says how an answer is held against it.
        depth: Where the first of those documents begins, as a share of the memory's tokens, 0 to 1.
        lead: Words that the answer is begun with, and that are no part of it.
        preamble: What stands before the memory for a reader that sees all of it, and before the question otherwise.
    """

    id: str
    text: str
    gold: tuple[int, ...]
    answers: tuple[str, ...] = ()
    depth: float = 0.0
    lead: str = ""
    preamble: str = ""


@dataclass(frozen=True)
class Trial:
    """A memory and what is asked of it.

    Args:
        pool: Documents 1 to `pool` of the task's pool are in it.
        own: Further documents by number, in the place of the pool's where those have the same number.
        asked: The questions.
        tokens: Tokens of all documents' text.
    """

    pool: int
    own: Mapping[int, Passage]
    asked: tuple[Asked, ...]
    tokens: int


@dataclass(frozen=True)
class Memory:
    """A trial's documents, in the order of their numbers.

    Args:
        pool: The task's pool, at least as far as the trial reaches.
        trial: The trial.
    """

    pool: Sequence[Passage]
    trial: Trial

    @cached_property
    def numbers(self) -> list[int]:
        """Numbers of all documents, ascending."""
        return sorted({*range(1, self.trial.pool + 1), *self.trial.own})

    def passage(self, number: int) -> Passage:
        """The document with this number."""
        return self.trial.own[number] if number in self.trial.own else self.pool[number - 1]

    def texts(self) -> list[str]:
        """Words of all documents, in order."""
        return [self.passage(number).text for number in self.numbers]


class Task(ABC):
    """What an evaluation asks. Pure: the same arguments give the same memories and questions, on every rank."""

    name: str
    """Names it in tables and TensorBoard."""
    metric: str
    """The score that its curve shows."""
    group: str = ""
    """Tasks of one group also get a row with the plain mean of their scores, where all of them were measured."""
    answers: bool = True
    """Whether answers are written; otherwise documents are ranked alone."""
    judged: bool = False
    """Whether a judge can tell more of its answers than its own scores do."""
    separator: str = "\n\n"
    """What stands between two documents for a reader that sees the whole memory."""

    @abstractmethod
    def open(self, protocol: Protocol, data: PackSource) -> None:
        """Gets ready, once.

        Args:
            protocol: Tokenises.
            data: The run's data, for tasks that ask about it.

        Raises:
            UserError: Something is missing or malformed.
        """

    @abstractmethod
    def reach(self) -> int | None:
        """Tokens of the longest memory that there are documents for; None where there is no end."""

    @property
    @abstractmethod
    def pool_name(self) -> str:
        """Names the pool: tasks whose pools have one name share one encoding of it."""

    @abstractmethod
    def pool(self, length: int) -> Sequence[Passage]:
        """The pool as far as memories of up to this many tokens need it; that of a shorter one is its beginning."""

    @abstractmethod
    def trials(self, length: int) -> Iterator[Trial]:
        """Memories of up to this many tokens, one after another; each with at least one question.

        Raises:
            UserError: So short a memory does not hold what is asked.
        """

    def about(self) -> Mapping[str, str]:
        """What results must be recorded with to be comparable."""
        return {}

    def score(self, asked: Asked, answer: str) -> dict[str, float]:
        """How right an answer is, 0 to 1, by name of the score; `metric` is among them.

        Args:
            asked: The question.
            answer: The answer alone: nothing that was retrieved or injected.
        """
        raise TypeError(f"{self.name} ranks documents; it has no answers")


def means(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    """What means over tasks there are: the tasks of every group of several, by the name of their mean.

    Raises:
        UserError: The tasks of a group have different headline scores.
    """
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    several = {group: found for group, found in groups.items() if group and len(found) > 1}
    for group, found in several.items():
        if len({task.metric for task in found}) > 1:
            told = ", ".join(f"{task.name} by {task.metric}" for task in found)
            raise UserError(f"group '{group}': {told}: only tasks of one headline score have a mean; part the group")
    return {f"{group}_mean_of_{len(found)}": found for group, found in several.items()}


def headlines(tasks: Sequence[Task]) -> dict[str, str]:
    """The headline score of every task and mean by name, a mean before the first of its tasks."""
    before = {found[0].name: name for name, found in means(tasks).items()}
    return {name: task.metric for task in tasks for name in (before.get(task.name), task.name) if name is not None}
