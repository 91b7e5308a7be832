"""A corpus read through a column mapping: any JSONL, Parquet or Hugging Face dataset becomes documents and queries.

The rows are read twice, once for the documents and once for the queries; neither is ever held. What is held: digests
of 16 bytes per document and query, to find repeats, and the relation where a mapping has `qrels`. The invariant: the
ids in a query's `relevant` and `steps` are those of documents that `documents` yields, except where they point into a
`corpus`, which is only known when it has been read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from datamodules.columns import (
    Row,
    aligned,
    decode_json,
    flags_at,
    joined_texts_at,
    key_at,
    keys_at,
    look_up,
    nested_keys_at,
    reject,
    text_at,
    texts_at,
)
from datamodules.mapping import ColumnMapping, DocumentColumns, Pointer, Qrels, Source, read_mapping
from datamodules.records import Document, Dropped, Query, file_state
from datamodules.sources import rows, split_files
from msa_train.errors import UserError

_NO_TEXT = "document without text"
_QUERY_REASONS = _NO_QUESTION, _NO_RESPONSE, _NO_DOCUMENT, _NOT_IN_ROW, _BROKEN_CHAIN = (
    "question without text",
    "instruction without a response",
    "question without a document that answers it",
    "relation to a document that its row does not hold",
    "question whose evidence chain leaves its row",
)

# Our split -> ids of documents, per query id.
Relation = dict[str, dict[str, list[str]]]


@dataclass
class MappedReader:
    """A `CorpusReader` over a mapping's rows.

    Args:
        path: The mapping; datamodules/mapping.py says what it holds, configs/corpora/ has examples.
        files: Our split -> path or pattern, to read the mapping's columns from files instead; `corpus` stands for its
            separate document set.

    Raises:
        UserError: The mapping is wrong; see `read_mapping`.
    """

    path: str | os.PathLike[str]
    files: Mapping[str, str | os.PathLike[str]] | None = None
    name: str = field(init=False)
    dropped: Dropped = field(init=False, default_factory=Dropped)
    mapping: ColumnMapping = field(init=False)

    def __post_init__(self) -> None:
        self.mapping = read_mapping(self.path)
        if self.files is not None:
            self.mapping = self.mapping.with_files({split: str(path) for split, path in self.files.items()})
        self.name = Path(self.path).stem

    def fingerprint(self) -> str:
        """Of the mapping and its files (see `file_state`); a hub set counts by name and revision."""
        digest = blake2b(repr(self.mapping).encode(), digest_size=16)
        for source in self._sources():
            for split in source.splits:
                for file in split_files(source, split):
                    digest.update(repr((split, file_state(file))).encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Every document once, in the order of the rows.

        Raises:
            UserError: A row is malformed, an id comes again with another text, or there is no document at all.
        """
        self.dropped.counts.pop(_NO_TEXT, None)
        # Digest of the id -> digest of the text, one object where the text names the document.
        seen: dict[bytes, bytes] = {}
        for place, document in self._every_document():
            if document is None:
                self.dropped.add(_NO_TEXT)
                continue
            text = _digest(document.text)
            id = text if document.id == text.hex() else _digest(document.id)
            if id not in seen:
                seen[id] = text
                yield document
            elif seen[id] != text:
                raise UserError(
                    f"{place}: document {document.id!r} came before with another text; "
                    "map documents.id to a column that names a document, or leave it out"
                )
        if not seen and not self.mapping.instruction:
            raise UserError(f"{self.path}: no row holds a document; check the columns under documents or corpus")

    def queries(self) -> Iterator[Query]:
        """Every query that some document answers, and every instruction, in the order of the rows.

        Raises:
            UserError: A row is malformed, an id comes twice, or there is no query at all.
        """
        for reason in _QUERY_REASONS:
            self.dropped.counts.pop(reason, None)
        relation = self._relation()
        seen: set[bytes] = set()
        for split, row in self._rows():
            query = self._query(split, row, relation)
            if isinstance(query, str):
                self.dropped.add(query)
                continue
            if (digest := _digest(query.id)) in seen:
                raise UserError(
                    f"{row.place}: query id {query.id!r} comes twice; map id to a column that names a "
                    "question, or leave it out to number the rows"
                )
            seen.add(digest)
            yield query
        if not seen:
            counts = ", ".join(f"{count} times {reason}" for reason, count in self.dropped.counts.items())
            raise UserError(f"{self.path}: no question is left ({counts or 'no row'}); check the mapping's columns")

    def unknown(self, query: str, document: str) -> None:
        """Lets the relation be left out: a corpus of its own may well lack a document that a question names."""

    def _every_document(self) -> Iterator[tuple[str, Document | None]]:
        if self.mapping.corpus is not None:
            source, columns = self.mapping.corpus
            for row in rows(source, "corpus"):
                for document in _documents(row, columns):
                    yield row.place, document
            return
        for _, row in self._rows():
            for columns in filter(None, (self.mapping.documents, self.mapping.negatives)):
                for document in _documents(row, columns):
                    yield row.place, document

    def _rows(self) -> Iterator[tuple[str, Row]]:
        for split in self.mapping.source.splits:
            for row in rows(self.mapping.source, split):
                yield split, decode_json(row, self.mapping.json)

    def _query(self, split: str, row: Row, relation: Relation) -> Query | str:
        """The row's query, or why it is left out."""
        mapping = self.mapping
        text = "\n\n".join(filter(None, (text_at(row, column) for column in mapping.query)))
        if not text:
            return _NO_QUESTION
        id = (key_at(row, mapping.id) if mapping.id else None) or f"{split}-{row.number}"
        answers = tuple(dict.fromkeys(a for column in mapping.answers for a in texts_at(row, column) if a))
        if mapping.instruction:
            if not answers:
                return _NO_RESPONSE
            return Query(id, text, {self._drawn(split, row, id): ()}, answers=answers, instruction=True)
        documents = _documents(row, mapping.documents) if mapping.documents else []
        steps = _pointed(row, mapping.steps, documents) if mapping.steps else []
        if not all(steps):
            return _BROKEN_CHAIN
        qrels = isinstance(mapping.relevant, Qrels)
        by_split: dict[str, list[str]] = {}
        for name, found in (relation.get(id, {}) if qrels else {split: self._relevant(row, documents)}).items():
            by_split.setdefault(self._drawn(name, row, id), []).extend(found)
        evidence = [document for step in steps for document in step]
        relevant = {name: tuple(dict.fromkeys([*found, *evidence])) for name, found in by_split.items()}
        if not any(relevant.values()):
            return _NO_DOCUMENT
        return Query(id, text, relevant, _chain(steps), answers)

    def _drawn(self, split: str, row: Row, id: str) -> str:
        """The split of a question, which may be held out of `train`."""
        hold_out = self.mapping.hold_out
        if hold_out is None or split != "train":
            return split
        key = id if hold_out.by is None else key_at(row, hold_out.by) or ""
        return hold_out.split if int.from_bytes(_digest(key)[:8], "big") < hold_out.share * 2**64 else split

    def _relevant(self, row: Row, documents: list[Document | None]) -> list[str]:
        relevant = self.mapping.relevant
        if isinstance(relevant, Pointer):
            pointed = _pointed(row, relevant, documents)
            for _ in range(pointed.count([])):
                self.dropped.add(_NOT_IN_ROW)
            return [document for found in pointed for document in found]
        if isinstance(relevant, str):
            flags = aligned(row, relevant, flags_at(row, relevant), len(documents), False)
        else:
            # With a chain, `all` would make its distractors answers too.
            flags = [self.mapping.steps is None] * len(documents)
        return [document.id for document, flag in zip(documents, flags, strict=True) if document and flag]

    def _relation(self) -> Relation:
        qrels, relation = self.mapping.relevant, Relation()
        if not isinstance(qrels, Qrels):
            return relation
        for split in qrels.source.splits:
            for row in rows(qrels.source, split):
                score = look_up(row, qrels.score) if qrels.score else 1
                if isinstance(score, bool) or not isinstance(score, int | float):
                    reject(row, str(qrels.score), "a number", score)
                query, document = key_at(row, qrels.query), key_at(row, qrels.document)
                if query is None or document is None:
                    raise UserError(f"{row.place}: '{qrels.query}' and '{qrels.document}' must both hold an id")
                if score > 0:
                    relation.setdefault(query, {}).setdefault(split, []).append(document)
        return relation

    def _sources(self) -> Iterator[Source]:
        yield self.mapping.source
        if self.mapping.corpus is not None:
            yield self.mapping.corpus[0]
        if isinstance(self.mapping.relevant, Qrels):
            yield self.mapping.relevant.source


