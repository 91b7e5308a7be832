"""Passages: those of a training store, from any corpus, and from a folder that has documents alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

import datamodules.shards as shards
from datamodules.beir import BeirReader
from datamodules.building import build_store
from datamodules.mapped import MappedReader
from datamodules.passages import Passage, open_passages, read_passages
from datamodules.records import Document, Dropped, Query
from datamodules.store import Store
from datamodules.tokenizer import train_tokenizer
from msa_train.errors import UserError
from msa_train.protocol import Protocol, restore
from tests.datamodules.corpora import LIMIT, write_instructions


class Listed:
    """A reader over a list, which counts what was taken of it and has no queries at all."""

    def __init__(self, documents: Sequence[tuple[str, str]]) -> None:
        self.name, self.dropped, self.given, self.taken = "listed", Dropped(), documents, 0

    def fingerprint(self) -> str:
        raise AssertionError("nothing is built")

    def documents(self) -> Iterator[Document]:
        for name, text in self.given:
            self.taken += 1
            yield Document(name, text)

    def queries(self) -> Iterator[Query]:
        raise AssertionError("no query is asked for")

    def unknown(self, query: str, document: str) -> None:
        raise AssertionError("no relation is looked at")


def plain(passages: Iterator[Passage]) -> list[tuple[str, str, list[int]]]:
    """As values that compare."""
    found = list(passages)
    assert all(passage.tokens.dtype == np.int32 for passage in found)
    return [(passage.id, passage.text, passage.tokens.tolist()) for passage in found]


def rows(store: Store) -> list[tuple[str, str, list[int]]]:
    return [
        (store.document(row, "id"), store.document(row, "text"), store.tokens[row].tolist())
        for row in range(len(store.tokens))
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, folder: Path, protocol: Protocol) -> Store:
    return build_store(BeirReader(folder), protocol, tmp_path_factory.mktemp("stores"), LIMIT)


def test_passages_are_those_of_a_training_store(folder: Path, store: Store, protocol: Protocol) -> None:
    passages = plain(open_passages(str(folder), protocol, LIMIT))
    copies = [passage for passage in passages if passage[0].startswith("copy")]  # a store keeps one of each text
    assert len({name.partition("#")[0] for name, _, _ in copies}) == 6
    assert [passage for passage in passages if passage not in copies] == rows(store)
    numbers = [name.partition("#")[2] for name, _, _ in passages if name.startswith("d17#")]
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)] and len(numbers) > 2
    assert max(len(tokens) for _, _, tokens in passages) <= LIMIT


def test_documents_are_taken_as_passages_are(protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SLICE", 5)
    reader = Listed([(f"d{number}", f"The amber heath {number}.") for number in range(23)])
    passages = read_passages(reader, protocol, LIMIT)
    assert reader.taken == 0
    assert [next(passages).id for _ in range(6)] == ["d0", "d1", "d2", "d3", "d4", "d5"] and reader.taken == 10
    assert len(list(passages)) == 17 and reader.taken == 23


def test_how_many_are_tokenised_at_once_changes_nothing(
    folder: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain(open_passages(str(folder), protocol, LIMIT))
    sizes: list[int] = []
    texts = Protocol.texts
    monkeypatch.setattr(Protocol, "texts", lambda self, given: sizes.append(len(given)) or texts(self, given))
    monkeypatch.setattr(shards, "SLICE_CHARACTERS", 300)
    assert plain(open_passages(str(folder), protocol, LIMIT)) == wanted and max(sizes) < 50


def test_documents_alone_make_a_memory_but_no_store(folder: Path, protocol: Protocol, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "corpus.jsonl").write_bytes((folder / "corpus.jsonl").read_bytes())
    assert plain(open_passages(str(bare), protocol, LIMIT)) == plain(open_passages(str(folder), protocol, LIMIT))
    with pytest.raises(UserError, match=r"bare/queries.jsonl: no such file"):
        build_store(BeirReader(bare), protocol, tmp_path / "stores", LIMIT)
    (bare / "queries.jsonl").write_bytes((folder / "queries.jsonl").read_bytes())
    with pytest.raises(UserError, match=r"bare/qrels: no \*.tsv file"):
        build_store(BeirReader(bare), protocol, tmp_path / "stores", LIMIT)
    with pytest.raises(UserError, match=r"bare/qrels: no \*.tsv file"):
        next(BeirReader(bare).queries())
    assert not list((tmp_path / "stores").glob("*.building")), "told before anything is tokenised"


def test_an_id_stands_for_one_text(protocol: Protocol) -> None:
    twice = [("a", "One text."), ("b", "Another."), ("a", "One text."), ("c", "Another.")]
    assert [passage.id for passage in read_passages(Listed(twice), protocol, LIMIT)] == ["a", "b", "c"]
    with pytest.raises(UserError, match="corpus 'listed': document 'a' occurs with two texts"):
        list(read_passages(Listed([*twice, ("a", "A third.")]), protocol, LIMIT))


def test_nothing_and_broken_text_are_named(protocol: Protocol, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="corpus 'listed': no document; a memory needs at least one"):
        list(read_passages(Listed([]), protocol, LIMIT))
    for bad in (("a", "half \ud800"), ("a\ud800", "whole")):
        with pytest.raises(UserError, match="half a surrogate pair"):
            list(read_passages(Listed([bad]), protocol, LIMIT))
    with pytest.raises(UserError, match="corpus 'chat': no document"):
        list(open_passages(str(write_instructions(tmp_path / "chat")), protocol, LIMIT))
    with pytest.raises(UserError, match="'nowhere' is neither a folder nor a file here"):
        open_passages("nowhere", protocol, LIMIT)
    (tmp_path / "corpus.jsonl").write_text("\n")
    with pytest.raises(UserError, match="corpus.jsonl: empty"):
        list(open_passages(str(tmp_path), protocol, LIMIT))


def test_a_mapping_is_read_as_well(protocol: Protocol, tmp_path: Path) -> None:
    lines = [{"q": "Which?", "p": [{"n": "x", "t": "It is red."}, {"n": "y", "t": "It hoots."}]}] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    mapping = {"files": {"train": "rows.jsonl"}, "query": "q", "documents": {"id": "p.n", "text": "p.t"}}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(mapping))
    passages = plain(open_passages(str(tmp_path / "set.yaml"), protocol, LIMIT))
    assert passages == [
        ("x", "It is red.", protocol.text(" It is red.")),
        ("y", "It hoots.", protocol.text(" It hoots.")),
    ]


def test_a_stores_own_tokens_serve_where_they_fit(
    store: Store, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "texts", None)  # nothing is tokenised
    for limit in (LIMIT, 10 * LIMIT):
        assert plain(open_passages(str(store.folder), protocol, limit)) == rows(store)


def test_parts_know_their_document_in_a_store_too(folder: Path, store: Store, protocol: Protocol) -> None:
    """As they do in the corpus, and where they are split again; a bank changes a document's parts together."""
    sources = {passage.id: passage.source for passage in open_passages(str(folder), protocol, LIMIT)}
    for limit in (LIMIT, 23):
        found = {passage.id: passage.source for passage in open_passages(str(store.folder), protocol, limit)}
        assert sum(source != name for name, source in found.items()) > 5
        assert all(source == sources.get(name, source) for name, source in found.items())
        assert set(found.values()) <= set(sources.values())


