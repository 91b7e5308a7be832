"""examples/write_needles.py: what it writes is asked and answered as evaluation asks, and shares nothing with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from datamodules.beir import BeirReader
from datamodules.records import Query
from datamodules.tasks.haystacks import shipped_prose
from datamodules.tasks.ruler import word_list
from examples.write_needles import write
from msa_train.evaluation.scores import containment
from tests.tasks.samples import NEEDLE


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, str], list[Query]]]:
    """Documents by name, and questions, of every corpus."""
    folder = tmp_path_factory.mktemp("needles")
    write(folder, questions=300)
    readers = {name: BeirReader(folder / name) for name in ("prose", "words", "uuids")}
    return {
        name: ({document.id: document.text for document in reader.documents()}, list(reader.queries()))
        for name, reader in readers.items()
    }


def keys_of(question: str) -> list[str]:
    found = re.search(r" for (.+) mentioned in the provided text\?$", question)
    assert found is not None
    return re.split(r", and |, ", found[1])


@pytest.mark.parametrize("name", ["prose", "words", "uuids"])
def test_every_question_is_answered_by_its_documents_and_by_no_other(
    corpora: dict[str, tuple[dict[str, str], list[Query]]], name: str
) -> None:
    documents, queries = corpora[name]
    holders: dict[str, dict[str, str]] = {}  # key -> value -> document
    for document, text in documents.items():
        for key, value in NEEDLE.findall(text):
            holders.setdefault(key, {})[value] = document
    assert len(queries) >= 300
    for query in queries:
        keys = keys_of(query.text)
        values = [value for key in keys for value in holders[key]]
        assert set(query.relevant["train"]) == {holders[key][value] for key in keys for value in holders[key]}
        (answer,) = query.answers
        assert containment(answer, tuple(values)) == 1.0 and answer.startswith("The special magic ")
        if len(keys) > 1:
            assert all(f"{key}: {next(iter(holders[key]))}" in answer for key in keys), "each value behind its key"


def test_several_values_of_a_key_are_told_in_the_order_of_their_documents(
    corpora: dict[str, tuple[dict[str, str], list[Query]]],
) -> None:
    documents, queries = corpora["prose"]
    place = {value: row for row, text in enumerate(documents.values()) for _, value in NEEDLE.findall(text)}
    several = [query.answers[0] for query in queries if query.text.startswith("Some") and "all the" in query.text]
    told = [re.findall(r"\d{7}", answer) for answer in several if ": " not in answer]
    assert len(told) > 20 and all(len(values) == 4 for values in told)
    assert all([place[value] for value in values] == sorted(place[value] for value in values) for values in told)


def test_nothing_of_evaluation_occurs(corpora: dict[str, tuple[dict[str, str], list[Query]]]) -> None:
    adjectives = set(word_list("adjective"))
    evaluated = {sentence for sentence in shipped_prose("evaluation").sentences if len(sentence) > 60}
    for documents, queries in corpora.values():
        for query in queries:
            assert not any(key.startswith(f"{word}-") for key in keys_of(query.text) for word in adjectives)
        for text in documents.values():
            assert not any(sentence in text for sentence in re.split(r"(?<=\.) ", text) if sentence in evaluated)


def test_documents_are_no_longer_than_those_of_evaluation(
    corpora: dict[str, tuple[dict[str, str], list[Query]]],
) -> None:
    words = [len(text.split()) for documents, _ in corpora.values() for text in documents.values()]
    assert max(words) < 640 and min(words) < 80


def test_the_same_seed_writes_the_same(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, questions=40)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*l"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
        assert json.loads((tmp_path / "one" / file).read_text().splitlines()[0])["_id"]
