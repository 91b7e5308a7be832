"""Collection: several stores as one corpus, rows numbered through, each with a weight.

A weight says how often a corpus comes compared with once: its queries come `weight` times an epoch, and its documents
are drawn as distractors `weight` times as often.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.store import Ids, Store
from msa_train.errors import UserError

Rows = NDArray[np.int64]


class Collection:
    """Stores side by side.

    Args:
        stores: The stores.
        weights: One per store, positive.

    Raises:
        UserError: There is no document at all, or two stores have one name.
    """

    def __init__(self, stores: Sequence[Store], weights: Sequence[float]) -> None:
        self.stores, self.weights = tuple(stores), tuple(weights)
        for name, times in Counter(store.name for store in stores).items():
            if times > 1:
                raise UserError(
                    f"data.corpus: {times} corpora are named '{name}', by which their documents are told apart: rename "
                    "the folder or file of one, and if it is a store, pack it anew"
                )
        self.first_document = np.cumsum([0, *(len(store.tokens) for store in stores)])
        self.first_query = np.cumsum([0, *(len(store.questions) for store in stores)])
        self._document_starts, self._query_starts = self.first_document.tolist(), self.first_query.tolist()
        if not self.documents:
            raise UserError("data.corpus: no document in any corpus; instructions need a corpus beside them")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.first_document[-1])

    @cached_property
    def length_D(self) -> Ids:
        """Tokens of every document's text."""
        return np.concatenate([store.tokens.lengths() for store in self.stores])

    @cached_property
    def digest_D(self) -> NDArray[np.int64]:
        """A number per document that is equal where texts are, across corpora."""
        return np.concatenate([store.digests for store in self.stores])

    @cached_property
    def question_length_Q(self) -> Ids:
        """Tokens of every query."""
        return np.concatenate([store.questions.lengths() for store in self.stores])

    @cached_property
    def answer_length_Q(self) -> Ids:
        """Tokens of every query's answer, 0 where there is none."""
        return np.concatenate([store.answer_tokens.lengths() for store in self.stores])

    @cached_property
    def instruction_Q(self) -> NDArray[np.bool_]:
        """Which queries are instructions, that read no document."""
        return np.concatenate([store.instruction for store in self.stores])

    @cached_property
    def by_length(self) -> Rows:
        """All documents, the shortest first."""
        return np.argsort(self.length_D, kind="stable")

    def document(self, row: int) -> Ids:
        """Token ids of `" " + text`."""
        number, place = self.locate_document(row)
        return self.stores[number].tokens[place]

    def document_id(self, row: int) -> str:
        """Name of a document, that of its corpus in front where there are several."""
        number, place = self.locate_document(row)
        store = self.stores[number]
        name = store.document(place, "id")
        return name if len(self.stores) == 1 else f"{store.name}/{name}"

    def document_text(self, row: int) -> str:
        """Words of a document."""
        number, place = self.locate_document(row)
        return self.stores[number].document(place, "text")

    def question(self, row: int) -> Ids:
        """Token ids of a query."""
        number, place = self.locate_query(row)
        return self.stores[number].questions[place]

    def answer(self, row: int) -> Ids | None:
        """Token ids of the answer to write, if there is one."""
        number, place = self.locate_query(row)
        tokens = self.stores[number].answer_tokens[place]
        return tokens if len(tokens) else None

    def query(self, row: int, column: str) -> Any:
        """A cell of the queries' table: `id`, `text`, `answers`."""
        number, place = self.locate_query(row)
        return self.stores[number].query(place, column)

    def steps(self, row: int) -> list[list[int]]:
        """Documents to find at each step; none for an instruction."""
        number, place = self.locate_query(row)
        store, first = self.stores[number], int(self.first_document[number])
        positives = iter(store.positives[place].tolist())
        return [[first + next(positives) for _ in range(size)] for size in store.step_sizes[place].tolist()]

    def related(self, row: int) -> list[int]:
        """Documents that are known to be relevant without being asked for."""
        number, place = self.locate_query(row)
        first = int(self.first_document[number])
        return [first + document for document in self.stores[number].related[place].tolist()]

    def split(self, name: str) -> list[Rows]:
        """Rows of a split's queries, per store.

        Raises:
            UserError: No corpus has such a split.
        """
        found = [
            first + store.splits.get(name, np.zeros(0, np.int64))
            for store, first in zip(self.stores, self.first_query.tolist(), strict=False)
        ]
        if not any(len(rows) for rows in found):
            known = sorted({split for store in self.stores for split in store.splits})
            raise UserError(f"data: no split '{name}'; the corpus has {', '.join(known)}")
        return found

    def needs(self, per_document: int, most: int, room: int) -> NDArray[np.int64]:
        """Tokens of the documents that each query may ask for, at most: see `Planner`.

        Args:
            per_document: Tokens of a document's wrapping.
            most: Documents of one step that come into a pack.
            room: Tokens of a query's documents, of which each of its steps has an equal part.
        """
        parts = []
        for number, store in enumerate(self.stores):
            text = self.length_D[self.first_document[number] : self.first_document[number + 1]]
            length = text.astype(np.int64) + per_document
            total = np.concatenate([[0], np.cumsum(length[store.positives.flat()])])
            counts = store.positives.lengths()
            stop = np.cumsum(counts, dtype=np.int64)
            need = total[stop] - total[stop - counts]
            share = room // np.maximum(store.step_sizes.lengths(), 1)
            for row in ((counts > most) | (need > share)).nonzero()[0].tolist():
                bounds = np.cumsum([0, *store.step_sizes[row]]).tolist()
                steps = [np.sort(length[store.positives[row][a:b]]) for a, b in zip(bounds, bounds[1:], strict=False)]
                need[row] = sum(max(int(step[-1]), min(int(step[-most:].sum()), int(share[row]))) for step in steps)
            parts.append(need)
        return np.concatenate(parts)

    def locate_document(self, row: int) -> tuple[int, int]:
        """Number of a document's store, and its row there."""
        number = bisect_right(self._document_starts, row) - 1
        return number, row - self._document_starts[number]

    def locate_query(self, row: int) -> tuple[int, int]:
        """Number of a query's store, and its row there."""
        number = bisect_right(self._query_starts, row) - 1
        return number, row - self._query_starts[number]
