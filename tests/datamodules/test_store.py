"""Stores: built once, resumed, split, free of duplicates, and traceable to the source."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

import datamodules.building as building
import datamodules.python_docs as python_docs
from datamodules.beir import BeirReader
from datamodules.building import build_store
from datamodules.negatives import mine_bm25
from datamodules.opening import open_store
from datamodules.packed_memory import PackedMemory
from datamodules.passages import open_passages
from datamodules.python_docs import build_python_docs
from datamodules.shards import tokenise_documents
from datamodules.store import MANIFEST, Store
from datamodules.summary import print_store
from datamodules.tokenizer import train_tokenizer
from msa_train.errors import UserError
from msa_train.protocol import Protocol, restore
from tests.conftest import write_corpus
from tests.datamodules.corpora import LIMIT


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, folder: Path, protocol: Protocol) -> Store:
    return build_store(BeirReader(folder), protocol, tmp_path_factory.mktemp("stores"), LIMIT)


def test_every_word_of_the_source_is_there_and_its_tokens_decode_to_it(
    folder: Path, store: Store, protocol: Protocol
) -> None:
    texts = {document.id: document.text for document in BeirReader(folder).documents()}
    parts: dict[str, list[tuple[int, str]]] = {}
    for row in range(len(store.tokens)):
        text, start, source = (store.document(row, name) for name in ("text", "start", "source"))
        assert texts[source][start : start + len(text)] == text
        assert restore(protocol.tokenizer.decode(store.tokens[row])) == f" {text}"
        assert len(store.tokens[row]) <= LIMIT
        parts.setdefault(source, []).append((start, text))
    assert len(parts) == 240 and sum(len(found) > 1 for found in parts.values()) == store.manifest["split"] > 15
    for source, found in parts.items():
        assert "".join("".join(text for _, text in sorted(found)).split()) == "".join(texts[source].split())


def test_parts_end_with_sentences(store: Store) -> None:
    rows = [row for row in range(len(store.tokens) - 1) if "#" in store.document(row, "id")]
    inner = [row for row in rows if store.document(row, "source") == store.document(row + 1, "source")]
    texts = [store.document(row, "text") for row in inner]
    plain = [text for text in texts if "See [" not in text and "<" not in text]  # longer than a part, so cut within
    assert len(plain) > 40 and [text for text in plain if not text.endswith(".")] == []


def test_duplicates_are_stored_once_and_relations_follow(folder: Path, store: Store) -> None:
    ids = [store.document(row, "source") for row in range(len(store.tokens))]
    assert not any(name.startswith("copy") for name in ids)
    assert store.manifest["dropped"] == {"documents with the same text as another (relations follow)": 6}
    wanted = {q.id: q for q in BeirReader(folder).queries()}
    seen = 0
    for row in range(len(store.questions)):
        query = wanted[store.query(row, "id")]
        names = {name.replace("copy", "d") for names in query.relevant.values() for name in names}
        names |= {name for step in query.steps for name in step}
        known = {ids[place] for place in [*store.positives[row], *store.related[row]]}
        assert known == names
        seen += any(name.startswith("copy") for names in query.relevant.values() for name in names)
    assert seen > 1


def test_relations_follow_the_part_that_holds_the_answer(store: Store) -> None:
    narrowed = 0
    for row in range(len(store.questions)):
        positives, related = store.positives[row].tolist(), store.related[row].tolist()
        assert not set(positives) & set(related) and len(set(positives)) == len(positives)
        answers = store.query(row, "answers")
        for place in related:
            part, source = store.document(place, "text"), store.document(place, "source")
            siblings = [other for other in positives if store.document(other, "source") == source]
            if answers and siblings:
                narrowed += 1
                assert answers[0] not in part and all(answers[0] in store.document(s, "text") for s in siblings)
    assert narrowed > 0


def test_chains_keep_their_order(folder: Path, store: Store) -> None:
    wanted = {query.id: query.steps for query in BeirReader(folder).queries() if query.steps}
    checked = 0
    for row in range(len(store.questions)):
        steps = wanted.get(store.query(row, "id"))
        if steps:
            places = iter(store.positives[row].tolist())
            found = [[next(places) for _ in range(size)] for size in store.step_sizes[row].tolist()]
            assert [{store.document(place, "source") for place in step} for step in found] == [set(s) for s in steps]
            checked += 1
    assert checked == 80


def content(store: Store) -> list[bytes]:
    return [file.read_bytes() for file in sorted(store.folder.glob("*.arrow"))]


def test_same_bytes_from_any_number_of_processes(
    folder: Path, store: Store, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD", 50)
    alone = build_store(BeirReader(folder), protocol, tmp_path / "one", LIMIT)
    several = build_store(BeirReader(folder), protocol, tmp_path / "two", LIMIT, workers=2)
    assert len(content(alone)) == 10 and content(alone) == content(several)
    assert alone.tokens.flat().tolist() == store.tokens.flat().tolist()


def test_a_broken_off_build_goes_on(
    folder: Path, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD", 50)
    whole = build_store(BeirReader(folder), protocol, tmp_path / "whole", LIMIT)
    made: list[Path] = []

    def breaking(protocol: Protocol, file: Path, *rest: object) -> object:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(file)
        return tokenise_documents(protocol, file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(building, "tokenise_documents", breaking)
    with pytest.raises(KeyboardInterrupt):
        build_store(BeirReader(folder), protocol, tmp_path / "stores", LIMIT)
    times = {file: file.stat().st_mtime_ns for file in made}
    monkeypatch.setattr(building, "tokenise_documents", tokenise_documents)
    store = build_store(BeirReader(folder), protocol, tmp_path / "stores", LIMIT)
    assert content(store) == content(whole)
    kept = [store.folder / file.name for file in made]
    assert [file.stat().st_mtime_ns for file in kept] == list(times.values())


def test_another_corpus_tokenizer_or_limit_is_another_store(
    folder: Path, store: Store, protocol: Protocol, tmp_path: Path
) -> None:
    root = store.folder.parent
    assert build_store(BeirReader(folder), protocol, root, LIMIT).folder == store.folder
    assert build_store(BeirReader(folder), protocol, root, LIMIT + 1).folder != store.folder
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "new", "text": "A new document."}) + "\n")
    assert build_store(BeirReader(folder), protocol, root, LIMIT).folder != store.folder


def test_damage_is_named(folder: Path, protocol: Protocol, tmp_path: Path) -> None:
    store = build_store(BeirReader(folder), protocol, tmp_path, LIMIT)
    (store.folder / "documents-00000.arrow").write_bytes(b"nothing")
    with pytest.raises(UserError, match="the store is damaged"):
        Store(store.folder)
    (store.folder / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="another format"):
        Store(store.folder)
    (store.folder / MANIFEST).unlink()
    with pytest.raises(UserError, match="no complete store"):
        Store(store.folder)


def test_a_store_that_a_path_names_is_never_to_be_deleted(folder: Path, protocol: Protocol, tmp_path: Path) -> None:
    store = build_store(BeirReader(folder), protocol, tmp_path, LIMIT)
    for name, content in (("queries-00000.arrow", "x"), (MANIFEST, '{"format": 1}'), (MANIFEST, "{}")):
        (store.folder / name).write_text(content)
        with pytest.raises(UserError, match="move it away, and have msa-train pack build it again") as error:
            Store(store.folder)
        assert "delete" not in str(error.value)


def test_a_corpus_may_have_a_manifest_of_its_own(corpus_folder: Path, protocol: Protocol, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(corpus_folder, folder)
    (folder / MANIFEST).write_text('{"name": "theirs"}')
    assert open_store(str(folder), protocol, tmp_path / "stores", LIMIT).manifest["name"] == "theirs"
    assert len(list(open_passages(str(folder), protocol, 1000))) == 80
    module = PackedMemory(str(folder), vocab_size=400, document_tokens=512)
    assert len(module.open().stores) == 1, "its texts train a tokenizer"


@pytest.mark.parametrize("name", ["documents-00001.arrow", "queries-00000.arrow"])
@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, None])
def test_a_damaged_shard_of_a_broken_off_build_is_written_anew(
    name: str, damage: bytes | None, folder: Path, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD", 50)
    whole = build_store(BeirReader(folder), protocol, tmp_path / "whole", LIMIT)
    unfinished = tmp_path / "stores" / f"{whole.folder.name}.building"
    shutil.copytree(whole.folder, unfinished)
    (unfinished / MANIFEST).unlink()
    half = (unfinished / name).read_bytes()
    (unfinished / name).write_bytes(half[: len(half) // 2] if damage is None else damage)
    assert content(build_store(BeirReader(folder), protocol, tmp_path / "stores", LIMIT)) == content(whole)


def test_where_nothing_can_be_written_the_mend_is_a_variable(
    folder: Path, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in a folder's place, below which not even root can write."""
    (tmp_path / "file").touch()
    told = "file.*: cannot be written .*MSA_TRAIN_CACHE name a folder"
    with pytest.raises(UserError, match=told):
        build_store(BeirReader(folder), protocol, tmp_path / "file" / "stores", LIMIT)
    with pytest.raises(UserError, match=told):
        train_tokenizer(["a fox"], 400, tmp_path / "file" / "cache")
    monkeypatch.setenv("MSA_TRAIN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(python_docs, "_entries", lambda: iter(()))
    with pytest.raises(UserError, match=told):
        build_python_docs()


def test_what_is_there_needs_no_lock(
    folder: Path, protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store in a folder that others may only read."""

    def acquire(self: FileLock) -> None:
        raise PermissionError(13, "Permission denied")

    store = build_store(BeirReader(folder), protocol, tmp_path, LIMIT)
    with monkeypatch.context() as patched:
        patched.setattr(FileLock, "acquire", acquire)
        assert build_store(BeirReader(folder), protocol, tmp_path, LIMIT).folder == store.folder
        with pytest.raises(UserError, match=r"cannot be written \(Permission denied\)"):
            mine_bm25(store)
    mined = mine_bm25(store)
    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert mine_bm25(store) == mined


def test_a_store_is_printed_as_text(
    corpus_folder: Path, protocol: Protocol, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever wrote the manifest chose the names in it."""
    store = build_store(BeirReader(corpus_folder), protocol, tmp_path, LIMIT)
    store.name = "a\x1b]0;owned\x07"
    store.manifest["queries"] = {"t\x1b[2Jest": 3}
    store.manifest["dropped"] = {"\x1b[31mred": 4}
    print_store(store)
    shown = capsys.readouterr().out
    assert "owned" in shown and "[2Jest" in shown and "\x1b" not in shown and "\x07" not in shown


def test_citations_do_not_make_parts_shorter_or_end_within_a_sentence(protocol: Protocol, tmp_path: Path) -> None:
    """What neutralising adds is counted where a document is cut."""
    for name, mark in (("plain", "(4) "), ("cited", "[4] ")):
        folder = write_corpus(tmp_path / name, documents=3)
        with (folder / "corpus.jsonl").open("a") as file:
            text = " ".join(f"The amber heath {mark}met the cedar grove {n}." for n in range(200))
            file.write(json.dumps({"_id": "long", "text": text}) + "\n")
        store = build_store(BeirReader(folder), protocol, tmp_path / "stores", 300)
        parts = [row for row in range(len(store.tokens)) if store.document(row, "source") == "long"]
        assert len(parts) > 10 and all(store.document(row, "text").endswith(".") for row in parts)
        assert all(store.document(row, "text").startswith("The amber") for row in parts)
        lengths = [len(store.tokens[row]) for row in parts[:-1]]
        assert max(lengths) <= 300 and min(lengths) > 240


def test_what_one_split_says_of_a_question_is_not_trained_on_in_another(protocol: Protocol, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "both", documents=10)
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\td5\t1\n")
    store = build_store(BeirReader(folder), protocol, tmp_path / "stores", 1000)
    rows = [row for row in range(len(store.questions)) if store.query(row, "id") == "q0"]
    found = {
        store.query(row, "splits")[0]: (store.positives[row].tolist(), store.related[row].tolist()) for row in rows
    }
    assert found == {"train": ([0], [5]), "test": ([5], [0])}


def test_shards_left_by_a_longer_source_are_not_read(
    protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "SHARD", 5)
    monkeypatch.setattr(BeirReader, "fingerprint", lambda self: "one for all")
    long, short = (write_corpus(tmp_path / name / "c", documents=size) for name, size in (("long", 40), ("short", 20)))

    def breaking(protocol: Protocol, file: Path, *rest: object) -> object:
        raise KeyboardInterrupt

    whole = building.tokenise_queries
    monkeypatch.setattr(building, "tokenise_queries", breaking)
    with pytest.raises(KeyboardInterrupt):
        build_store(BeirReader(long), protocol, tmp_path / "stores", 1000)
    monkeypatch.setattr(building, "tokenise_queries", whole)
    store = build_store(BeirReader(short), protocol, tmp_path / "stores", 1000)
    assert len(store.tokens) == store.manifest["documents"] == 20


def test_folders_of_one_name_and_size_have_stores_of_their_own(protocol: Protocol, tmp_path: Path) -> None:
    folders = [write_corpus(tmp_path / name / "corpus", documents=5) for name in ("a", "b")]
    text = (folders[1] / "corpus.jsonl").read_text()
    (folders[1] / "corpus.jsonl").write_text(text.replace("red fox", "shy fox"))
    for folder in folders:
        for file in folder.rglob("*.*"):
            os.utime(file, (1_000_000, 1_000_000))
    stores = [build_store(BeirReader(folder), protocol, tmp_path / "stores", 1000) for folder in folders]
    assert stores[0].folder != stores[1].folder and "shy fox" in stores[1].document(0, "text")


def test_books_are_shards_of_their_own(protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "SHARD_CHARACTERS", 200)
    store = build_store(BeirReader(write_corpus(tmp_path / "c", documents=12)), protocol, tmp_path / "stores", 1000)
    assert len(list(store.folder.glob("documents-*.arrow"))) > 3 and len(store.tokens) == 12
