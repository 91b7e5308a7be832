"""What every corpus reader yields, whatever the files look like: documents, and queries with their relations.

Readers stream: neither documents nor queries are ever held as a whole, so a corpus may be larger than memory. The
invariant: what a reader yields is checked text; anything malformed is a `UserError` that names the place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from msa_train.errors import UserError

EDGE = 65_536


@dataclass(frozen=True)
class Document:
    """A document as its source has it.

    Args:
        id: Its name, unique within the corpus. The same id may come again with the same text (it is read once).
        text: Its words, the title in front; not empty.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Query:
    """A question and what is known of its answer.

    Args:
        id: Its name, unique within the corpus.
        text: Its words; not empty.
        relevant: Per split, ids of the documents that answer it. Empty for an instruction.
        steps: Evidence chain of a multi-hop question: ids to retrieve at each step. Empty for one step.
        answers: Accepted answers, the one to write first.
        instruction: True for short-context instruction following, which reads no document; its answer is the response.
            `relevant` is then `{split: ()}`.
    """

    id: str
    text: str
    relevant: Mapping[str, tuple[str, ...]]
    steps: tuple[tuple[str, ...], ...] = ()
    answers: tuple[str, ...] = ()
    instruction: bool = False


@dataclass
class Dropped:
    """What a reader left out, counted by reason, for the report."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str) -> None:
        """Counts one."""
        self.counts[reason] = self.counts.get(reason, 0) + 1


def encodable(text: str, name: str) -> str:
    """The text itself, if it can be written as UTF-8.

    Raises:
        UserError: Half a surrogate pair is in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"record {name!r}: half a surrogate pair in its text; write it as UTF-8") from error
    return text


def file_state(file: Path) -> str:
    """Changes when a file does: its name, size, time, and what its first and last 64 KB say."""
    try:
        stat = file.stat()
        digest = hashlib.sha256(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
        with file.open("rb") as handle:
            digest.update(handle.read(EDGE))
            handle.seek(max(stat.st_size - EDGE, 0))
            digest.update(handle.read(EDGE))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


class CorpusReader(Protocol):
    """One corpus. `documents` and `queries` may be called again and then yield the same."""

    name: str
    dropped: Dropped

    def fingerprint(self) -> str:
        """Changes when the source changes: names, sizes and times of its files, or its revision."""
        ...

    def documents(self) -> Iterator[Document]:
        """Every document, in a fixed order."""
        ...

    def queries(self) -> Iterator[Query]:
        """Every query, in a fixed order."""
        ...

    def unknown(self, query: str, document: str) -> None:
        """Called for a relation to a document that `documents` did not yield: raises a `UserError` that names the
        place, or returns to have the relation left out and counted."""
        ...