def test_a_store_is_split_again_for_a_smaller_limit(store: Store, protocol: Protocol) -> None:
    passages = plain(open_passages(str(store.folder), protocol, 23))
    assert max(len(tokens) for _, _, tokens in passages) <= 23 and any("#1#2" in name for name, _, _ in passages)
    texts: dict[str, str] = {}
    for name, text, tokens in passages:
        assert tokens == protocol.text(f" {text}")
        own = name if name in {known for known, _, _ in rows(store)} else name.rpartition("#")[0]
        texts[own] = texts.get(own, "") + text
    assert {own: "".join(text.split()) for own, text in texts.items()} == {
        name: "".join(text.split()) for name, text, _ in rows(store)
    }


def test_a_store_is_tokenised_again_by_another_tokenizer(store: Store, protocol: Protocol, tmp_path: Path) -> None:
    other = Protocol(train_tokenizer(["Quite other words, and few of them."] * 3, 330, tmp_path))
    passages = plain(open_passages(str(store.folder), other, 1000))
    assert [passage[:2] for passage in passages] == [row[:2] for row in rows(store)]
    assert all(restore(other.tokenizer.decode(tokens)) == f" {text}" for _, text, tokens in passages)
    assert sum(passage[2] != row[2] for passage, row in zip(passages, rows(store), strict=True)) > 200


def test_an_empty_store_is_named(protocol: Protocol, tmp_path: Path) -> None:
    chat = build_store(MappedReader(write_instructions(tmp_path / "chat")), protocol, tmp_path / "stores", LIMIT)
    with pytest.raises(UserError, match="chat-.*: no document; a memory needs at least one"):
        list(open_passages(str(chat.folder), protocol, LIMIT))
