"""BEIR folders, good and bad: every mistake is one error that names file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.corpus import read_beir
from msa_train.errors import UserError
from tests.conftest import write_corpus


def test_reads_what_is_there(corpus_folder: Path) -> None:
    corpus = read_beir(corpus_folder)
    assert len(corpus.documents) == 80 and len(corpus.qrels["train"]) == 64 and len(corpus.qrels["test"]) == 16
    assert corpus.documents[0].startswith("red fox The red fox lives") and corpus.answers[3] == "by river 3"
    assert corpus.positives()[79] == [79]


BAD = {
    "no corpus": ("corpus.jsonl", None, "no such file"),
    "empty corpus": ("corpus.jsonl", "\n\n", "empty"),
    "broken JSON": ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": \n', r"corpus.jsonl:2: not valid JSON"),
    "not an object": ("corpus.jsonl", "[1]\n", "corpus.jsonl:1: expected an object"),
    "no text": ("corpus.jsonl", '{"_id": "d0", "text": " "}\n', "corpus.jsonl:1: 'text'"),
    "id is a number": ("corpus.jsonl", '{"_id": 3, "text": "a"}\n', "corpus.jsonl:1: '_id'"),
    "id twice": ("queries.jsonl", '{"_id": "q0", "text": "a"}\n' * 2, "queries.jsonl:2: _id 'q0' occurs twice"),
    "answers": ("queries.jsonl", '{"_id": "q0", "text": "a", "answers": "b"}\n', "queries.jsonl:1: 'answers'"),
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
def test_bad_files_are_named(case: str, tmp_path: Path) -> None:
    name, text, message = BAD[case]
    folder = write_corpus(tmp_path / "c", documents=5)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_beir(folder)


def test_not_utf8(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "c", documents=5)
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "d0", "text": "\xff"}\n')
    with pytest.raises(UserError, match="corpus.jsonl:1: not UTF-8"):
        read_beir(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["corpus.jsonl", "queries.jsonl", "qrels/train.tsv"]))
def test_any_bytes_end_in_success_or_a_user_error(tmp_path: Path, content: bytes, name: str) -> None:
    folder = tmp_path / "fuzz"
    if not folder.exists():
        write_corpus(folder, documents=5)
    good = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(good + content)
        read_beir(folder)
    except UserError as error:
        assert name.rpartition("/")[2] in str(error) or "qrels" in str(error)
    finally:
        (folder / name).write_bytes(good)
