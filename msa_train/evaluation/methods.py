"""Methods: who finds documents and answers. This file has the interface and the model itself; baselines.py the others.

A method sees trials in batches, since a needle's memory has one question and a decoder likes many. The invariant: what
it replies to a question, where nothing is drawn (temperature 0), does not depend on the other trials of its batch, nor
on how many ranks hold the memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from msa_train.errors import UserError
from msa_train.evaluation.ranks import Ranks
from msa_train.evaluation.task import Asked, Memory, Task
from msa_train.generation import Answerer, AskConfig, Bank, Question
from msa_train.kernels.maxsim import Precision
from msa_train.memory import Encoder, MemoryBank, ParallelBank, serve_all
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol

ROUTER = "router"  # names the model itself among the methods
TOGETHER = 16  # questions that a method gets at a time, at least
MOST = 64  # questions that a memory-sparse model gets at a time; more would hardly make a question cheaper
CACHE_BYTES = TOGETHER * 36 * 8 * 128 * 2 * 2  # keys and values of a token in 16 contexts of Qwen3-4B, bfloat16

Result = TypeVar("Result")
Ranking = list[list[list[int]]]  # of every memory, of every question: the best documents


@dataclass(frozen=True)
class Reply:
    """An answer.

    Args:
        text: Its words alone: nothing that was retrieved.
        documents: Numbers of the documents that were retrieved for it; None where the reader sees the whole memory.
        notes: What did not go as it should.
    """

    text: str
    documents: tuple[int, ...] | None
    notes: tuple[str, ...] = ()


class Beyond(UserError):
    """A memory that a method cannot take, for the reason that the message gives."""


class Method(ABC):
    """Finds and answers, on every rank of a job; what it returns counts on the first."""

    name: str
    """Names it in tables."""
    growth: float = 0.0
    """Its time for asking grows as this power of the memory's length, as far as nothing else is known."""
    limit: int | None = None
    """Tokens of the longest memory that it can take; None where there is no end."""
    together: int = TOGETHER
    """Questions that it gets at a time, at least. The same on every rank."""

    def prepare(self, task: Task, length: int) -> None:  # noqa: B027  # most have nothing to get ready
        """Gets ready for memories of up to this many tokens.

        Args:
            task: What will be asked.
            length: Tokens.
        """

    @abstractmethod
    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> Ranking:
        """The k best documents of every question.

        Raises:
            Beyond: It ranks no documents, or not so many.
        """

    @abstractmethod
    def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
        """Answers to every question of every memory.

        Raises:
            Beyond: It cannot read so much.
        """

    def close(self) -> None:  # noqa: B027  # and nothing to let go
        """Lets go of what it holds."""


