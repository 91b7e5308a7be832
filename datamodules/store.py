"""The Arrow store: one corpus tokenised once, opened by memory map, however large it is.

    manifest.json            format, source, tokenizer, counts, what was dropped; written last, so it marks completeness
    documents-00000.arrow    id, source, start, text, tokens, digest
    queries-00000.arrow      id, text, tokens, answers, answer, positives, step_sizes, related, splits, instruction

Rows are numbered through all files. `positives` are rows of documents, `step_sizes` cuts them into the steps of an
evidence chain; `related` are rows that are known to be relevant in some other way and so never negatives.
The invariant: a part of a document is the slice of its source's text that begins at `start`.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from msa_train.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
AGAIN = "move it away, and have msa-train pack build it again from its corpus"
Ids = NDArray[np.int32]

DOCUMENTS = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "start": pa.int32(),
        "text": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "digest": pa.int64(),
    }
)
QUERIES = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "tokens": pa.list_(pa.int32()),
        "answers": pa.list_(pa.string()),
        "answer": pa.list_(pa.int32()),
        "positives": pa.list_(pa.int32()),
        "step_sizes": pa.list_(pa.int32()),
        "related": pa.list_(pa.int32()),
        "splits": pa.list_(pa.string()),
        "instruction": pa.bool_(),
    }
)


class Ragged:
    """Rows of integers of varying length, read from an Arrow column without copying it.

    >>> rows = Ragged(pa.chunked_array([[[7, 8], []], [[9]]], pa.list_(pa.int32())))
    >>> len(rows), rows[0].tolist(), rows[2].tolist(), rows.lengths().tolist(), rows.flat().tolist()
    (3, [7, 8], [9], [2, 0, 1], [7, 8, 9])
    """

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._values, self._offsets = [], []
        for chunk in column.chunks:
            self._values.append(chunk.values.to_numpy(zero_copy_only=True))
            self._offsets.append(chunk.offsets.to_numpy(zero_copy_only=True))
        self._first = [0, *accumulate(len(offsets) - 1 for offsets in self._offsets)]

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row: int) -> Ids:
        if not 0 <= row < len(self):
            raise IndexError(row)
        chunk = bisect_right(self._first, row) - 1
        place, offsets = row - self._first[chunk], self._offsets[chunk]
        return self._values[chunk][offsets[place] : offsets[place + 1]]

    def lengths(self) -> Ids:
        """Length of every row."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets] or [np.zeros(0, np.int32)])

    def flat(self) -> Ids:
        """All rows end to end, as one copy."""
        parts = [v[o[0] : o[-1]] for v, o in zip(self._values, self._offsets, strict=True)]
        return np.concatenate(parts or [np.zeros(0, np.int32)])


class Store:
    """One corpus in token ids.

    Args:
        folder: Where `datamodules.building.build_store` wrote it.

    Raises:
        UserError: There is no complete store, or it is of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.name: str = self.manifest["name"]
        documents, queries = open_table(folder, "documents", DOCUMENTS), open_table(folder, "queries", QUERIES)
        self._documents, self._queries = documents, queries
        self.tokens = Ragged(documents.column("tokens"))
        self.digests: NDArray[np.int64] = documents.column("digest").to_numpy()
        self.questions, self.answer_tokens = Ragged(queries.column("tokens")), Ragged(queries.column("answer"))
        self.positives, self.step_sizes = Ragged(queries.column("positives")), Ragged(queries.column("step_sizes"))
        self.related = Ragged(queries.column("related"))
        self.instruction: NDArray[np.bool_] = queries.column("instruction").to_numpy()

    def __reduce__(self) -> tuple[Any, ...]:  # a spawned worker maps the files itself
        return Store, (self.folder,)

    def document(self, row: int, column: str) -> Any:
        """A cell of the documents' table."""
        return self._documents.column(column)[row].as_py()

    def query(self, row: int, column: str) -> Any:
        """A cell of the queries' table."""
        return self._queries.column(column)[row].as_py()

    def texts(self) -> Any:
        """All documents' texts, an Arrow column."""
        return self._documents.column("text")

    @cached_property
    def identity(self) -> str:
        """Tells the rows of its tables from those of other documents, queries, limits and tokenizers; the same on any
        machine."""
        made_of = [input_of(read_rows(file)) for file in sorted(self.folder.glob("queries-*.arrow"))]
        manifest = self.manifest
        key = (manifest["content"], manifest["max_document_tokens"], manifest["tokenizer"], made_of)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:16]

    @cached_property
    def splits(self) -> dict[str, NDArray[np.int64]]:
        """Rows of the queries of every split."""
        column = self._queries.column("splits").combine_chunks()
        row = np.repeat(np.arange(len(column)), np.diff(column.offsets.to_numpy()))
        name = column.flatten().to_numpy(zero_copy_only=False)
        return {split: row[name == split] for split in sorted(set(name))}


def is_store(folder: Path) -> bool:
    """Whether a folder is a store; a BEIR folder may have a manifest.json of its own."""
    return (folder / MANIFEST).is_file() and not (folder / "corpus.jsonl").is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A store's manifest.

    Raises:
        UserError: It is missing, broken or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}: no complete store (msa-train pack builds one): {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: a store of another format; {AGAIN}")
    for name, sound in SOUND.items():
        if not sound(manifest.get(name)):
            raise UserError(f"{folder / MANIFEST}: damaged: '{name}' is missing, or not what it should be; {AGAIN}")
    return manifest


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


SOUND: dict[str, Callable[[Any], bool]] = {
    # it begins the name of a file, beside others of its folder
    "name": lambda value: isinstance(value, str) and "/" not in value and "\0" not in value,
    "content": lambda value: isinstance(value, str) and bool(re.fullmatch("[0-9a-f]{64}", value)),
    "tokenizer": lambda value: isinstance(value, str),
    **dict.fromkeys(("max_document_tokens", "documents", "sources", "split", "tokens", "neutralised"), _count),
    **dict.fromkeys(("lengths", "queries", "dropped"), _counts),
}


def open_table(folder: Path, name: str, schema: pa.Schema) -> pa.Table:
    """All shards of that name as one memory-mapped table.

    Raises:
        UserError: A file is damaged.
    """
    files = sorted(folder.glob(f"{name}-*.arrow"))
    if not files:
        return schema.empty_table()
    try:
        parts = [datasets.Dataset.from_file(str(file)).data.table for file in files]
        table = pa.concat_tables(parts).select(schema.names)
    except (OSError, KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{folder}: the store is damaged ({error}); {AGAIN}") from error
    return table


def read_rows(file: Path) -> pa.Table:
    """The rows of an Arrow file, memory-mapped."""
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def input_of(rows: pa.Table) -> str:
    """Digest of the records that a file's rows were made of."""
    return (rows.schema.metadata or {}).get(b"input", b"").decode()
