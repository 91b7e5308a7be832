"""The published MSA benchmark (huggingface.co/datasets/EverMind-AI/MSA-RAG-BENCHMARKS) as a corpus.

Every benchmark is a pair of pickles, as src/benchmarks.py of EverMind-AI/MSA names them:

    qdata_{name}.pkl    [{"query": "...", "reference_list": ["...", ...], "answer": "..."}, ...]
    mdata_{name}.pkl    ["...", ...]    every text of the memory, the references among them

Relations are by text, so a document's id is the digest of its text and a text that comes twice is one document. The
one invariant beyond a reader's: a relevant document is always there, even if the memory lacks it. A pickle cannot be
read in parts, so this reader holds the corpus; `convert` writes it once as a BEIR folder, which streams.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datamodules.pickles import read_pickle
from datamodules.records import Document, Dropped, Query, file_state
from msa_train.errors import UserError

QUERY = ("query", "question")
ANSWER = ("answer", "answers")
REFERENCES = ("reference_list", "references", "reference")


class PublishedReader:
    """Reads a benchmark's pickles; nothing in them is run.

    Args:
        file: The queries: a list of dicts as above, a list of (query, answer, references), or a dict of three equally
            long lists.
        memory: The pickle of the documents; unless given, the one beside a file named qdata_*.
        split: The split that the relations belong to.
    """

    def __init__(self, file: Path | str, memory: Path | str | None = None, split: str = "test") -> None:
        if not re.fullmatch(r"[\w-]+", split):
            raise UserError(f"split: '{split}' must be a word, as it names a file: for example test")
        self.file = Path(file)
        self.memory = _beside(self.file) if memory is None else Path(memory)
        self.split = split
        self.name = self.file.stem.removeprefix("qdata_")
        self.dropped = Dropped()

    def fingerprint(self) -> str:
        """Of both files: see `file_state`."""
        digest = hashlib.sha256()
        for file in filter(None, (self.file, self.memory)):
            digest.update(file_state(file).encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """The memory in its order, then the references that it lacks."""
        for identity, text in self._content.documents.items():
            yield Document(identity, text)

    def queries(self) -> Iterator[Query]:
        """The queries in their order, named by their row."""
        yield from self._content.queries

    def unknown(self, query: str, document: str) -> None:
        """Refuses: every reference is a document."""
        raise UserError(f"{self.file}: query '{query}': no document '{document}'; read the documents of the same files")

    @cached_property
    def _content(self) -> _Content:
        content = _Content(self.dropped)
        if self.memory is not None:
            texts = _sequence(read_pickle(self.memory), str(self.memory))
            for row, text in enumerate(texts):
                content.add(text, f"{self.memory}: [{row}]", "empty document")
        for row, record in enumerate(_rows(self.file)):
            content.add_query(row, record, f"{self.file}: [{row}]", self.split)
        if not content.queries:
            raise UserError(f"{self.file}: no query with a reference; name the file of the queries (qdata_*.pkl)")
        return content


def convert(file: Path | str, folder: Path | str, memory: Path | str | None = None, split: str = "test") -> Dropped:
    """Writes a benchmark as a BEIR folder, whole or not at all, and returns what was left out.

    Raises:
        UserError: The folder is there already, or as in `PublishedReader`.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{folder}: is there already and is not overwritten; remove it or name another folder")
    reader = PublishedReader(file, memory, split)
    next(reader.queries())  # reads the files: their faults show before anything is written
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        (unfinished / "qrels").mkdir(parents=True)
        _write(reader, unfinished)
        unfinished.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return reader.dropped


