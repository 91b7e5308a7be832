"""A corpus in BEIR's format: documents, queries, and which documents answer which query.

    corpus.jsonl        {"_id": "d1", "title": "...", "text": "..."}
    queries.jsonl       {"_id": "q1", "text": "...", "answers": ["..."], "steps": [["d1"], ["d7"]]}
    qrels/{split}.tsv   query-id <TAB> corpus-id <TAB> score, with that header

`answers` and `steps` (the evidence chain of a multi-hop question) are optional. For a memory bank, which asks for
documents alone, corpus.jsonl is enough. The invariant: what comes out is complete. Every id of the qrels and steps is
that of a document with a title or a text; anything else is a `UserError` that names file and line. A document with
neither is left out and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.records import Document, Dropped, Query, file_state
from msa_train.errors import UserError

Relation = dict[str, dict[str, list[str]]]  # query -> split -> documents
NO_TEXT = "document without text"


class BeirReader:
    """Reads a BEIR folder, line by line. The qrels alone are held in memory.

    Args:
        folder: The folder.

    Raises:
        UserError: There is no corpus.jsonl. That other files are missing is told by `queries` and `fingerprint`, so
            before a store is begun; malformed lines, unknown and repeated ids are found while reading.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name, self.dropped = folder, folder.resolve().name, Dropped()
        self.empty: dict[str, str] = {}  # ids of documents without text, and their places
        self.qrels = sorted((folder / "qrels").glob("*.tsv"))
        self._file("corpus.jsonl")

    def fingerprint(self) -> str:
        """Of all files: see `file_state`."""
        return hashlib.sha256("".join(map(file_state, self._files())).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Every document that has words, its title in front."""
        self.empty.clear()
        for place, record in _records(self.folder / "corpus.jsonl"):
            title = record.get("title") or ""
            if not isinstance(title, str):
                raise UserError(f"{place}: 'title' must be a string")
            text = f"{title} {record['text']}".strip()
            if text:
                yield Document(record["_id"], text)
            else:
                self.empty[record["_id"]] = place
        self.dropped.counts.update({NO_TEXT: len(self.empty)} if self.empty else {})

    def queries(self) -> Iterator[Query]:
        """Every query that the qrels name."""
        _, queries, *_ = self._files()
        relation = self._relation()
        for place, record in _records(queries):
            relevant = relation.pop(record["_id"], None)
            if relevant is None:
                self.dropped.add("queries without a relevant document")
                continue
            text = record["text"].strip()
            if not text:
                raise UserError(f"{place}: 'text' is empty; a query needs words")
            yield Query(
                id=record["_id"],
                text=text,
                relevant={split: tuple(documents) for split, documents in relevant.items()},
                steps=_steps(record.get("steps"), place),
                answers=_answers(record.get("answers"), place),
            )
        if relation:
            self._complain(next(iter(relation)), None)

    def unknown(self, query: str, document: str) -> None:
        """Names the line that wants a document that is not there."""
        self._complain(query, document)

    def _files(self) -> tuple[Path, ...]:
        """All files of a corpus to train on."""
        files = self._file("corpus.jsonl"), self._file("queries.jsonl"), *self.qrels
        if not self.qrels:
            raise UserError(
                f"{self.folder / 'qrels'}: no *.tsv file; add qrels/train.tsv with query-id, corpus-id, score"
            )
        return files

    def _file(self, name: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            raise UserError(f"{file}: no such file; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv")
        return file

    def _relation(self) -> Relation:
        relation: Relation = {}
        for file in self.qrels:
            pairs = 0
            for _, query, document, relevant in _qrels(file):
                if relevant:
                    pairs += 1
                    documents = relation.setdefault(query, {}).setdefault(file.stem, [])
                    if document not in documents:
                        documents.append(document)
            if not pairs:
                raise UserError(f"{file}: no relevant pair; every split needs at least one")
        return relation

    def _complain(self, query: str, document: str | None) -> None:
        if document in self.empty:
            raise UserError(
                f"{self.empty[document]}: document '{document}' has neither title nor text, and query '{query}' asks "
                "for it; give it words, or take it out of qrels and steps"
            )
        for file in self.qrels:
            for place, name, other, relevant in _qrels(file):
                if relevant and name == query and document is None:
                    raise UserError(f"{place}: query '{query}' is not in queries.jsonl")
                if relevant and name == query and other == document:
                    raise UserError(f"{place}: document '{document}' is not in corpus.jsonl")
        raise UserError(
            f"{self.folder / 'queries.jsonl'}: a step of query '{query}' names '{document}', not in corpus.jsonl"
        )


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of every line; the same `_id` twice is refused."""
    seen: set[bytes] = set()
    for place, line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON ({str(error)[:80]})") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected an object with _id and text")
        for key in ("_id", "text"):
            if not isinstance(record.get(key), str):
                raise UserError(f"{place}: '{key}' is missing or not a string")
        if not record["_id"].strip():
            raise UserError(f"{place}: '_id' is empty; every record needs a name")
        digest = hashlib.blake2b(record["_id"].encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in seen:
            raise UserError(f"{place}: _id '{record['_id']}' occurs twice; every record needs a name of its own")
        seen.add(digest)
        yield place, record
    if not seen:
        raise UserError(f"{file}: empty; it needs at least one record")


def _answers(given: Any, place: str) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given):
        raise UserError(f"{place}: 'answers' must be a list of strings")
    return tuple(answer.strip() for answer in given if answer.strip())


def _steps(given: Any, place: str) -> tuple[tuple[str, ...], ...]:
    if given is None:
        return ()
    lists = isinstance(given, list) and all(isinstance(step, list) and step for step in given)
    if not lists or not all(isinstance(name, str) for step in given for name in step):
        raise UserError(f"{place}: 'steps' must be a list of lists of document ids, none of them empty")
    return tuple(tuple(step) for step in given)


def _qrels(file: Path) -> Iterator[tuple[str, str, str, bool]]:
    for number, (place, line) in enumerate(_lines(file)):
        if number == 0 and not line.startswith("query-id"):
            raise UserError(f"{place}: the first line must be the header: query-id, corpus-id, score between tabs")
        if number == 0 or not line.strip():
            continue
        fields = line.rstrip("\r\n").split("\t")
        if len(fields) != 3:
            raise UserError(f"{place}: expected query-id, corpus-id and score between tabs")
        query, document, score = fields
        try:
            relevant = float(score) > 0
        except ValueError as error:
            raise UserError(f"{place}: score '{score}' is not a number") from error
        yield place, query, document, relevant


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    try:
        handle = file.open("rb")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    with handle:
        for number, raw in enumerate(handle, start=1):
            try:
                # Windows' editors put a mark in front of a file
                yield f"{file}:{number}", raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: not UTF-8") from error
