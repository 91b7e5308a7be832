"""Documents split and tokenised, and one shard of a store written of them by whichever process it falls to.

The invariant: a shard's file says which records it was made of, and is complete or absent; so a build that was broken
off keeps what it has.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datamodules.splitting import split_text
from datamodules.store import DOCUMENTS, QUERIES, Ragged, input_of, read_rows
from msa_train.protocol import Protocol, neutralise

BATCH = 512  # rows per Arrow record batch
# texts and characters tokenised at once: a tokenizer's own results take ten times their room
SLICE = 256
SLICE_CHARACTERS = 8_000_000
Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """A document, or a part of one that is too long; the columns of store.DOCUMENTS.

    Args:
        id: The source's id, with `#1`, `#2`, ... behind it where there are several parts.
        source: Id of the document.
        start: Where its text begins in the document's.
        text: Its words.
        tokens: Token ids of `" " + text`.
    """

    id: str
    source: str
    start: int
    text: str
    tokens: NDArray[np.int32]


@dataclass
class Written:
    """What a shard holds.

    Args:
        input: Digest of the records that it was made of.
        parts: Parts of every document.
        tokens: Tokens of all rows.
        neutralised: Records that imitate the protocol.
        lengths: Rows by the power of two that their length reaches.
        counts: Queries per split.
    """

    input: str
    parts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    tokens: int = 0
    neutralised: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


def tokenise_documents(protocol: Protocol, file: Path, records: list[dict[str, Any]], limit: int) -> Written:
    """Splits and tokenises documents and writes them, unless `file` holds them already."""
    key = _key(records)
    if not _holds(file, key):
        documents = ((record["id"], record["text"]) for record in records)
        rows = [
            {**vars(part), "digest": int.from_bytes(text_digest(part.text)[:8], "big", signed=True)}
            for part in split_documents(protocol, documents, limit)
        ]
        write_rows(file, rows, DOCUMENTS, key)
    table = read_rows(file)
    sources = dict.fromkeys(record["id"] for record in records)
    parts_of = Counter(table.column("source").to_pylist())
    lengths = Ragged(table.column("tokens")).lengths().tolist()
    return Written(
        input=key,
        parts=np.array([parts_of[source] for source in sources]),
        tokens=sum(lengths),
        neutralised=sum(neutralise(record["text"]) != record["text"] for record in records),
        lengths=Counter(length.bit_length() for length in lengths),
    )


def tokenise_queries(protocol: Protocol, file: Path, records: list[dict[str, Any]], limit: int) -> Written:
    """Tokenises queries and their first answers and writes them, unless `file` holds them already."""
    key = _key(records)
    if not _holds(file, key):
        # an answer follows "The answer to the question is:", a response begins its turn; no answer is no token
        answers = [(record["answers"] or [""])[0] for record in records]
        led = [
            f" {answer}" if answer and not record["instruction"] else answer
            for record, answer in zip(records, answers, strict=True)
        ]
        questions = _tokens(protocol, [record["text"] for record in records])
        for record, question, answer in zip(records, questions, _tokens(protocol, led), strict=True):
            record["tokens"], record["answer"] = question, answer
        write_rows(file, records, QUERIES, key)
    counts = Counter(split for record in records for split in record["splits"])
    return Written(input=key, counts=counts)


def split_documents(protocol: Protocol, documents: Iterable[tuple[str, str]], limit: int) -> Iterator[Part]:
    """The parts of a stream of documents, in order.

    Args:
        protocol: Tokenises.
        documents: Id and text of each.
        limit: Tokens of a part; a longer document is split at the ends of its sentences.
    """
    for some in _slices(documents, lambda document: len(document[1])):
        written = protocol.texts([f" {text}" for _, text in some])
        for (source, text), ids in zip(some, written, strict=True):
            parts = [(0, text, ids)] if len(ids) <= limit else list(_parts(protocol, text, limit))
            for number, (start, part, tokens) in enumerate(parts, start=1):
                name = source if len(parts) == 1 else f"{source}#{number}"
                yield Part(name, source, start, part, np.asarray(tokens, dtype=np.int32))


def _tokens(protocol: Protocol, texts: list[str]) -> Iterator[NDArray[np.int32]]:
    """Token ids of many texts."""
    for some in _slices(texts, len):
        for ids in protocol.texts(some):
            yield np.asarray(ids, dtype=np.int32)


def _slices(items: Iterable[Item], characters: Callable[[Item], int]) -> Iterator[list[Item]]:
    """What is tokenised at once."""
    some: list[Item] = []
    held = 0
    for item in items:
        some.append(item)
        held += characters(item)
        if len(some) == SLICE or held >= SLICE_CHARACTERS:
            yield some
            some, held = [], 0
    if some:
        yield some


def _parts(protocol: Protocol, text: str, limit: int) -> Iterator[tuple[int, str, list[int]]]:
    # what is counted in the whole text may be a token more in a part by itself: such a part is split again, closer
    starts = protocol.token_starts(text)
    closer = max(limit - 2, 1)
    while True:
        slices = split_text(text, starts, closer)
        written = protocol.texts([f" {text[start:end]}" for start, end in slices])
        longest = max(map(len, written), default=0)
        if longest <= limit or closer == 1:
            break
        closer = max(closer - (longest - limit), 1)
    for (start, end), ids in zip(slices, written, strict=True):
        yield start, text[start:end], ids


def _key(records: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True).encode())
    return digest.hexdigest()


def text_digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _holds(file: Path, key: str) -> bool:
    try:
        return input_of(read_rows(file)) == key
    except (OSError, pa.ArrowInvalid):  # not there, or damaged by what broke the build off: it is written anew
        return False


def write_rows(file: Path, rows: list[dict[str, Any]], schema: pa.Schema, key: str = "") -> None:
    """Writes rows aside and then in place; `key` says what they were made of."""
    aside = file.with_suffix(".writing")
    schema = schema.with_metadata({"input": key})
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for start in range(0, len(rows), BATCH):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + BATCH], schema=schema))
    aside.replace(file)
