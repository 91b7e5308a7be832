"""Planning: which queries and documents make pack n, as a pure function of (seed, n).

An epoch deals its queries to packs like cards: sorted by the tokens that they need into Q strata, one of each stratum
to every pack, in an order drawn per epoch. So packs are alike in size, and whether all of them fit is known before
training. To the documents that the queries ask for come mined negatives, then random documents, then whatever fits
the rest of the budget best. Nothing is remembered between packs, so a resumed run, another number of ranks or of
workers reads the same packs. The invariant: every query comes `weight` times an epoch, and the budget is never passed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from datamodules.collection import Collection, Rows
from datamodules.negatives import Mined
from msa_train.errors import UserError
from msa_train.protocol import Protocol

# Of the documents that one step asks for, as many come into a pack as fit both; the rest are excluded there. One
# question about a book in fifty parts would else fill a pack by itself.
MOST_POSITIVES = 16  # the paper's top-k
MOST_SHARE = 8  # an eighth of the document tokens for a query, in equal parts for its steps
SAMPLED = 512  # queries, to tell how long contexts are
CLOSE = 0.98  # a document of at least this share of the remaining room fits it


@dataclass(frozen=True)
class PackingConfig:
    """How packs are made.

    Args:
        document_tokens: Token budget of a pack's documents, their wrapping included. The contexts come on top.
        queries_per_pack: Queries that share a pack's documents; below 1, their contexts' share of the document tokens.
        answer_share: Share of a pack's questions that go on from the last retrieval step to injected text and answer.
        chunk_size: Tokens per chunk, as the model has it.
        seed: Draws queries, negatives and the documents' order.
        distractors: Documents that do not answer, which an answered question reads beside those that do; from none to
            so many, drawn. Mined negatives of the question come first, which are what a router would hand over.
    """

    document_tokens: int
    queries_per_pack: float
    answer_share: float
    chunk_size: int
    seed: int
    distractors: int = 0


@dataclass(frozen=True)
class Asked:
    """One context: a query at one of its retrieval steps.

    Args:
        query: Row of the query.
        steps: Documents of the steps so far; those of the last are to be found. None for an instruction.
        answered: Whether the answer follows.
        distractors: Documents that it reads beside those of the last step before it answers.
    """

    query: int
    steps: tuple[tuple[int, ...], ...]
    answered: bool
    distractors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What is in a pack.

    Args:
        asked: Its contexts.
        documents: Rows of its documents, in order; document i has the number i + 1.
    """

    asked: list[Asked]
    documents: list[int]