class Unmade(Method):
    """Stands for a method that could not be made, and takes no memory.

    Args:
        name: The method's.
        reason: Why it could not.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def prepare(self, task: Task, length: int) -> None:
        """Says why."""
        raise Beyond(self.reason)

    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> Ranking:
        """Says why."""
        raise Beyond(self.reason)

    def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
        """Says why."""
        raise Beyond(self.reason)


class Routed(Method):
    """A memory-sparse model over a bank.

    The pool is encoded once, shared out over the ranks, and grows with the memories; a trial's own documents lie over
    it. Every rank searches its share, and the first one writes.

    Args:
        name: `router` and the like.
        model: The model, in evaluation mode.
        protocol: Writes documents and contexts.
        ask: How questions are answered.
        layer_weights: Weight of each routed layer where scores are ranked.
        keys: Precision of the routing keys.
        ranks: Who takes part.
    """

    def __init__(
        self,
        name: str,
        model: MemorySparseModel,
        protocol: Protocol,
        ask: AskConfig = AskConfig(),
        layer_weights: Sequence[float] | None = None,
        keys: Precision = "bfloat16",
        ranks: Ranks = Ranks(),
    ) -> None:
        self.name, self.model, self.protocol, self.config, self.ranks = name, model, protocol, ask, ranks
        self.weights, self.together = layer_weights, side_by_side(model)
        self.encoder = Encoder(model, protocol, keys)
        self.pools: dict[str, tuple[MemoryBank, int]] = {}  # this rank's share of each, and documents in the whole

    def prepare(self, task: Task, length: int) -> None:
        """Encodes what the pool does not have yet. All ranks' shares grow, or none does: they must stay one pool."""

        def grown() -> tuple[MemoryBank, int]:
            bank, known = self.pools.get(task.pool_name) or (self.encoder.bank([]), 0)
            passages, larger = task.pool(length), bank.upto(known)
            new = self.ranks.share(range(known, len(passages)))
            larger.add(self.encoder.encode((place + 1, passages[place]) for place in new))
            return larger, max(known, len(passages))

        self.pools[task.pool_name] = self.ranks.together(grown)

    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> Ranking:
        """By the routers' scores."""

        def act(answerer: Answerer, questions: list[Question]) -> list[list[int]]:
            return [[number for number, _ in found] for found in answerer.rank(questions, k, self.together)]

        return self._asking(task, memories, act)

    def answer(self, task: Task, memories: Sequence[Memory]) -> list[list[Reply]]:
        """As `msa-train ask` does."""

        def act(answerer: Answerer, questions: list[Question]) -> list[Reply]:
            return [
                Reply(answer.text, tuple(document.number for document in answer.documents), answer.notes)
                for answer in answerer.ask(questions, self.together)
            ]

        return self._asking(task, memories, act)

    def close(self) -> None:
        """Forgets the encoded pools."""
        self.pools.clear()

    def _asking(
        self, task: Task, memories: Sequence[Memory], act: Callable[[Answerer, list[Question]], list[Result]]
    ) -> list[list[Result]]:
        """On the first rank, what `act` makes of all questions, by memory; on the others nothing, while they serve."""
        shares = self.ranks.together(lambda: self._overlaid(self.pools[task.pool_name][0], memories))
        if self.ranks.world == 1:
            return self._act(memories, shares, act)
        banks = [ParallelBank(share, self.ranks.group, place) for place, share in enumerate(shares)]
        if self.ranks.rank > 0:
            serve_all(banks)
            return []
        with banks[0]:
            return self._act(memories, banks, act)

    def _act(
        self,
        memories: Sequence[Memory],
        banks: Sequence[Bank],
        act: Callable[[Answerer, list[Question]], list[Result]],
    ) -> list[list[Result]]:
        questions = [
            Question(spoken(asked), asked.lead, bank)
            for memory, bank in zip(memories, banks, strict=True)
            for asked in memory.trial.asked
        ]
        answerer = Answerer(self.model, self.protocol, banks[0], self.weights, self.config)
        results = iter(act(answerer, questions))
        return [[next(results) for _ in memory.trial.asked] for memory in memories]

    def _overlaid(self, pool: MemoryBank, memories: Sequence[Memory]) -> list[MemoryBank]:
        """This rank's share of every memory: its part of the pool, and of the trial's own documents."""
        mine = [self.ranks.share(sorted(memory.trial.own.items())) for memory in memories]
        segments = iter(self.encoder.apart([own for own in mine if own])) if any(mine) else iter(())
        return [
            pool.upto(memory.trial.pool).overlaid([next(segments)] if own else [], memory.trial.own)
            for memory, own in zip(memories, mine, strict=True)
        ]


def side_by_side(model: MemorySparseModel) -> int:
    """Questions that a model answers at a time. Many, since a step launches as much for one as for all; but a small
    model's may need no more memory than 16 of a large one, and a larger one gets 16.

    The model's shape alone decides, so that all ranks say the same.
    """
    layer, wide = model.attention[0], next(model.parameters()).element_size()
    token = len(model.attention) * layer.groups * layer.width * 2 * wide
    return max(TOGETHER, min(MOST, CACHE_BYTES // token))


def spoken(asked: Asked) -> str:
    """A question as a reader hears it who has read no memory before it."""
    return f"{asked.preamble}\n{asked.text}" if asked.preamble else asked.text