def _documents(row: Row, columns: DocumentColumns) -> list[Document | None]:
    """The row's documents, None for one without text, so that flags and titles keep their places."""
    texts = joined_texts_at(row, columns.text)
    titles = [""] * len(texts)
    ids: list[str | None] = [None] * len(texts)
    if columns.title:
        titles = aligned(row, columns.title, texts_at(row, columns.title), len(texts), "")
    if columns.id:
        ids = aligned(row, columns.id, keys_at(row, columns.id), len(texts), None)
    found: list[Document | None] = []
    for id, title, text in zip(ids, titles, texts, strict=True):
        whole = f"{title} {text}".strip()
        found.append(Document(id or _digest(whole).hex(), whole) if text else None)
    return found


def _pointed(row: Row, pointer: Pointer, documents: list[Document | None]) -> list[list[str]]:
    """Per element of the pointer's column, ids of the documents that it names."""
    wanted = nested_keys_at(row, pointer.column)
    if pointer.match is None:
        return wanted
    keys = aligned(row, pointer.match, keys_at(row, pointer.match), len(documents), None)
    pairs = [(key, document.id) for key, document in zip(keys, documents, strict=True) if document]
    return [[id for key, id in pairs if key in names] for names in wanted]


def _chain(steps: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """The steps with each document where it is first mentioned; none where a single step is left.

    `[[a], [b], [a]]` gives `((a,), (b,))`, and `[[a], [a]]` gives `()`.
    """
    seen: set[str] = set()
    chain = []
    for step in steps:
        fresh = tuple(document for document in dict.fromkeys(step) if document not in seen)
        seen.update(fresh)
        if fresh:
            chain.append(fresh)
    return tuple(chain) if len(chain) > 1 else ()


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