class Planner:
    """Plans the packs of one split.

    Args:
        data: The corpora.
        protocol: Knows how long a document's wrapping is.
        split: Split that the queries come from. Documents come from the whole corpora.
        config: Sizes.
        mined: Mined negatives, and how many of them a query brings along.
        stage: Number of the curriculum's stage, which draws for itself.
        whole: Every query once an epoch, whatever its corpus weighs: for evaluations.

    Raises:
        UserError: The documents that queries ask for, or some document, exceed the budget.
    """

    def __init__(
        self,
        data: Collection,
        protocol: Protocol,
        split: str,
        config: PackingConfig,
        mined: Sequence[tuple[Mined, int]] = (),
        stage: int = 0,
        whole: bool = False,
    ) -> None:
        self.data, self.config, self.split, self.mined = data, config, split, tuple(mined)
        self.rows = data.split(split)
        self.key = np.array([config.seed, zlib.crc32(split.encode())], dtype=np.uint64)
        self.stage = stage
        shortest = int(data.length_D.min())
        most = min(config.document_tokens // (shortest + protocol.wrapping(1)) + 1, data.documents)  # in a pack
        wrappings = [protocol.wrapping(number) for number in range(1, most + 2)]
        self.wrapped = np.cumsum([0, *wrappings])  # tokens around the first n documents
        self.by_length = data.by_length
        self.sorted_length = data.length_D[self.by_length]
        self.most_wrapping = max(wrappings)
        self.usual = int(np.quantile(data.length_D, 0.9)) + self.most_wrapping
        self._check_documents(self.most_wrapping)
        self.need = data.needs(self.most_wrapping, MOST_POSITIVES, config.document_tokens // MOST_SHARE)
        weights = [1.0] * len(self.rows) if whole else data.weights
        self.drawn = [round(weight * len(rows)) for weight, rows in zip(weights, self.rows, strict=True)]
        if not sum(self.drawn):
            raise UserError(f"data.corpus: the weights leave no query of '{split}'; raise one")
        self.share = np.cumsum(
            [weight * len(store.tokens) for weight, store in zip(data.weights, data.stores, strict=True)]
        )
        self.queries_per_pack = self._queries_per_pack(protocol)
        self._check_queries()
        self._dealt: dict[int, NDArray[np.int64]] = {}  # the last epoch or two; plain, so that workers can be spawned

    @property
    def queries(self) -> int:
        """Queries of the split."""
        return sum(map(len, self.rows))

    @property
    def packs_per_epoch(self) -> int:
        """Packs until every query has come `weight` times."""
        return -(-sum(self.drawn) // self.queries_per_pack)

    def longest_context(self, protocol: Protocol) -> int:
        """Tokens that a context of this split may have, at most."""
        rows, data = np.concatenate(self.rows), self.data
        steps = np.concatenate([store.step_sizes.lengths() for store in data.stores])[rows]
        answered = data.answer_length_Q[rows] > 0
        read = np.where(answered | (steps > 1), self.need[rows], 0)  # else numbers are written, and nothing is read
        read += answered * self.config.distractors * (int(data.length_D.max()) + self.most_wrapping)
        text = 2 * data.question_length_Q[rows] + data.answer_length_Q[rows] + read
        return int(text.max()) + round(protocol.context_tokens(0, [[0] * MOST_POSITIVES], 1, 1.0))

    def plan(self, index: int) -> Plan:
        """Chooses the queries and documents of pack `index` (any number from 0; epochs follow one another)."""
        epoch, place = divmod(index, self.packs_per_epoch)
        dealt = self._deal(epoch)[:, place]
        rng = self._rng(1, index)
        asked = self._ask(rng, rng.permutation(dealt[dealt >= 0]).tolist())
        pack = _Filling(self, (document for one in asked for step in one.steps for document in step))
        for mined, number in self.mined:
            for one in asked:
                candidates = mined.of(one.query) if one.steps else []
                for document in rng.permutation(candidates).tolist()[:number]:
                    pack.add(document)
        self._fill(rng, pack)
        order = list(pack.documents)
        rng.shuffle(order)
        order = _in_order(order, [step for one in asked for step in one.steps])
        if self.config.distractors:
            asked = [self._with_distractors(rng, one, order) for one in asked]
        return Plan(asked, order)

    def _ask(self, rng: np.random.Generator, queries: list[int]) -> list[Asked]:
        may_answer = [row for row, query in enumerate(queries) if self._may_answer(query)]
        rng.shuffle(may_answer)
        # a share of few queries is met on average: one query a pack at 0.25 answers in every fourth
        answered = set(may_answer[: int(self.config.answer_share * len(queries) + rng.random())])
        asked = []
        for row, query in enumerate(queries):
            steps = self.data.steps(query)
            if not steps:
                asked.append(Asked(query, (), answered=True))
                continue
            last = len(steps) if row in answered else int(rng.integers(len(steps))) + 1
            room = self.config.document_tokens // MOST_SHARE // len(steps)
            asked.append(Asked(query, tuple(self._at_most(rng, step, room) for step in steps[:last]), row in answered))
        return asked

    def known(self, query: int) -> set[int]:
        """Digests of the documents that are known to be relevant to a query, at whatever step."""
        rows = [row for step in self.data.steps(query) for row in step] + self.data.related(query)
        return set(self.data.digest_D[rows].tolist())

    def _with_distractors(self, rng: np.random.Generator, asked: Asked, documents: Sequence[int]) -> Asked:
        """An answered question with documents of its pack that it reads in vain."""
        number = int(rng.integers(self.config.distractors + 1)) if asked.answered and asked.steps else 0
        if not number:
            return asked
        known, present = self.known(asked.query), set(documents)
        mined = [row for miner, _ in self.mined for row in miner.of(asked.query) if row in present]
        drawn = [documents[place] for place in rng.permutation(len(documents))[: number + len(known)].tolist()]
        others = [row for row in dict.fromkeys([*mined, *drawn]) if int(self.data.digest_D[row]) not in known]
        return replace(asked, distractors=tuple(others[:number]))

    def _at_most(self, rng: np.random.Generator, step: list[int], room: int) -> tuple[int, ...]:
        """A step's documents, or as many of them as one pack takes, drawn; at least one."""
        length = self.data.length_D[step] + self.most_wrapping
        if len(step) <= MOST_POSITIVES and (len(step) == 1 or int(length.sum()) <= room):
            return tuple(step)
        order = rng.permutation(len(step))[:MOST_POSITIVES]
        fitting = max(int(np.searchsorted(np.cumsum(length[order]), room, side="right")), 1)
        return tuple(step[place] for place in sorted(order[:fitting].tolist()))

    def _may_answer(self, query: int) -> bool:
        return self.data.answer(query) is not None and not self.data.instruction_Q[query]

    def _fill(self, rng: np.random.Generator, pack: _Filling) -> None:
        """Random documents while any usual one fits, then the ones that fit what is left."""
        mean = float(self.sorted_length.mean()) + float(self.wrapped[1])
        for _ in range(8):  # a batch may repeat what is in the pack already
            if pack.room <= self.usual:
                break
            for document in self._random_documents(rng, int(1.2 * pack.room / mean) + 8):
                if pack.room <= self.usual:
                    break
                pack.add(document)
        while (last := self._fitting(rng, pack)) is not None:
            pack.add(last)

    def _random_documents(self, rng: np.random.Generator, number: int) -> list[int]:
        if len(self.data.stores) == 1:
            return rng.integers(self.data.documents, size=number).tolist()
        corpus = np.searchsorted(self.share, rng.random(number) * self.share[-1], side="right")
        first = self.data.first_document[corpus]
        return (first + rng.integers(self.data.first_document[corpus + 1] - first)).tolist()

    def _fitting(self, rng: np.random.Generator, pack: _Filling) -> int | None:
        """A document of nearly the length that is left, or the longest that fits; none where none does."""
        stop = int(np.searchsorted(self.sorted_length, pack.text_room, side="right"))
        start = int(np.searchsorted(self.sorted_length, CLOSE * pack.text_room, side="left"))
        for place in rng.integers(start, stop, size=4).tolist() if start < stop else ():
            if int(self.by_length[place]) not in pack.documents:
                return int(self.by_length[place])
        for place in range(stop - 1, max(stop - 1 - 2 * len(pack.documents), -1), -1):
            if int(self.by_length[place]) not in pack.documents:
                return int(self.by_length[place])
        return None

    def _deal(self, epoch: int) -> NDArray[np.int64]:
        """Queries of alike needs in a row, the neediest first: [Q, packs], -1 where the last row has none."""
        if epoch not in self._dealt:
            queries = np.concatenate([self._share_of(number, epoch) for number in range(len(self.rows))])
            strata = self._strata(self.need[queries], queries)
            self._dealt = dict(list(self._dealt.items())[-1:])
            self._dealt[epoch] = self._rng(0, epoch).permuted(strata, axis=1)
        return self._dealt[epoch]

    def _share_of(self, corpus: int, epoch: int) -> Rows:
        """A corpus' queries of this epoch: the next stretch of its queries, shuffled and shuffled again."""
        rows, number = self.rows[corpus], self.drawn[corpus]
        if number == len(rows):
            return rows
        parts, start, stop = [], epoch * number, (epoch + 1) * number
        for turn in range(start // max(len(rows), 1), -(-stop // max(len(rows), 1))):
            order = self._rng(2 + corpus, turn).permutation(rows)
            parts.append(order[max(start - turn * len(rows), 0) : stop - turn * len(rows)])
        return np.concatenate(parts or [rows[:0]])

    def _strata(self, need: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int64]:
        strata = np.full((self.queries_per_pack, self.packs_per_epoch), -1)
        strata.reshape(-1)[: len(values)] = values[np.argsort(-need, kind="stable")]
        return strata

    def _rng(self, purpose: int, counter: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.key, counter=[0, purpose, self.stage, counter]))

    def _queries_per_pack(self, protocol: Protocol) -> int:
        given = self.config.queries_per_pack
        if given >= 1:
            return min(int(given), sum(self.drawn))
        rng = self._rng(1, 2**62)
        sample = [
            query
            for rows, number in zip(self.rows, self.drawn, strict=True)
            for query in rng.choice(rows, size=round(SAMPLED * number / sum(self.drawn))).tolist()
        ]
        may_answer = sum(map(self._may_answer, sample))
        share = min(self.config.answer_share * len(sample) / max(may_answer, 1), 1.0)  # of those that may
        mean = np.mean([self._context_tokens(protocol, query, share) for query in sample])
        return int(np.clip(round(given * self.config.document_tokens / mean), 1, sum(self.drawn)))

    def _context_tokens(self, protocol: Protocol, query: int, share: float) -> float:
        """Length of a query's context, on average over what may be drawn of it.

        Args:
            protocol: Writes it.
            query: The query.
            share: How often it is answered, if it may be.
        """
        data = self.data
        question = len(data.question(query))
        steps = [[int(data.length_D[row]) for row in step[:MOST_POSITIVES]] for step in data.steps(query)]
        answer = data.answer(query)
        if not steps or answer is None or not self._may_answer(query):  # an instruction's answer is all that it has
            words = 0 if answer is None or steps else len(answer)
            return protocol.context_tokens(question, steps, words, 0.0)
        store = data.locate_query(query)[0]  # mined negatives are of the same corpus
        length_D = data.length_D[data.first_document[store] : data.first_document[store + 1]]
        read = self.config.distractors / 2 * (float(length_D.mean()) + self.most_wrapping)
        return protocol.context_tokens(question, steps, len(answer), share) + share * read

    def _check_documents(self, wrapping: int) -> None:
        budget, longest = self.config.document_tokens, int(self.data.length_D.argmax())
        length = int(self.data.length_D[longest]) + wrapping
        if length > budget:
            over = int((self.data.length_D + wrapping > budget).sum())
            raise UserError(
                f"data: document '{self.data.document_id(longest)}' has {length} tokens, more than document_tokens "
                f"{budget} ({over} such); lower max_document_tokens or raise the budget"
            )

    def _check_queries(self) -> None:
        budget = self.config.document_tokens
        rows = np.concatenate(self.rows)
        for what, length_Q in (("", self.data.question_length_Q), ("'s answer", self.data.answer_length_Q)):
            longest = int(rows[length_Q[rows].argmax()])
            if length_Q[longest] > budget:
                raise UserError(
                    f"data: query '{self.data.query(longest, 'id')}'{what} has {length_Q[longest]} tokens, more than "
                    f"document_tokens {budget}; shorten it or raise the budget"
                )
        # whatever an epoch draws, its strata need no more than those of the neediest queries it may draw
        worst = [
            np.sort(np.tile(self.need[rows], -(-number // max(len(rows), 1))))[::-1][:number]
            for rows, number in zip(self.rows, self.drawn, strict=True)
        ]
        need = np.concatenate(worst)
        most = int(self._strata(need, need).max(axis=1).clip(min=0).sum())
        if most > budget:
            raise UserError(
                f"data: the documents that {self.queries_per_pack} queries of '{self.split}' ask for may have {most} "
                f"tokens (up to {need.max()} a query), more than document_tokens {budget}: "
                "lower queries_per_pack or raise document_tokens"
            )


def _in_order(documents: Sequence[int], steps: Iterable[Sequence[int]]) -> list[int]:
    """The documents with those of every step in the order of their corpus, at the places that they have among them.

    What is found together is read in the order of its numbers, and an answer may tell it in the order of the corpus.
    Steps that share a document are ordered as one; others stay mixed, so that no number tells the next.

    >>> _in_order([7, 1, 5, 9, 2, 4], [(2, 5, 7), (4, 9)])
    [2, 1, 5, 4, 7, 9]
    """
    group_of: dict[int, set[int]] = {}
    for step in steps:
        group = set(step).union(*(group_of.get(row, ()) for row in step))
        group_of.update((row, group) for row in group)
    found, place = list(documents), {row: number for number, row in enumerate(documents)}
    for group in {id(group): group for group in group_of.values() if len(group) > 1}.values():
        for number, row in zip(sorted(place[row] for row in group), sorted(group), strict=True):
            found[number] = row
    return found


class _Filling:
    """A pack's documents so far, and the room that is left."""

    def __init__(self, planner: Planner, documents: Iterable[int]) -> None:
        self.length_D, self.wrapped = planner.data.length_D, planner.wrapped
        self.budget = planner.config.document_tokens
        self.documents: dict[int, None] = dict.fromkeys(documents)
        self.text = int(self.length_D[list(self.documents)].sum()) if self.documents else 0

    @property
    def room(self) -> int:
        """Tokens left, wrapping of what is in paid."""
        return self.budget - self.text - int(self.wrapped[len(self.documents)])

    @property
    def text_room(self) -> int:
        """Tokens left for the text of one more document; negative where its wrapping does not fit."""
        if len(self.documents) + 1 >= len(self.wrapped):
            return -1
        return self.budget - self.text - int(self.wrapped[len(self.documents) + 1])

    def add(self, document: int) -> None:
        """Takes a document in, if it fits and is not there."""
        if document not in self.documents and self.length_D[document] <= self.text_room:
            self.documents[document] = None
            self.text += int(self.length_D[document])
