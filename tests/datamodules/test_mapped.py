"""Mapped corpora: every shipped mapping on rows of its set's shape, every source, every mistake one error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from datamodules.mapped import MappedReader
from datamodules.records import CorpusReader, Query
from msa_train.errors import UserError
from tests.datamodules.corpora_samples import SAMPLES, Expected

CORPORA = Path(__file__).parents[2] / "configs" / "corpora"
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), file)
    return file


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], Path]] = {"jsonl": write_jsonl, "parquet": write_parquet}


def reader(folder: Path, rows: list[Any], **changes: Any) -> MappedReader:
    """A reader over rows of `{"q": ..., "a": ..., "p": [{"t": ..., "x": ..., "ok": ...}]}`, its mapping changed."""
    mapping = {
        "files": {"train": "rows.jsonl"},
        "query": "q",
        "answers": "a",
        "documents": {"title": "p.t", "text": "p.x"},
        "relevant": {"flag": "p.ok"},
    }
    mapping = {key: value for key, value in (mapping | changes).items() if value is not None}
    (folder / "set.yaml").write_text(yaml.safe_dump(mapping, sort_keys=False))
    write_jsonl(folder / "rows.jsonl", rows)
    return MappedReader(folder / "set.yaml")


def row(**changes: Any) -> dict[str, Any]:
    paragraphs = [{"t": "Fox", "x": "It is red.", "ok": True}, {"t": "Owl", "x": "It hoots.", "ok": False}]
    return {"q": "Which colour?", "a": "red", "p": paragraphs} | changes


# Every shipped mapping.


def test_every_mapping_has_a_sample() -> None:
    assert set(SAMPLES) == {file.stem for file in CORPORA.glob("*.yaml") if "\ndataset: " in file.read_text()}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", SAMPLES)
def test_shipped_mapping_reads_its_set(name: str, kind: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    files = {split: WRITERS[kind](tmp_path / f"{split}.{kind}", rows) for split, rows in sample.files.items()}
    mapped: CorpusReader = MappedReader(CORPORA / f"{name}.yaml", files=files)
    assert mapped.name == name
    texts = {document.id: document.text for document in mapped.documents()}
    queries = list(mapped.queries())
    assert len(texts) == sample.documents
    assert [_expected(query, texts) for query in queries] == sample.queries
    assert mapped.dropped.counts == sample.dropped
    assert list(mapped.queries()) == queries and mapped.dropped.counts == sample.dropped
    assert {document.id: document.text for document in mapped.documents()} == texts


def _expected(query: Query, texts: dict[str, str]) -> Expected:
    """The query with the first words of its documents for their ids."""
    word = {id: " ".join(text.split()[:2]) for id, text in texts.items()}
    (split, relevant), *others = query.relevant.items()
    assert not others
    steps = tuple(tuple(word[id] for id in step) for step in query.steps)
    found = tuple(word.get(id, f"unknown {id}") for id in relevant)
    return Expected(split, query.id, query.text, found, query.answers, steps, query.instruction)


@pytest.mark.parametrize("file", sorted(CORPORA.glob("*.yaml")), ids=lambda file: file.stem)
def test_first_line_is_the_command(file: Path) -> None:
    command = f"# msa-train pack --data.corpus configs/corpora/{file.name} --data.tokenizer TOKENIZER"
    assert file.read_text().splitlines()[0] == command
    assert file.read_text().splitlines()[1].startswith("# ")


def test_template_names_its_missing_files() -> None:
    with pytest.raises(UserError, match=r"files.train: 'my_set/train-\*.jsonl' matches no file in"):
        list(MappedReader(CORPORA / "template.yaml").documents())


# What the columns mean.


def test_same_paragraph_in_several_rows_is_one_document(tmp_path: Path) -> None:
    mapped = reader(tmp_path, [row(), row(q="What sound?", p=[{"t": "Owl", "x": "It hoots.", "ok": 1}])])
    documents = list(mapped.documents())
    assert [document.text for document in documents] == ["Fox It is red.", "Owl It hoots."]
    assert [query.id for query in mapped.queries()] == ["train-1", "train-2"]
    assert [query.relevant["train"] for query in mapped.queries()] == [(documents[0].id,), (documents[1].id,)]


def test_object_of_lists_reads_like_list_of_objects(tmp_path: Path) -> None:
    turned = {"t": ["Fox", "Owl"], "x": ["It is red.", "It hoots."], "ok": [True, False]}
    as_lists, as_objects = reader(tmp_path, [row(p=turned)]), None
    found = list(as_lists.documents()), list(as_lists.queries())
    as_objects = reader(tmp_path, [row()])
    assert found == (list(as_objects.documents()), list(as_objects.queries()))


def test_row_number_counts_over_all_files_of_a_split(tmp_path: Path) -> None:
    for name, rows in {"a": [row(), row(q="two")], "b": [row(q="three")]}.items():
        write_jsonl(tmp_path / f"part-{name}.jsonl", rows)
    mapped = reader(tmp_path, [], files={"train": "part-*.jsonl", "test": ["part-b.jsonl"]})
    assert [query.id for query in mapped.queries()] == ["train-1", "train-2", "train-3", "test-1"]


def test_json_column_holds_answers(tmp_path: Path) -> None:
    mapped = reader(tmp_path, [row(a='["red", "reddish", "red"]'), row(a=None)], json=["a"])
    assert [query.answers for query in mapped.queries()] == [("red", "reddish"), ()]


def test_instruction_reads_no_document(tmp_path: Path) -> None:
    rows = [
        {"i": "Add.", "n": "1 2", "o": "3"},
        {"i": "Greet.", "n": "", "o": "Hi"},
        {"i": "Be quiet.", "n": "", "o": ""},
    ]
    changes: dict[str, Any] = {"instruction": True, "query": ["i", "n"], "answers": "o"}
    mapped = reader(tmp_path, rows, documents=None, relevant=None, **changes)
    queries = list(mapped.queries())
    assert [query.text for query in queries] == ["Add.\n\n1 2", "Greet."] and list(mapped.documents()) == []
    assert all(query.instruction and query.relevant == {"train": ()} for query in queries)
    assert mapped.dropped.counts == {"instruction without a response": 1}


@pytest.mark.parametrize(
    ("named", "steps", "counts"),
    [
        ([5, 3], (("Owl It",), ("Fox It",)), {}),
        ([5, 3, 5], (("Owl It",), ("Fox It",)), {}),
        ([[3, 5], 3], (), {}),
        ([3, 3], (), {}),
        ([[3], [5]], (("Fox It",), ("Owl It",)), {}),
        ([3, 9], None, {"question whose evidence chain leaves its row": 1}),
        ([3, None], None, {"question whose evidence chain leaves its row": 1}),
        ([], None, {"question without a document that answers it": 1}),
    ],
)
def test_steps_keep_their_order_and_first_mentions(
    named: Any, steps: tuple[tuple[str, ...], ...] | None, counts: dict[str, int], tmp_path: Path
) -> None:
    paragraphs = [{"t": "Fox", "x": "It is red.", "n": 3}, {"t": "Owl", "x": "It hoots.", "n": 5}]
    mapped = reader(
        tmp_path, [row(p=paragraphs, hops=named), row(p=paragraphs, hops=[3, 5])],
        relevant=None, steps={"column": "hops", "match": "p.n"},
    )  # fmt: skip
    texts = {document.id: document.text for document in mapped.documents()}
    found = [_expected(query, texts) for query in mapped.queries()]
    assert mapped.dropped.counts == counts
    assert len(found) == 2 - sum(counts.values())
    if steps is not None:
        assert found[0].steps == steps
        assert {document for step in steps for document in step} <= set(found[0].relevant)


def test_negatives_are_documents_that_never_answer(tmp_path: Path) -> None:
    rows = [{"q": "Which?", "a": "x", "pos": [{"x": "yes"}], "neg": [{"x": "no"}, {"x": "never"}, {"x": " "}]}]
    columns = {"documents": {"text": "pos.x"}, "negatives": {"text": "neg.x"}}
    mapped = reader(tmp_path, rows, relevant="all", **columns)
    documents, (query,) = list(mapped.documents()), list(mapped.queries())
    assert [document.text for document in documents] == ["yes", "no", "never"]
    assert query.relevant == {"train": (documents[0].id,)} and mapped.dropped.counts == {"document without text": 1}


def test_one_title_holds_for_all_documents_of_a_row(tmp_path: Path) -> None:
    mapped = reader(tmp_path, [row(t="Book", p=["one", "two"])], relevant=None, documents={"title": "t", "text": "p"})
    assert [document.text for document in mapped.documents()] == ["Book one", "Book two"]


def test_qrels_relate_queries_to_a_corpus_per_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": f"d{i}", "title": "T", "text": f"text {i}"} for i in range(3)])
    relation = [("q1", "d2", 1), ("q1", "d0", 1), ("q2", "d1", 0)]
    qrels = [{"query-id": q, "corpus-id": d, "score": s} for q, d, s in relation]
    write_jsonl(tmp_path / "train.jsonl", qrels)
    write_jsonl(tmp_path / "test.jsonl", [{"query-id": "q3", "corpus-id": "d1", "score": 2}])
    related = {"files": {"train": "train.jsonl", "test": "test.jsonl"}, "query": "query-id", "document": "corpus-id"}
    mapped = reader(
        tmp_path, [{"_id": f"q{i}", "text": f"question {i}"} for i in range(1, 4)],
        files={"queries": "rows.jsonl"}, id="_id", query="text", answers=None, documents=None,
        corpus={"files": "corpus.jsonl", "id": "_id", "title": "title", "text": "text"},
        relevant={"qrels": related | {"score": "score"}},
    )  # fmt: skip
    assert [document.id for document in mapped.documents()] == ["d0", "d1", "d2"]
    queries = {query.id: query.relevant for query in mapped.queries()}
    assert queries == {"q1": {"train": ("d2", "d0")}, "q3": {"test": ("d1",)}}
    assert mapped.dropped.counts == {"question without a document that answers it": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": "q1", "d": "d1", "s": "high"}, r"qrels.jsonl:1: column 's' must be a number, found the text 'high'"),
        ({"q": "q1", "d": None, "s": 1}, r"qrels.jsonl:1: 'q' and 'd' must both hold an id"),
    ],
)
def test_bad_qrels_are_named(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "qrels.jsonl", [bad])
    qrels = {"files": {"train": "qrels.jsonl"}, "query": "q", "document": "d", "score": "s"}
    corpus = {"files": "rows.jsonl", "id": "q", "text": "a"}
    mapped = reader(tmp_path, [row()], id="q", documents=None, corpus=corpus, relevant={"qrels": qrels})
    with pytest.raises(UserError, match=message):
        list(mapped.queries())
    before = mapped.fingerprint()
    write_jsonl(tmp_path / "qrels.jsonl", [bad, bad])
    assert mapped.fingerprint() != before


def test_what_is_left_out_is_counted_once_per_reading(tmp_path: Path) -> None:
    pointer = {"column": "gold", "match": "p.t"}
    rows = [row(gold=["Owl", "Gone", "Fox"]), row(gold=["Gone"]), row(q=" ", gold="Owl"), row(q=None, gold="Owl")]
    mapped = reader(tmp_path, rows, relevant=pointer)
    for _ in range(2):
        texts = {document.id: document.text for document in mapped.documents()}
        (query,) = mapped.queries()
        assert [texts[id] for id in query.relevant["train"]] == ["Owl It hoots.", "Fox It is red."]
        assert mapped.dropped.counts == {
            "question without text": 2,
            "relation to a document that its row does not hold": 2,
            "question without a document that answers it": 1,
        }


def test_paths_in_data_are_only_text(tmp_path: Path) -> None:
    name = "../../etc/passwd"
    mapped = reader(tmp_path, [row(n=name, p=[{"t": name, "x": "/etc/passwd", "ok": True}])], id="n")
    assert [query.id for query in mapped.queries()] == [name]
    assert [document.text for document in mapped.documents()] == [f"{name} /etc/passwd"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.jsonl", "set.yaml"]


def test_fingerprint_follows_mapping_and_files(tmp_path: Path) -> None:
    first = reader(tmp_path, [row()]).fingerprint()
    assert reader(tmp_path, [row(), row()]).fingerprint() != first
    assert reader(tmp_path, [row()], answers=None).fingerprint() != first
    hub = {name: MappedReader(CORPORA / f"{name}.yaml").fingerprint() for name in ("squad", "msmarco")}
    assert hub["squad"] != hub["msmarco"] and hub["squad"] == MappedReader(CORPORA / "squad.yaml").fingerprint()


# Mistakes.

BAD_ROWS = {
    "no column": (
        row(q=1),
        {"query": "question"},
        r"rows.jsonl:1: no column 'question': 'question' is not in an object",
    ),
    "no inner column": (row(p=[{"t": "a"}]), {}, r"rows.jsonl:1: no column 'p.x': 'x' is not in an object with 't'"),
    "number": (row(q=3), {}, r"rows.jsonl:1: column 'q' must be text, found the number 3"),
    "not in an object": (row(p="a"), {}, r"column 'p.x' must be in an object with key 'x', found the text 'a'"),
    "flag": (row(p=[{"t": "a", "x": "b", "ok": "yes"}]), {}, r"'p.ok' must be true, false, 0 or 1, found the text"),
    "titles": (
        row(t=["a"]),
        {"documents": {"title": "t", "text": "p.x"}},
        r"'t' must be as long as the row's documents",
    ),
    "id": (row(n=0.5), {"id": "n"}, r"column 'n' must be an id \(text or a whole number\), found the number 0.5"),
    "answers": (row(a={"b": 1}), {}, r"column 'a' must be text, found an object with 'b'"),
    "json": (row(a="[1,"), {"json": ["a"]}, r"rows.jsonl:1: column 'a' is not valid JSON"),
    "surrogate": (row(q="\ud800"), {}, r"column 'q' must be text that UTF-8 can hold"),
    "not an object": ([1], {}, r"rows.jsonl:1: expected an object with the mapping's columns, found a list of 1"),
    "nothing answers": (
        row(p=[{"t": "a", "x": "b", "ok": 0}]),
        {},
        r"no question is left \(1 times question without a",
    ),
    "no document": (row(p=[]), {}, r"no row holds a document"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row_is_named(case: str, tmp_path: Path) -> None:
    bad, changes, message = BAD_ROWS[case]
    mapped = reader(tmp_path, [bad], **changes)
    with pytest.raises(UserError, match=message):
        list(mapped.documents()), list(mapped.queries())


def test_repeated_ids_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:2: query id '7' comes twice"):
        list(reader(tmp_path, [row(n=7), row(n=7)], id="n").queries())
    rows = [row(p=[{"t": 7, "x": text, "ok": 1}]) for text in ("one", "two")]
    with pytest.raises(UserError, match=r"rows.jsonl:2: document '7' came before with another text"):
        list(reader(tmp_path, rows, documents={"id": "p.t", "text": "p.x"}).documents())


def test_bad_lines_are_named(tmp_path: Path) -> None:
    mapped = reader(tmp_path, [row()])
    good = (tmp_path / "rows.jsonl").read_bytes()
    for line, message in ((b"{", "not valid JSON"), (b"\xff", "not UTF-8"), (b"[" * 5000, "not valid JSON")):
        (tmp_path / "rows.jsonl").write_bytes(good + b"\n" + line)
        with pytest.raises(UserError, match=f"rows.jsonl:3: {message}"):
            list(mapped.documents())


BAD_MAPPINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"qeury": "q"}, r"set.yaml: unknown key, the text 'qeury'; did you mean 'query'\?"),
    "unknown inner key": ({"documents": {"txt": "p.x"}}, r"set.yaml: documents: unknown key.*did you mean 'text'\?"),
    "no source": ({"files": None}, "name either dataset"),
    "two sources": ({"dataset": "a/b"}, "name either dataset"),
    "dataset": ({"files": None, "dataset": "pandas", "splits": {"train": "train"}}, "'pandas' must be owner/name"),
    "splits beside files": ({"splits": {"train": "train"}}, "splits belong to a dataset on the hub"),
    "no splits": ({"files": None, "dataset": "a/b"}, "splits must be like '{train: train}', found null"),
    "no file": ({"files": {"train": []}}, "files.train names no file"),
    "missing file": ({"files": {"train": "gone.jsonl"}}, "files.train: 'gone.jsonl' matches no file in"),
    "ending": ({"files": {"train": "set.yaml"}}, r"must end in .jsonl"),
    "revision": (
        {"files": None, "dataset": "a/b", "splits": {"t": "t"}, "revision": 7},
        "'revision' must be text, found",
    ),
    "no query": ({"query": None}, "query is missing"),
    "no documents": ({"documents": None, "relevant": None}, "name exactly one of documents"),
    "instruction": ({"instruction": "yes"}, "instruction must be true or false"),
    "relevant": ({"relevant": {"flag": "a", "column": "b"}}, "name one of flag, column"),
    "no match": ({"relevant": {"column": "titles"}}, "match names a column of the row's documents"),
    "all with steps": ({"relevant": "all", "steps": {"column": "a", "match": "b"}}, "all contradicts steps"),
    "relevant word": ({"relevant": "every"}, "relevant: expected keys out of column, flag, match, qrels; found"),
    "corpus": (
        {"documents": None, "corpus": {"files": "a", "id": "a", "text": "b"}},
        "with a corpus, relevant must be",
    ),
    "corpus without id": ({"documents": None, "corpus": {"files": "a", "text": "b"}}, "corpus: 'id' is missing"),
    "json": ({"json": ["a.b"]}, "json names whole columns"),
    "hold_out of another split": (
        {"files": {"dev": "rows.jsonl"}, "hold_out": {"split": "test", "share": 0.5}},
        "hold_out draws from files or splits named train",
    ),
    "hold_out of another split of qrels": (
        {
            "id": "q", "documents": None, "corpus": {"files": "a", "id": "a", "text": "b"},
            "relevant": {"qrels": {"files": {"dev": "r"}, "query": "q", "document": "d"}},
            "hold_out": {"split": "test", "share": 0.5},
        },
        "hold_out draws from files or splits named train",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MAPPINGS)
def test_bad_mapping_is_named(case: str, tmp_path: Path) -> None:
    changes, message = BAD_MAPPINGS[case]
    with pytest.raises(UserError, match=message):
        list(reader(tmp_path, [row()], **changes).documents())


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.yaml: cannot be read"):
        MappedReader(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="files name a corpus, which this mapping does not read"):
        MappedReader(CORPORA / "squad.yaml", files={"train": "a.jsonl", "corpus": "b.jsonl"})
    with pytest.raises(UserError, match="files must name at least one split"):
        MappedReader(CORPORA / "popqa.yaml", files={"corpus": "b.jsonl"})
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match="broken.parquet: not valid Parquet after row 0"):
        list(MappedReader(CORPORA / "squad.yaml", files={"train": tmp_path / "broken.parquet"}).documents())


# The hub, without a network.


def test_hub_set_is_streamed_and_never_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        asked.append((names, options))
        return datasets.Dataset.from_list(SAMPLES["hotpotqa"].files["train"]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    mapped = MappedReader(CORPORA / "hotpotqa.yaml")
    assert len(list(mapped.documents())) == SAMPLES["hotpotqa"].documents
    names = [(("hotpotqa/hotpot_qa", "distractor"), split) for split in ("train", "validation")]
    assert [(names, options["split"]) for names, options in asked] == names
    assert all(options == {"split": options["split"], "revision": None, "streaming": True} for _, options in asked)


@pytest.mark.parametrize(
    "fault",
    [
        ConnectionError("Couldn't reach 'rajpurkar/squad' on the Hub"),
        datasets.exceptions.DatasetNotFoundError("Dataset doesn't exist on the Hub"),
        ValueError("BuilderConfig 'x' not found"),
        RuntimeError("Dataset scripts are no longer supported, but found squad.py"),
        pa.ArrowTypeError("cannot be cast"),
    ],
    ids=lambda fault: type(fault).__name__,
)
@pytest.mark.parametrize("late", [False, True])
def test_unreachable_set_says_what_to_do(fault: Exception, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield {"context": "a", "title": "b"}
        raise fault

    def load_dataset(*_: Any, **__: Any) -> Iterator[dict[str, Any]]:
        if not late:
            raise fault
        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = "cannot be read after row 1" if late else "cannot be opened .* name downloaded files with 'files:'"
    with pytest.raises(UserError, match=rf"rajpurkar/squad \(train\): {message}"):
        list(MappedReader(CORPORA / "squad.yaml").documents())


def test_our_own_fault_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(KeyError):
        list(MappedReader(CORPORA / "squad.yaml").documents())


# Anything at all ends in success or a UserError.


def ends_well(read: Callable[[], MappedReader]) -> None:
    try:
        mapped = read()
        ids = {document.id for document in mapped.documents()}
        for query in mapped.queries():
            assert query.text and (query.instruction or any(query.relevant.values()))
            if mapped.mapping.corpus is None:
                assert {id for found in query.relevant.values() for id in found} <= ids
    except UserError as error:
        assert str(error).isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["t", "x", "ok", "n"]), inner, max_size=4)
    ),
    max_leaves=8,
)
PARAGRAPHS = st.lists(
    st.fixed_dictionaries({"t": JSON, "x": st.text(max_size=3), "ok": st.booleans(), "n": JSON}), max_size=3
)


@FUZZ
@given(
    st.lists(
        st.fixed_dictionaries({"q": JSON | st.just("q"), "a": JSON, "p": JSON | PARAGRAPHS, "h": JSON}), max_size=3
    )
)
def test_any_values(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for changes in ({}, {"relevant": None, "steps": {"column": "h", "match": "p.n"}}, {"json": ["a"], "id": "h"}):
        ends_well(lambda changes=changes: reader(tmp_path, rows, **changes))  # type: ignore[misc]


@FUZZ
@given(st.binary(max_size=80), st.sampled_from(sorted(WRITERS)), st.integers(0, 400))
def test_any_bytes_as_file(tmp_path: Path, content: bytes, kind: str, at: int) -> None:
    file = WRITERS[kind](tmp_path / f"rows.{kind}", SAMPLES["squad"].files["train"])
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + content + whole[at + len(content) :])
    ends_well(lambda: MappedReader(CORPORA / "squad.yaml", files={"train": file}))


KEYS = ["dataset", "files", "splits", "query", "documents", "corpus", "relevant", "steps", "instruction", "json", "id"]
YAML_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["q", "p.x", "rows.jsonl", "all"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["train", "text", "id", "column", "match", "files", "qrels"]), inner, max_size=3
        )
    ),
    max_leaves=5,
)


@FUZZ
@given(
    st.dictionaries(st.sampled_from(KEYS), YAML_VALUES, max_size=5).map(lambda raw: yaml.safe_dump(raw).encode())
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
    | st.binary(max_size=40)
    | st.sampled_from(
        [b"!!int ''", b"!!bool x", b"a: 2001-99-99", b"!!timestamp x", b"!!float x", b"{" * 5000, b"? [a]\n"]
    )
)
def test_any_yaml_as_mapping(tmp_path: Path, content: bytes) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [row()])
    (tmp_path / "any.yaml").write_bytes(content)

    def read() -> MappedReader:
        mapped = MappedReader(tmp_path / "any.yaml")
        if mapped.mapping.source.dataset is not None:
            raise UserError("the hub is not asked here")
        return mapped

    ends_well(read)


def test_questions_are_held_out_by_source(tmp_path: Path) -> None:
    rows = [{"q": f"Where is {n}?", "text": f"It is {n}.", "land": f"land {n % 40}"} for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mapping = tmp_path / "lands.yaml"
    mapping.write_text(
        "files: {train: rows.jsonl}\nquery: q\ndocuments: {text: text}\nhold_out: {split: test, share: 0.2, by: land}\n"
    )
    queries = list(MappedReader(mapping).queries())
    splits = {
        split: {int(q.text.split()[2][:-1]) % 40 for q in queries if split in q.relevant} for split in ("train", "test")
    }
    assert not splits["train"] & splits["test"] and len(splits["train"] | splits["test"]) == 40
    assert 3 <= len(splits["test"]) <= 14 and len(queries) == 400
    mapping.write_text(
        "files: {rest: rows.jsonl}\nquery: q\ndocuments: {text: text}\nhold_out: {split: test, share: 2}\n"
    )
    with pytest.raises(UserError, match="share must be a number between 0 and 1"):
        MappedReader(mapping)


def test_questions_are_held_out_of_a_relation_of_its_own(tmp_path: Path) -> None:
    """The split is that of the qrels; a question that another split asks for as well keeps it."""
    write_jsonl(tmp_path / "docs.jsonl", [{"id": f"d{n}", "text": f"It is {n}."} for n in range(40)])
    write_jsonl(tmp_path / "rows.jsonl", [{"id": f"q{n}", "q": f"Where is {n}?", "land": n % 8} for n in range(40)])
    write_jsonl(tmp_path / "train.jsonl", [{"q": f"q{n}", "d": f"d{n}"} for n in range(40)])
    write_jsonl(tmp_path / "test.jsonl", [{"q": "q3", "d": "d5"}])
    mapping = {
        "files": {"any": "rows.jsonl"}, "id": "id", "query": "q",
        "corpus": {"files": "docs.jsonl", "id": "id", "text": "text"},
        "relevant": {"qrels": {"files": {"train": "train.jsonl", "test": "test.jsonl"}, "query": "q", "document": "d"}},
        "hold_out": {"split": "test", "share": 0.5, "by": "land"},
    }  # fmt: skip
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(mapping))
    queries = list(MappedReader(tmp_path / "set.yaml").queries())
    lands = {split: {int(q.id[1:]) % 8 for q in queries if split in q.relevant} for split in ("train", "test")}
    assert len(queries) == 40 and len(lands["train"]) > 1 and len(lands["test"] - {3}) > 1
    assert not lands["train"] & (lands["test"] - {3}), "whole lands are held out"
    (q3,) = (query for query in queries if query.id == "q3")
    held = 3 not in lands["train"]
    assert q3.relevant == ({"test": ("d3", "d5")} if held else {"train": ("d3",), "test": ("d5",)})


def test_a_key_twice_is_named(tmp_path: Path) -> None:
    reader(tmp_path, [row()])
    with (tmp_path / "set.yaml").open("a") as file:
        file.write("relevant: all\n")
    with pytest.raises(UserError, match=r"set.yaml: not valid YAML .*relevant.* comes twice in .* line 10"):
        MappedReader(tmp_path / "set.yaml")
