"""A corpus in BEIR's format: documents, queries, and which documents answer which query.

    corpus.jsonl        {"_id": "d1", "title": "...", "text": "..."}
    queries.jsonl       {"_id": "q1", "text": "...", "answers": ["..."]}      (answers are optional)
    qrels/{split}.tsv   query-id <TAB> corpus-id <TAB> score, with that header

The invariant: what comes out is complete. Every id of the qrels is known and every text is there; anything else is a
`UserError` that names file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msa_train.errors import UserError

Qrels = dict[int, list[int]]


@dataclass(frozen=True)
class Corpus:
    """Documents and queries with their relations, by position.

    Args:
        document_ids: `_id` of every document.
        documents: Text of every document, its title in front.
        query_ids: `_id` of every query.
        queries: Text of every query.
        answers: The first answer of every query, None where it has none.
        qrels: Per split, the relevant documents (ascending) of every query that has any.
    """

    document_ids: list[str]
    documents: list[str]
    query_ids: list[str]
    queries: list[str]
    answers: list[str | None]
    qrels: dict[str, Qrels]

    def positives(self) -> Qrels:
        """Relevant documents of every query over all splits: none of them is ever a negative."""
        merged: dict[int, set[int]] = {}
        for relation in self.qrels.values():
            for query, documents in relation.items():
                merged.setdefault(query, set()).update(documents)
        return {query: sorted(documents) for query, documents in merged.items()}

    def split(self, name: str) -> Qrels:
        """Relevant documents per query of one split.

        Raises:
            UserError: There is no such split.
        """
        if name not in self.qrels:
            raise UserError(f"data: no split '{name}'; qrels/ has {', '.join(sorted(self.qrels))}")
        return self.qrels[name]


def read_beir(folder: Path) -> Corpus:
    """Reads a BEIR folder.

    Raises:
        UserError: A file is missing, a line is malformed, an id is unknown or repeated, or there is nothing to read.
    """
    documents = _records(folder / "corpus.jsonl", ("text",))
    queries = _records(folder / "queries.jsonl", ("text",))
    document_row, query_row = _rows(documents), _rows(queries)
    files = sorted((folder / "qrels").glob("*.tsv"))
    if not files:
        raise UserError(f"{folder / 'qrels'}: no *.tsv file; add qrels/train.tsv with query-id, corpus-id, score")
    answers: list[str | None] = []
    for place, record in queries:
        given = record.get("answers") or [None]
        if not isinstance(given, list) or not isinstance(given[0], str | None):
            raise UserError(f"{place}: 'answers' must be a list of strings")
        answers.append(given[0] or None)
    return Corpus(
        document_ids=list(document_row),
        documents=[f"{r.get('title') or ''} {r['text']}".strip() for _, r in documents],
        query_ids=list(query_row),
        queries=[r["text"].strip() for _, r in queries],
        answers=answers,
        qrels={file.stem: _qrels(file, query_row, document_row) for file in files},
    )


def _records(file: Path, required: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    records = []
    for place, line in _lines(file):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{place}: not valid JSON ({str(error)[:80]})") from error
        if not isinstance(record, dict):
            raise UserError(f"{place}: expected an object with _id and {', '.join(required)}")
        for key in ("_id", *required):
            if not isinstance(record.get(key), str) or not record[key].strip():
                raise UserError(f"{place}: '{key}' is missing, empty or not a string")
        records.append((place, record))
    if not records:
        raise UserError(f"{file}: empty; it needs at least one record")
    return records


def _rows(records: list[tuple[str, dict[str, Any]]]) -> dict[str, int]:
    rows: dict[str, int] = {}
    for place, record in records:
        if record["_id"] in rows:
            raise UserError(f"{place}: _id '{record['_id']}' occurs twice")
        rows[record["_id"]] = len(rows)
    return rows


def _qrels(file: Path, query_row: dict[str, int], document_row: dict[str, int]) -> Qrels:
    relation: dict[int, set[int]] = {}
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
        if query not in query_row:
            raise UserError(f"{place}: query '{query}' is not in queries.jsonl")
        if document not in document_row:
            raise UserError(f"{place}: document '{document}' is not in corpus.jsonl")
        if relevant:
            relation.setdefault(query_row[query], set()).add(document_row[document])
    if not relation:
        raise UserError(f"{file}: no relevant pair; every split needs at least one")
    return {query: sorted(documents) for query, documents in sorted(relation.items())}


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    if not file.is_file():
        raise UserError(f"{file}: no such file; a BEIR folder has corpus.jsonl, queries.jsonl and qrels/*.tsv")
    with file.open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            try:
                yield f"{file}:{number}", raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{file}:{number}: not UTF-8") from error
