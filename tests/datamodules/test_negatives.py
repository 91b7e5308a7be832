"""Mined negatives are rows of one store, and serve no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from datamodules.beir import BeirReader
from datamodules.building import build_store
from datamodules.collection import Collection
from datamodules.negatives import Mined, mine_bm25, mined_file, save
from datamodules.packed_memory import PackedMemory
from datamodules.planning import Planner
from datamodules.shards import write_rows
from datamodules.store import Store
from datamodules.tokenizer import train_tokenizer
from msa_train.errors import UserError
from msa_train.protocol import Protocol
from tests.conftest import write_corpus
from tests.datamodules.corpora import LIMIT
from tests.datamodules.test_packing import CONFIG


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, folder: Path, protocol: Protocol) -> Store:
    return build_store(BeirReader(folder), protocol, tmp_path_factory.mktemp("stores"), LIMIT)


def changed(folder: Path, place: Path) -> Path:
    """The same corpus with its queries in another order."""
    shutil.copytree(folder, place)
    lines = (place / "queries.jsonl").read_text().splitlines()
    (place / "queries.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    return place


def test_a_file_is_of_one_store_and_travels_with_it(
    folder: Path, store: Store, protocol: Protocol, tmp_path: Path
) -> None:
    reordered = changed(folder, tmp_path / "other" / folder.name)
    another = Protocol(train_tokenizer(["The red fox."] * 3, 400, tmp_path / "bpe"))
    stores = [
        build_store(BeirReader(folder), protocol, tmp_path / "a", LIMIT + 40),
        build_store(BeirReader(reordered), protocol, tmp_path / "b", LIMIT),
        build_store(BeirReader(folder), another, tmp_path / "c", LIMIT),
    ]
    names = {mined_file(tmp_path, one).name for one in (store, *stores)}
    assert len(names) == 4 and all(one.name == store.name for one in stores)
    shutil.copytree(store.folder, tmp_path / "carried")
    shutil.copytree(folder, tmp_path / "again" / folder.name)
    rebuilt = build_store(BeirReader(tmp_path / "again" / folder.name), protocol, tmp_path / "d", LIMIT)
    for one in (Store(tmp_path / "carried"), rebuilt):
        assert mined_file(tmp_path, one) == mined_file(tmp_path, store)


def test_negatives_of_another_limit_are_refused_with_the_mend(
    folder: Path, store: Store, protocol: Protocol, tmp_path: Path
) -> None:
    save(mined_file(tmp_path, store), [[5] for _ in range(len(store.questions))])
    protocol.tokenizer.save_pretrained(tmp_path / "tokenizer")
    given = {"tokenizer": str(tmp_path / "tokenizer"), "document_tokens": 4096, "negatives": {str(tmp_path): 2}}
    PackedMemory(str(folder), max_document_tokens=LIMIT, **given).setup()  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"msa-train mine writes it, of the very corpus, data.max_document_tokens"):
        PackedMemory(str(folder), max_document_tokens=LIMIT + 40, **given).setup()  # type: ignore[arg-type]


def test_rows_that_the_store_does_not_have_are_refused(store: Store, tmp_path: Path) -> None:
    data, file, queries = Collection([store], [1.0]), tmp_path / "mined.arrow", len(store.questions)
    last = len(store.tokens) - 1
    save(file, [[0, last]] * queries)
    assert Mined(data, [file]).of(3) == [0, last]
    save(file, [[]] * queries)
    assert Mined(data, [file]).of(3) == []
    for rows in ([[last + 1]] * queries, [[-1]] * queries, [[0]] * (queries - 1)):
        save(file, rows)
        with pytest.raises(UserError, match=r"mined.arrow: negatives of other queries or documents; .* mine again"):
            Mined(data, [file])
    whole = mine_bm25(store).read_bytes()
    write_rows(tmp_path / "flat.arrow", [{"documents": 1}], pa.schema({"documents": pa.int32()}))
    write_rows(tmp_path / "named.arrow", [{"rows": [1]}], pa.schema({"rows": pa.list_(pa.int32())}))
    for content in (b"", b"x", whole[: len(whole) // 2], *(file.read_bytes() for file in tmp_path.glob("[fn]*.arrow"))):
        file.write_bytes(content)
        with pytest.raises(UserError, match="mined.arrow: not a file of mined negatives"):
            Mined(data, [file])


def test_two_corpora_of_one_name_are_refused(protocol: Protocol, tmp_path: Path) -> None:
    folders = [write_corpus(tmp_path / name / "corpus", documents=5) for name in ("a", "b")]
    with (folders[1] / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "more", "text": "one more"}) + "\n")
    stores = [build_store(BeirReader(folder), protocol, tmp_path / "stores", LIMIT) for folder in folders]
    with pytest.raises(UserError, match="2 corpora are named 'corpus'.*rename the folder or file of one"):
        Collection(stores, [1.0, 1.0])


def test_no_more_wrappings_are_made_than_there_are_documents(
    store: Store, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    whole = protocol.wrapping
    monkeypatch.setattr(protocol, "wrapping", lambda number: made.append(number) or whole(number))  # type: ignore[func-returns-value]
    Planner(Collection([store], [1.0]), protocol, "train", replace(CONFIG, document_tokens=2**20))
    assert max(made) == len(store.tokens) + 1
