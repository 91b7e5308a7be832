"""RetrievalTask and AnswerTask: the questions of a corpus, over memories that its other documents fill up.

The documents that answer stand at random places of every memory, so that neither their numbers nor their order give
them away, and the rest is a stretch of one long shuffle of all others. The invariant: beside a question's own, no
document of its memory answers it, or is a copy of one that does, as far as the corpus knows.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from datamodules.collection import Collection, Rows
from datamodules.opening import open_store
from datamodules.packed_memory import PackedMemory
from datamodules.python_docs import cache_root
from msa_train.errors import UserError
from msa_train.evaluation import Asked, Task, Trial
from msa_train.evaluation.scores import answer_scores
from msa_train.memory import Passage
from msa_train.protocol import Protocol
from msa_train.source import PackSource


class CorpusTask(Task):
    """What both have in common.

    Args:
        split: Split whose questions are asked.
        corpus: Whose questions, one or several; by default the run's own. As data.corpus.
        distractors: Further corpora whose documents fill up longer memories.
        questions: Questions asked, at most, drawn by the seed.
        per_memory: Questions that share a memory. The shortest memory must hold the documents that answer them.
        seed: Draws the questions, the order of the pool, and the places of the documents that answer.
        name: Names the task in tables; by default after the split.
    """

    def __init__(
        self,
        split: str = "test",
        corpus: str | tuple[str, ...] | None = None,
        distractors: tuple[str, ...] = (),
        questions: int = 96,
        per_memory: int = 16,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        if questions < 1 or per_memory < 1:
            raise UserError(f"{type(self).__name__}: give at least 1 question, and 1 per memory")
        if seed < 0:
            raise UserError(f"{type(self).__name__}: seed is {seed}: give 0 or more")
        self.split, self.distractors = split, tuple(distractors)
        self.corpora = (corpus,) if isinstance(corpus, str) else tuple(corpus or ())
        self.questions, self.per_memory, self.seed = questions, per_memory, seed
        self.name = name or self._named(split)

    @staticmethod
    @abstractmethod
    def _named(split: str) -> str: ...

    def open(self, protocol: Protocol, data: PackSource) -> None:
        """Opens the corpora, and draws questions and pool."""
        assert isinstance(data, PackedMemory) and data.data is not None
        own = self.corpora or tuple(data.corpora)
        if not self.corpora and not self.distractors:
            self.data = data.data
        else:
            root = cache_root() / "stores"
            stores = [
                open_store(name, protocol, root, data.max_document_tokens, data.num_workers)
                for name in (*own, *self.distractors)
            ]
            self.data = Collection(stores, [1.0] * len(stores))
        asked = np.random.default_rng([self.seed, 0]).permutation(self._askable(len(own)))[: self.questions].tolist()
        self.groups = self._grouped(asked)
        self.pool_rows = self._distractors(asked)
        self.pool_end_D = self.data.length_D[self.pool_rows].astype(np.int64).cumsum()
        self.gold = [
            list(dict.fromkeys(document for row in group for document in self._gold(row))) for group in self.groups
        ]

    def _askable(self, corpora: int) -> Rows:
        """Questions of the first corpora; the others are distractors."""
        rows = np.concatenate(self.data.split(self.split)[:corpora])
        rows = np.array([row for row in rows.tolist() if self._answerable(row)], np.int64)
        if not len(rows):
            raise UserError(f"{type(self).__name__}: split '{self.split}' has no question that it can ask")
        return rows

    def _answerable(self, row: int) -> bool:
        return bool(self._gold(row))

    def _gold(self, row: int) -> list[int]:
        """The documents that answer a question, of all its steps; none for an instruction."""
        return list(dict.fromkeys(document for step in self.data.steps(row) for document in step))

    def _grouped(self, asked: Sequence[int]) -> list[list[int]]:
        """Questions that share a memory: none brings what is relevant to another, but not asked for by it."""
        groups: list[list[int]] = []
        for row in asked:
            open_ones = (group for group in groups if len(group) < self.per_memory)
            fitting = next((group for group in open_ones if not any(self._blurs(row, one) for one in group)), None)
            if fitting is None:
                groups.append([row])
            else:
                fitting.append(row)
        return groups

    def _blurs(self, one: int, other: int) -> bool:
        """Whether what answers one of two questions is known as relevant to the other, or is a copy of what is."""
        digest_D = self.data.digest_D
        for row, beside in ((one, self._gold(other)), (other, self._gold(one))):
            gold = self._gold(row)
            known = set(digest_D[[*gold, *self.data.related(row)]].tolist())
            if any(int(digest_D[document]) in known for document in beside if document not in gold):
                return True
        return False

    def _distractors(self, asked: Sequence[int]) -> Rows:
        known = {document for row in asked for document in (*self._gold(row), *self.data.related(row))}
        digest_D = self.data.digest_D
        order = np.random.default_rng([self.seed, 1]).permutation(self.data.documents)
        free = order[~np.isin(digest_D[order], digest_D[sorted(known)]) & ~np.isin(order, sorted(known))]
        _, first = np.unique(digest_D[free], return_index=True)  # of equal texts, one
        return free[np.sort(first)]

    def reach(self) -> int:
        """Tokens of all documents that may be in a memory."""
        return int(self.pool_end_D[-1]) if len(self.pool_end_D) else 0

    @property
    def pool_name(self) -> str:
        """Tasks with the same questions share it."""
        rows = hashlib.sha256(self.pool_rows.tobytes()).hexdigest()[:16]
        return f"{','.join(self.corpora)}:{','.join(self.distractors)}:{rows}"

    def pool(self, length: int) -> Sequence[Passage]:
        """The shuffled documents, as many as fill a memory of this length."""
        return Passages(self.data, self.pool_rows[: self._within(length) + max(map(len, self.gold))])

    def trials(self, length: int) -> Iterator[Trial]:
        """One memory for every few questions."""
        most = max(int(self.data.length_D[gold].sum()) for gold in self.gold)
        if most > length:
            raise UserError(
                f"task '{self.name}': the documents that answer {self.per_memory} questions have up to {most:,} "
                f"tokens, and a memory {length:,}: lower per_memory, or begin with longer memories"
            )
        for group, (rows, gold) in enumerate(zip(self.groups, self.gold, strict=True)):
            taken = int(self.data.length_D[gold].sum())
            draw = np.random.default_rng([self.seed, 2, group, length])
            number_of, length_D = self._place(gold, self._within(length - taken) + len(gold), length, draw)
            start_D = length_D.cumsum() - length_D
            yield Trial(
                pool=min(len(length_D), len(self.pool_rows)),
                own={number_of[row]: self._passage(row) for row in sorted(gold, key=number_of.__getitem__)},
                asked=tuple(self._asked(row, number_of, start_D / length_D.sum()) for row in rows),
                tokens=int(length_D.sum()),
            )

    def about(self) -> dict[str, str]:
        """Which questions, and how many documents to choose distractors from."""
        return {
            "corpora": ", ".join(store.name for store in self.data.stores),
            "split": self.split,
            "questions": str(sum(map(len, self.groups))),
            "distractors": str(len(self.pool_rows)),
            "seed": str(self.seed),
        }

    def _within(self, tokens: int) -> int:
        """Documents of the pool that have so many tokens together."""
        return int(np.searchsorted(self.pool_end_D, tokens, side="right"))

    def _place(
        self, gold: list[int], documents: int, length: int, draw: np.random.Generator
    ) -> tuple[dict[int, int], NDArray[np.int64]]:
        """Numbers for the documents that answer, and the tokens of every document of a memory that holds so many
        documents, or a few less where it would outgrow the length."""
        while True:
            documents = min(documents, len(self.pool_rows) + len(gold))
            number_G = draw.choice(documents, len(gold), replace=False) + 1
            length_D = np.zeros(documents, np.int64)
            pool_D = self.data.length_D[self.pool_rows[:documents]]
            length_D[: len(pool_D)] = pool_D
            length_D[number_G - 1] = self.data.length_D[gold]
            if length_D.sum() <= length and length_D.all():
                return dict(zip(gold, number_G.tolist(), strict=True)), length_D
            documents -= 1

    def _asked(self, row: int, number_of: dict[int, int], depth_D: NDArray[np.float64]) -> Asked:
        numbers = tuple(number_of[document] for document in self._gold(row))
        return Asked(
            id=self.data.query(row, "id"),
            text=self.data.query(row, "text"),
            gold=numbers,
            answers=tuple(self.data.query(row, "answers") or ()),
            depth=float(depth_D[min(numbers) - 1]),
        )

    def _passage(self, row: int) -> Passage:
        return Passages(self.data, np.array([row]))[0]


class RetrievalTask(CorpusTask):
    """Ranks the memory's documents for the questions of a split: recall, MRR, NDCG."""

    metric = "recall@1"
    answers = False

    @staticmethod
    def _named(split: str) -> str:
        return f"retrieval_{split}"


class AnswerTask(CorpusTask):
    """Answers the questions of a split: exact match and token F1, as SQuAD defines them."""

    metric = "f1"
    judged = True

    @staticmethod
    def _named(split: str) -> str:
        return f"answers_{split}"

    def _answerable(self, row: int) -> bool:
        return super()._answerable(row) and bool(self.data.query(row, "answers"))

    def score(self, asked: Asked, answer: str) -> dict[str, float]:
        """The best match with any of the right answers."""
        return answer_scores(answer, asked.answers)


class Passages(Sequence[Passage]):
    """Rows of a collection as passages, made when they are asked for."""

    def __init__(self, data: Collection, rows: Rows) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Passage: ...
    @overload
    def __getitem__(self, place: slice) -> Passages: ...
    def __getitem__(self, place: Any) -> Any:
        """A passage, or several."""
        if isinstance(place, slice):
            return Passages(self.data, self.rows[place])
        row = int(self.rows[place])
        return Passage(self.data.document_id(row), self.data.document_text(row), self.data.document(row))