@dataclass
class _Content:
    """What the files hold, checked."""

    dropped: Dropped
    documents: dict[str, str] = field(default_factory=dict)
    queries: list[Query] = field(default_factory=list)

    def add(self, value: object, place: str, reason: str) -> str | None:
        """Id of a text, which becomes a document; None if it is empty, counted under the reason."""
        text = _text(value, place)
        if not text:
            self.dropped.add(reason)
            return None
        identity = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.documents.setdefault(identity, text)
        return identity

    def add_query(self, row: int, record: Mapping[str, Any], place: str, split: str) -> None:
        """One row of the queries, with its references as documents."""
        text = _text(record["query"], f"{place}: query")
        if not text:
            raise UserError(f"{place}: query is empty; every row needs one")
        answers = _answers(record["answer"], f"{place}: answer")
        place = f"{place}: references"
        given = [self.add(text, place, "empty reference") for text in _listed(record["references"], place)]
        relevant = tuple(dict.fromkeys(filter(None, given)))
        if not relevant:
            self.dropped.add("query without a reference")
            return
        self.queries.append(Query(f"q{row}", text, {split: relevant}, answers=answers))


def _beside(file: Path) -> Path | None:
    """The memory of a file of queries: of the same name, or the only one there (ms_100M names its two differently)."""
    if not file.name.startswith("qdata_"):
        return None
    same = file.with_name("mdata_" + file.name.removeprefix("qdata_"))
    there = [same] if same.is_file() else sorted(file.parent.glob("mdata_*.pkl"))
    if len(there) != 1:
        found = ", ".join(path.name for path in there) or "none"
        raise UserError(f"{same}: no such file; fetch it, or give the memory's path (beside the queries: {found})")
    return there[0]


def _rows(file: Path) -> Iterable[Mapping[str, Any]]:
    """Rows with the keys query, answer and references, from any of the three shapes."""
    value = read_pickle(file)
    if isinstance(value, dict):
        columns = _named(value, str(file))
        lists = {name: _sequence(column, f"{file}: {name}") for name, column in columns.items()}
        if len({len(column) for column in lists.values()}) != 1:
            sizes = ", ".join(f"{name} {len(column)}" for name, column in lists.items())
            raise UserError(f"{file}: its lists must be equally long, and are: {sizes}")
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    rows = _sequence(value, str(file))
    return (_named(row, f"{file}: [{number}]") for number, row in enumerate(rows))


def _named(row: object, place: str) -> dict[str, Any]:
    if isinstance(row, dict):
        keys = {name: next((key for key in names if key in row), None) for name, names in _NAMES.items()}
        for name, key in keys.items():
            if key is None:
                raise UserError(f"{place}: no '{_NAMES[name][0]}'; a row needs query, answer and reference_list")
        return {name: row[key] for name, key in keys.items()}
    if isinstance(row, list | tuple) and len(row) == len(_NAMES):
        return dict(zip(_NAMES, row, strict=True))
    raise UserError(f"{place}: expected a dict, or (query, answer, references), not {_kind(row)}")


_NAMES = {"query": QUERY, "answer": ANSWER, "references": REFERENCES}


def _sequence(value: object, place: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{place}: expected a list, not {_kind(value)}")
    return value


def _listed(value: object, place: str) -> list[Any] | tuple[Any, ...]:
    return [value] if isinstance(value, str) else _sequence(value, place)


def _answers(value: object, place: str) -> tuple[str, ...]:
    """Answers as text: a number may be one (a year, a count), None is none."""
    given = value if isinstance(value, list | tuple) else [value]
    texts = [_text(_numeral(item), place) for item in given if item is not None]
    return tuple(text for text in texts if text)


def _numeral(value: object) -> object:
    return str(value) if isinstance(value, int | float) and abs(value) < 1e15 else value


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: expected text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: holds half a character (U+{ord(value[error.start]):04X}); mend the text") from error
    return value.strip()


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _write(reader: PublishedReader, folder: Path) -> None:
    with (folder / "corpus.jsonl").open("w", encoding="utf-8", newline="\n") as corpus:
        for document in reader.documents():
            corpus.write(_line({"_id": document.id, "title": "", "text": document.text}))
    with (
        (folder / "queries.jsonl").open("w", encoding="utf-8", newline="\n") as queries,
        (folder / "qrels" / f"{reader.split}.tsv").open("w", encoding="utf-8", newline="\n") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for query in reader.queries():
            queries.write(_line({"_id": query.id, "text": query.text, "answers": list(query.answers)}))
            qrels.writelines(f"{query.id}\t{document}\t1\n" for document in query.relevant[reader.split])


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
