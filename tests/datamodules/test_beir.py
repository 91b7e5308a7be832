"""BEIR folders, good and bad: every mistake is one error that names file and line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.beir import BeirReader
from datamodules.building import build_store
from datamodules.store import Store
from datamodules.tokenizer import train_tokenizer
from msa_train.errors import UserError
from msa_train.protocol import Protocol
from tests.conftest import write_corpus


@pytest.fixture(scope="module")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    return Protocol(train_tokenizer(["The red fox lives by the river."] * 3, 400, tmp_path_factory.mktemp("bpe")))


def read(folder: Path, protocol: Protocol) -> Store:
    """All the way to a store: every mistake has been found then."""
    return build_store(BeirReader(folder), protocol, folder.parent / "stores", 64)


def test_reads_what_is_there(corpus_folder: Path) -> None:
    reader = BeirReader(corpus_folder)
    documents, queries = list(reader.documents()), list(reader.queries())
    assert len(documents) == 80 and documents[0].text.startswith("red fox The red fox lives")
    assert sum("train" in query.relevant for query in queries) == 64
    assert queries[3].answers == ("by river 3",) and queries[79].relevant == {"test": ("d79",)}


BAD = {
    "no corpus": ("corpus.jsonl", None, "no such file"),
    "empty corpus": ("corpus.jsonl", "\n\n", "empty"),
    "broken JSON": ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": \n', r"corpus.jsonl:2: not valid JSON"),
    "not an object": ("corpus.jsonl", "[1]\n", "corpus.jsonl:1: expected an object"),
    "no text": ("corpus.jsonl", '{"_id": "d0"}\n', "corpus.jsonl:1: 'text' is missing"),
    "no words": ("corpus.jsonl", '{"_id": "d0", "text": " "}\n', "corpus.jsonl:1: document 'd0' has neither title nor"),
    "no name": ("corpus.jsonl", '{"_id": " ", "text": "a"}\n', "corpus.jsonl:1: '_id' is empty"),
    "no question": ("queries.jsonl", '{"_id": "q0", "text": " "}\n', "queries.jsonl:1: 'text' is empty"),
    "id is a number": ("corpus.jsonl", '{"_id": 3, "text": "a"}\n', "corpus.jsonl:1: '_id'"),
    "id twice": ("queries.jsonl", '{"_id": "q0", "text": "a"}\n' * 2, "queries.jsonl:2: _id 'q0' occurs twice"),
    "answers": ("queries.jsonl", '{"_id": "q0", "text": "a", "answers": "b"}\n', "queries.jsonl:1: 'answers'"),
    "steps": ("queries.jsonl", '{"_id": "q0", "text": "a", "steps": ["d0"]}\n', "queries.jsonl:1: 'steps'"),
    "unknown step": (
        "queries.jsonl",
        '{"_id": "q0", "text": "a", "steps": [["d9"]]}\n',
        "queries.jsonl: a step of query 'q0' names 'd9'",
    ),
    "half a pair": ("corpus.jsonl", '{"_id": "d0", "text": "a \\ud800"}\n', "half a surrogate pair"),
    "half a pair in a name": ("corpus.jsonl", '{"_id": "d\\ud800", "text": "a"}\n', "half a surrogate pair"),
    "unknown query": ("qrels/train.tsv", "query-id\tcorpus-id\tscore\nq999\td0\t1\n", "train.tsv:2: query 'q999'"),
    "unknown document": (
        "qrels/train.tsv",
        "query-id\tcorpus-id\tscore\nq0\tnowhere\t1\n",
        "document 'nowhere'",
    ),
    "no header": ("qrels/train.tsv", "q0\td0\t1\n", "train.tsv:1: the first line must be the header"),
    "no tabs": ("qrels/train.tsv", "query-id\tcorpus-id\tscore\nq0 d0 1\n", "train.tsv:2: expected"),
    "score": ("qrels/train.tsv", "query-id\tcorpus-id\tscore\nq0\td0\thigh\n", "train.tsv:2: score 'high'"),
    "no pair": ("qrels/train.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0\n", "no relevant pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named(case: str, tmp_path: Path, protocol: Protocol) -> None:
    name, text, message = BAD[case]
    folder = write_corpus(tmp_path / "c", documents=5)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    if case in ("steps", "unknown step"):
        (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")
        (folder / "qrels" / "test.tsv").unlink()
    with pytest.raises(UserError, match=message):
        read(folder, protocol)


def test_a_title_is_enough_and_what_has_no_words_is_left_out(tmp_path: Path, protocol: Protocol) -> None:
    folder = write_corpus(tmp_path / "c", documents=5)
    with (folder / "corpus.jsonl").open("a") as file:
        for name, title in (("titled", "Only a title"), ("blank", " "), ("bare", "")):
            file.write(json.dumps({"_id": name, "title": title, "text": " \n"}) + "\n")
    reader = BeirReader(folder)
    for _ in range(2):  # read again, nothing is counted again
        assert [document.text for document in reader.documents()][5:] == ["Only a title"]
        assert reader.dropped.counts == {"document without text": 2}
    assert read(folder, protocol).manifest["dropped"] == {"document without text": 2}
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q1\tbare\t1\n")
    with pytest.raises(UserError, match=r"corpus.jsonl:8: document 'bare' has neither .* query 'q1' asks for it"):
        read(folder, protocol)


def test_a_mark_in_front_of_a_file_is_no_part_of_it(tmp_path: Path, protocol: Protocol) -> None:
    folder = write_corpus(tmp_path / "c", documents=5)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/train.tsv"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert len(read(folder, protocol).questions) == 5


def test_not_utf8(tmp_path: Path, protocol: Protocol) -> None:
    folder = write_corpus(tmp_path / "c", documents=5)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d0", "text": "\xff"}\n')
    with pytest.raises(UserError, match="corpus.jsonl:1: not UTF-8"):
        read(folder, protocol)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
RECORD = st.fixed_dictionaries(
    {}, optional={key: JSON | st.sampled_from(["d0", "q0"]) for key in ("_id", "text", "title", "answers", "steps")}
)
LINE = (
    st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | RECORD.map(lambda record: json.dumps(record).encode())
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(LINE, max_size=3).map(b"\n".join),
    st.sampled_from(["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"]),
    st.booleans(),
)
def test_any_bytes_end_in_success_or_a_user_error(
    tmp_path: Path, protocol: Protocol, content: bytes, name: str, append: bool
) -> None:
    folder = tmp_path / "fuzz"
    if not folder.exists():
        write_corpus(folder, documents=5)
    good = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(good + content if append else content)
        store = read(folder, protocol)
        assert len(store.tokens) >= 1 and store.splits
        shutil.rmtree(store.folder)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        (folder / name).write_bytes(good)
