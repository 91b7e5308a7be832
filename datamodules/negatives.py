"""Mined negatives: documents that look like an answer to a query and are none, as far as is known.

A candidate is kept only where it scores below 95% of every known positive of the query and does not hold an answer's
words: what scores higher is too often right and merely unlabelled (sentence-transformers' relative margin). The
invariant: nothing that is known to be relevant is ever a mined negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock
from rich import get_console
from rich.markup import escape
from rich.progress import track

from datamodules.answers import holds_answer
from datamodules.cache import writing
from datamodules.collection import Collection
from datamodules.lexical import LexicalIndex
from datamodules.shards import write_rows
from datamodules.store import Ragged, Store, read_rows
from msa_train.errors import UserError
from msa_train.printable import printable

MARGIN = 0.95
KEPT = 16  # per query: what packs draw from
DEPTH = 64  # candidates looked at per query
SCHEMA = pa.schema({"documents": pa.list_(pa.int32())})


class Mined:
    """Negatives of every query of a collection.

    Args:
        data: The collection; every store has its own file.
        files: One per store, as `save` wrote it.

    Raises:
        UserError: A file is damaged, or of another store.
    """

    def __init__(self, data: Collection, files: Sequence[Path]) -> None:
        self.data, self.files = data, tuple(files)
        self.parts = [_read(file, store) for file, store in zip(files, data.stores, strict=True)]

    def __reduce__(self) -> tuple[object, ...]:
        return Mined, (self.data, self.files)

    def of(self, query: int) -> list[int]:
        """Rows of a query's mined negatives, the hardest first."""
        number, place = self.data.locate_query(query)
        first = int(self.data.first_document[number])
        return [first + row for row in self.parts[number][place].tolist()]


def keep_negatives(
    candidates: Iterable[tuple[int, float]],
    positive_scores: Sequence[float],
    known: set[int],
    answers: list[str],
    text: Callable[[int], str],
) -> list[int]:
    """The candidates that may serve as negatives, in their order.

    With positives that score 10 and 8, candidates of 9, 7.7 and 7 leave the last: 95% of 8 is 7.6.

    Args:
        candidates: Rows and scores, the best first.
        positive_scores: Scores of the known positives.
        known: Rows that are known to be relevant.
        answers: What a negative must not hold.
        text: Words of a document.
    """
    lowest = min(positive_scores)
    limit = lowest - (1 - MARGIN) * abs(lowest)
    kept: list[int] = []
    for row, score in candidates:
        if score < limit and row not in known and not holds_answer(text(row), answers):
            kept.append(row)
            if len(kept) == KEPT:
                break
    return kept


def mine_bm25(store: Store) -> Path:
    """Negatives by BM25 for every query of a store, mined once and kept in it.

    The store's texts and their index are in memory while it works.

    Raises:
        UserError: They are not there, and nothing can be written there.
    """
    file = store.folder / "negatives-bm25.arrow"
    if file.is_file():  # of a store that is carried, perhaps to where nothing can be written
        return file
    with writing(store.folder), FileLock(f"{store.folder}.lock"):  # ranks wait for the one that mines
        if not file.is_file():
            save(file, _bm25_negatives(store))
    return file


def _bm25_negatives(store: Store) -> list[list[int]]:
    texts = store.texts().to_pylist()
    index = LexicalIndex(texts)
    negatives: list[list[int]] = []
    for row in track(
        range(len(store.questions)),
        escape(printable(f"Mining negatives of {store.name} by BM25")),
        transient=True,
        disable=not get_console().is_terminal,
    ):
        positives, sizes = store.positives[row].tolist(), store.step_sizes[row].tolist()
        score_D = index.scores(store.query(row, "text"))
        # the question leads to the first step of a chain alone; a positive that shares no word with it says nothing
        reached = [float(score) for score in score_D[positives[: sizes[0]] if sizes else []] if score > 0]
        if not reached:
            negatives.append([])
            continue
        best = np.argpartition(-score_D, min(DEPTH, len(score_D) - 1))[:DEPTH]
        best = best[np.lexsort((best, -score_D[best]))]
        negatives.append(
            keep_negatives(
                [(int(document), float(score_D[document])) for document in best if score_D[document] > 0],
                reached,
                {*positives, *store.related[row].tolist()},
                store.query(row, "answers"),
                lambda document: texts[document],
            )
        )
    return negatives


def mined_file(folder: Path, store: Store) -> Path:
    """Where a folder of mined negatives keeps those of a store, whose rows they are and no other's."""
    return folder / f"{store.name}-{store.identity}.arrow"


def save(file: Path, negatives: list[list[int]]) -> None:
    """Writes the negatives of a store's queries, one list each, aside and then in place."""
    write_rows(file, [{"documents": rows} for rows in negatives], SCHEMA)


def _read(file: Path, store: Store) -> Ragged:
    try:
        found = Ragged(read_rows(file).column("documents"))
        rows = found.flat()
    except (OSError, KeyError, AttributeError, pa.ArrowInvalid) as error:
        raise UserError(f"{file}: not a file of mined negatives ({error}); move it away and mine again") from error
    if len(found) != len(store.questions) or (len(rows) and not 0 <= rows.min() <= rows.max() < len(store.tokens)):
        raise UserError(f"{file}: negatives of other queries or documents; move it away and mine again")
    return found
