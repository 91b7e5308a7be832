"""Packing: which queries and documents make pack n, as a pure function of (seed, n).

An epoch deals its queries to packs like cards: sorted by the tokens of their positives into Q strata, one of each
stratum to every pack, in an order drawn per epoch. So packs are alike in size, and whether all of them fit is known
before training. To the queries' positives come random documents until the token budget is met. The invariant: a
document that is known to answer any query of the pack is in the pack as that query's positive or not at all, so no
known positive is ever counted as a negative; and every query comes once an epoch. Nothing is remembered between
packs, so a resumed run, another number of ranks or of workers reads the same packs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from datamodules.corpus import Corpus, Qrels
from msa_train.errors import UserError
from msa_train.pack import Contexts, Documents, MemoryPack
from msa_train.protocol import Protocol, Source

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus in token ids.

    Args:
        corpus: The texts.
        documents: Per document, the ids of `" " + text`.
        queries: Per query, the ids of its text.
        answers: Per query, the ids of `" " + answer`, or None.
    """

    corpus: Corpus
    documents: list[Ids]
    queries: list[Ids]
    answers: list[Ids | None]

    @staticmethod
    def of(corpus: Corpus, protocol: Protocol) -> TokenizedCorpus:
        """Tokenises every text once."""

        def ids(texts: Sequence[str]) -> list[Ids]:
            return [np.asarray(tokens, dtype=np.int32) for tokens in protocol.texts(texts)]

        answered = [row for row, answer in enumerate(corpus.answers) if answer is not None]
        answer_ids = dict(zip(answered, ids([f" {corpus.answers[row]}" for row in answered]), strict=True))
        return TokenizedCorpus(
            corpus=corpus,
            documents=ids([f" {text}" for text in corpus.documents]),
            queries=ids(corpus.queries),
            answers=[answer_ids.get(row) for row in range(len(corpus.queries))],
        )


@dataclass(frozen=True)
class Plan:
    """What is in a pack: rows of the corpus."""

    queries: list[int]
    documents: list[int]
    answered: list[bool]


@dataclass(frozen=True)
class PackingConfig:
    """How packs are made.

    Args:
        document_tokens: Token budget of a pack's documents, their wrapping included. The contexts come on top.
        queries_per_pack: Queries that share a pack's documents.
        answer_share: Share of a pack's queries that go on from the retrieval step to injected text and answer.
        chunk_size: Tokens per chunk, as the model has it.
        seed: Draws queries, negatives and the documents' order.
    """

    document_tokens: int
    queries_per_pack: int
    answer_share: float
    chunk_size: int
    seed: int


