"""Documents for a memory bank: text and token ids of any corpus, as a stream.

Long documents are split exactly as training's stores split them (shards.py), so a model is asked about parts like
those that it learned from. The invariant: a document's id stands for one text, and is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from datamodules.opening import open_corpus
from datamodules.records import CorpusReader, encodable
from datamodules.shards import split_documents, text_digest
from datamodules.store import Store, is_store
from msa_train.errors import UserError
from msa_train.memory import Passage
from msa_train.protocol import Protocol


def open_passages(name: str, protocol: Protocol, max_document_tokens: int) -> Iterator[Passage]:
    """The passages of a corpus: its documents, and the parts of those that are too long, named `id#1`, `id#2`, ...

    Args:
        name: As for `open_corpus`, where of a folder corpus.jsonl is enough; or a store that `msa-train pack` built,
            whose documents are its rows.
        protocol: Tokenises.
        max_document_tokens: Longer documents are split at the ends of their sentences.

    Raises:
        UserError: There is no such corpus, or it is malformed or empty.
    """
    if is_store(Path(name)):
        return _stored(Store(Path(name)), protocol, max_document_tokens)
    return read_passages(open_corpus(name), protocol, max_document_tokens)


def read_passages(reader: CorpusReader, protocol: Protocol, max_document_tokens: int) -> Iterator[Passage]:
    """The passages of a reader's documents, in its order; its queries are not asked for.

    Args:
        reader: Where documents come from.
        protocol: Tokenises.
        max_document_tokens: Longer documents are split at the ends of their sentences.

    Raises:
        UserError: A record is malformed, an id occurs with two texts, or there is no document.
    """
    return _split(_documents(reader), protocol, max_document_tokens)


def _split(documents: Iterator[tuple[str, str]], protocol: Protocol, limit: int) -> Iterator[Passage]:
    for part in split_documents(protocol, documents, limit):
        yield Passage(part.id, part.text, part.tokens, part.source)


def _documents(reader: CorpusReader) -> Iterator[tuple[str, str]]:
    """Id and text of every document, once."""
    seen: dict[str, bytes] = {}
    for document in reader.documents():
        name, text = encodable(document.id, document.id), encodable(document.text, document.id)
        digest = text_digest(text)
        if name not in seen:
            seen[name] = digest
            yield name, text
        elif seen[name] != digest:
            raise UserError(f"corpus '{reader.name}': document '{name}' occurs with two texts")
    if not seen:
        raise UserError(f"corpus '{reader.name}': no document; a memory needs at least one")


def _stored(store: Store, protocol: Protocol, limit: int) -> Iterator[Passage]:
    if not len(store.tokens):
        raise UserError(f"{store.folder}: no document; a memory needs at least one")
    rows = range(len(store.tokens))
    same = store.manifest["tokenizer"] == protocol.fingerprint()
    if same and store.manifest["max_document_tokens"] <= limit:
        for row in rows:
            name, text, source = (store.document(row, column) for column in ("id", "text", "source"))
            yield Passage(name, text, store.tokens[row], source)
    else:
        sources = {store.document(row, "id"): store.document(row, "source") for row in rows}
        documents = ((store.document(row, "id"), store.document(row, "text")) for row in rows)
        yield from (replace(one, source=sources[one.source]) for one in _split(documents, protocol, limit))