class Packer:
    """Makes the packs of one split.

    Args:
        data: The corpus.
        protocol: Writes documents and contexts.
        split: Split that the queries come from. Documents come from the whole corpus.
        config: Sizes.

    Raises:
        UserError: Some query's positives, or some document, exceed the budget.
    """

    def __init__(self, data: TokenizedCorpus, protocol: Protocol, split: str, config: PackingConfig) -> None:
        self.data, self.protocol, self.config, self.split = data, protocol, config, split
        self.relation: Qrels = data.corpus.split(split)
        self.positives: Qrels = data.corpus.positives()
        self.queries = np.array(sorted(self.relation))
        bare = np.array([len(tokens) for tokens in data.documents])
        most = config.document_tokens // int(bare.min() + protocol.wrapping(1)) + 1  # documents a pack can hold
        self.length = bare + protocol.wrapping(most)
        self.stream = zlib.crc32(split.encode())
        self.strata = self._stratify()
        self._dealt: dict[int, NDArray[np.int64]] = {}  # the last epoch or two; plain, so that workers can be spawned

    @property
    def packs_per_epoch(self) -> int:
        """Packs until every query has come once."""
        return -(-len(self.queries) // self.config.queries_per_pack)

    def plan(self, index: int) -> Plan:
        """Chooses the queries and documents of pack `index` (any number from 0; epochs follow one another)."""
        epoch, place = divmod(index, self.packs_per_epoch)
        dealt = self._deal(epoch)[:, place]
        rng = self._rng(1, index)
        queries = rng.permutation(dealt[dealt >= 0]).tolist()
        documents = dict.fromkeys(document for query in queries for document in self.positives[query])
        used = int(self.length[list(documents)].sum())
        for document in self._random_documents(rng, used):
            if document in documents or used + self.length[document] > self.config.document_tokens:
                continue
            documents[document] = None
            used += int(self.length[document])
        order = list(documents)
        rng.shuffle(order)
        may_answer = [row for row, query in enumerate(queries) if self.data.answers[query] is not None]
        rng.shuffle(may_answer)
        chosen = set(may_answer[: round(self.config.answer_share * len(queries))])
        return Plan(queries, order, [row in chosen for row in range(len(queries))])

    def pack(self, index: int) -> MemoryPack:
        """Builds pack `index`. Its step counts are its own; `PackDataset` knows those of the whole step."""
        plan, data = self.plan(index), self.data
        place = {document: number for number, document in enumerate(plan.documents, start=1)}
        contexts = []
        positive_QD = torch.zeros(len(plan.queries), len(plan.documents), dtype=torch.bool)
        for row, (query, answered) in enumerate(zip(plan.queries, plan.answered, strict=True)):
            gold = self._gold(query, place)
            positive_QD[row, [source.number - 1 for source in gold]] = True
            contexts.append(
                self.protocol.context(
                    data.queries[query].tolist(), gold, _list(data.answers[query]) if answered else None
                )
            )
        documents = [
            self.protocol.document(Source(number, data.documents[document].tolist()))
            for document, number in place.items()
        ]
        packed = Contexts.build(self.protocol.head(), contexts)
        return MemoryPack(
            documents=Documents.build(documents, self.config.chunk_size),
            contexts=packed,
            positive_QD=positive_QD,
            document_ids=tuple(data.corpus.document_ids[document] for document in plan.documents),
            query_ids=tuple(data.corpus.query_ids[query] for query in plan.queries),
            index=index,
            step_labels=len(packed.label_target_N),
            step_queries=len(plan.queries),
        )

    def counts(self, index: int) -> tuple[int, int]:
        """Labelled tokens and queries of pack `index`, from its plan alone."""
        plan = self.plan(index)
        place = {document: number for number, document in enumerate(plan.documents, start=1)}
        labels = 0
        for query, answered in zip(plan.queries, plan.answered, strict=True):
            answer = self.data.answers[query] if answered else None
            numbers = [source.number for source in self._gold(query, place)]
            labels += self.protocol.labels(numbers, None if answer is None else len(answer))
        return labels, len(plan.queries)

    def _gold(self, query: int, place: dict[int, int]) -> list[Source]:
        return sorted(
            (Source(place[document], self.data.documents[document].tolist()) for document in self.positives[query]),
            key=lambda source: source.number,
        )

    def _random_documents(self, rng: np.random.Generator, used: int) -> list[int]:
        # enough to fill the rest twice over; drawn without replacement, so cost does not grow with the corpus
        wanted = int(2 * (self.config.document_tokens - used) / self.length.mean()) + 8
        return list(dict.fromkeys(rng.integers(len(self.length), size=wanted).tolist()))

    def _stratify(self) -> NDArray[np.int64]:
        """Rows of queries with alike needs, the neediest first: [Q, packs], -1 where the last row has none."""
        self._check_documents()
        self._check_queries()
        need = np.array([self.length[self.positives[query]].sum() for query in self.queries.tolist()])
        order = np.argsort(-need, kind="stable")
        rows = self.config.queries_per_pack, self.packs_per_epoch
        strata = np.full(rows[0] * rows[1], -1)
        strata[: len(order)] = self.queries[order]
        most = int(need[order[:: rows[1]]].sum())
        if most > self.config.document_tokens:
            raise UserError(
                f"data: the positives of {rows[0]} queries of '{self.split}' may have {most} tokens (up to "
                f"{need[order[0]]} a query), more than document_tokens {self.config.document_tokens}: "
                "lower queries_per_pack or raise document_tokens"
            )
        return strata.reshape(rows)

    def _deal(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._dealt:
            self._dealt = dict(list(self._dealt.items())[-1:])
            self._dealt[epoch] = self._rng(0, epoch).permuted(self.strata, axis=1)
        return self._dealt[epoch]

    def _rng(self, purpose: int, counter: int) -> np.random.Generator:
        key = np.array([self.config.seed, (self.stream << 1) | purpose], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, counter]))

    def _check_documents(self) -> None:
        budget, longest = self.config.document_tokens, int(self.length.argmax())
        if self.length[longest] > budget:
            over = int((self.length > budget).sum())
            raise UserError(
                f"data: document '{self.data.corpus.document_ids[longest]}' has {self.length[longest]} tokens, more "
                f"than document_tokens {budget} ({over} such); raise the budget or split the documents"
            )

    def _check_queries(self) -> None:
        longest = max(self.queries.tolist(), key=lambda query: len(self.data.queries[query]))
        tokens = len(self.data.queries[longest])
        if tokens > self.config.document_tokens:
            raise UserError(
                f"data: query '{self.data.corpus.query_ids[longest]}' has {tokens} tokens, more than document_tokens "
                f"{self.config.document_tokens}; shorten it or raise the budget"
            )


class PackDataset(Dataset[MemoryPack]):
    """Packs with the counts of the optimiser step that each belongs to.

    The counts come from plans, not from ranks talking to each other: a pack is a pure function of its index, so every
    rank can work out what the others hold.

    Args:
        packer: Makes the packs.
        packs_per_step: Packs of one optimiser step over all ranks and accumulations.
        cycle: Repeat the first `cycle` packs for ever (to overfit them); 0 for never.
    """

    def __init__(self, packer: Packer, packs_per_step: int = 1, cycle: int = 0) -> None:
        self.packer, self.packs_per_step, self.cycle = packer, packs_per_step, cycle
        self._counted: tuple[int, tuple[int, int]] = (-1, (0, 0))  # the last step and its counts

    def __getitem__(self, index: int) -> MemoryPack:
        pack = self.packer.pack(self._source(index))
        if self.packs_per_step == 1:
            return pack
        step = index // self.packs_per_step
        if self._counted[0] != step:
            self._counted = step, self._count_step(step)
        labels, queries = self._counted[1]
        return replace(pack, step_labels=labels, step_queries=queries)

    def _source(self, index: int) -> int:
        return index % self.cycle if self.cycle else index

    def _count_step(self, step: int) -> tuple[int, int]:
        first = step * self.packs_per_step
        counts = [self.packer.counts(self._source(index)) for index in range(first, first + self.packs_per_step)]
        return sum(labels for labels, _ in counts), sum(queries for _, queries in counts)


def _list(ids: Ids | None) -> list[int] | None:
    return None if ids is None else ids.tolist()
