"""Damage: whatever the bytes of a file, what reads it returns, or raises a `UserError`; nothing else comes out.

A `Target` is a folder of whole files, which of them are damaged, and who reads them. A file is cut, has bits flipped,
bytes inserted or deleted, or is replaced by anything. Further formats join by another entry of `TARGETS`.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from datamodules.beir import BeirReader
from datamodules.mapped import MappedReader
from datamodules.published import PublishedReader
from datamodules.records import CorpusReader
from datamodules.store import Store
from msa_train import cli
from msa_train.checkpoints import check_sound
from msa_train.errors import UserError
from msa_train.evaluation.report import Report
from msa_train.folder_files import FolderReader
from msa_train.memory import BankFolder
from msa_train.runs import open_run
from msa_train.trust import check_file
from tests.conftest import write_corpus
from tests.test_folders import write

Arguments = Callable[..., list[str]]
EXAMPLES = 60
SLOW = 25  # of what opens a model

# bytes that readers trip over: other kinds of values, depths, half letters, numbers that are none, ways out
MARKS = [
    b"", b"\x00", b"\xff", b"\n", b"\t", b'"', b"{", b"}", b"[", b"]", b"[" * 2000, b"null", b"true", b"-", b"NaN",
    b"1e999", b"\\ud800", b"../../x", b"!!python/object/apply:os.getcwd []", b"&a [*a]", b"<<: 1",
    b"PAR1", b"\x80\x05.", b"'",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Files and their reader.

    Args:
        make: Writes whole files into a folder; what it returns is `shared`.
        files: Patterns of those that are damaged.
        read: Reads everything of the folder.
        examples: How often each file is damaged.
    """

    make: Callable[[Path, Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    examples: int = EXAMPLES


def damaged(content: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    """Content with edits: (kind, place, bytes).

    >>> damaged(b"abcdef", [("cut", 3, b"")]), damaged(b"abc", [("insert", 1, b"-"), ("flip", 0, b"x")])
    (b'abc', b'c-bc')
    """
    for kind, place, drawn in edits:
        place = place % (len(content) + 1)
        if kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + drawn + content[place:]
        elif kind == "delete":
            content = content[:place] + content[place + 1 + len(drawn) :]
        elif kind == "flip" and place < len(content):
            content = content[:place] + bytes([content[place] ^ (1 << len(drawn) % 8)]) + content[place + 1 :]
        elif kind == "replace":
            content = drawn
    return content


KINDS = st.sampled_from(["cut", "insert", "insert", "delete", "flip", "flip"])
EDIT = st.tuples(KINDS, st.integers(0, 2**20), st.sampled_from(MARKS) | st.binary(max_size=6))
DAMAGE = st.lists(EDIT, min_size=1, max_size=3) | st.binary(max_size=80).map(lambda data: [("replace", 0, data)])


def put(file: Path, content: bytes) -> None:
    """Writes a new file, since an earlier reader may have the old one mapped."""
    file.unlink()
    file.write_bytes(content)


VALUES = [None, True, -1, 0, 3, 1.5, 10**30, float("nan"), float("inf"), "x", "", "../../x", [], {}, [[]], {"a": [1]}]


def altered(content: Any, places: list[int], value: Any) -> Any:
    """A copy with another value at a place, or without the place where `value` is `...`.

    >>> altered({"a": [1, {"b": 2}]}, [0, 1, 0], "x"), altered([1, 2], [1], ...)
    ({'a': [1, {'b': 'x'}]}, [1])
    """
    place, *deeper = places
    if not isinstance(content, dict | list) or not content:
        return content if value is ... else value
    keys = sorted(content) if isinstance(content, dict) else list(range(len(content)))
    key = keys[place % len(keys)]
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    inner = altered(content[key], deeper, value) if deeper else value
    made = {name: inner if name == key else kept for name, kept in pairs if deeper or name != key or value is not ...}
    return made if isinstance(content, dict) else list(made.values())


# --- corpora ---------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"i": "q1", "q": "Which colour?", "a": ["red"], "p": [{"t": "Fox", "x": "It is red.", "ok": True}]},
    {"i": "q2", "q": "Who hoots?", "a": ["it"], "p": [{"t": "Owl", "x": "It hoots.", "ok": False}]},
]
MAPPING = (
    "files: {train: %s}\nid: i\nquery: q\nanswers: a\ndocuments: {title: p.t, text: p.x}\nrelevant: {flag: p.ok}\n"
    "hold_out: {split: test, share: 0.5}\n"
)


def read_corpus(reader: CorpusReader) -> None:
    reader.fingerprint()
    documents = list(reader.documents())
    assert all(document.text for document in documents)
    assert all(query.text for query in reader.queries())


def make_beir(folder: Path, world: Path) -> None:
    write_corpus(folder / "beir", documents=5)


def make_jsonl(folder: Path, world: Path) -> None:
    (folder / "m.yaml").write_text(MAPPING % "rows.jsonl")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def make_parquet(folder: Path, world: Path) -> None:
    (folder / "m.yaml").write_text(MAPPING % "rows.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")


def make_published(folder: Path, world: Path) -> None:
    rows = [{"query": "Who wrote it?", "reference_list": ["It is by Ann."], "answer": "Ann"}]
    (folder / "qdata_x.pkl").write_bytes(pickle.dumps(rows))
    (folder / "mdata_x.pkl").write_bytes(pickle.dumps(["A distractor.", "It is by Ann."]))


def make_store(folder: Path, world: Path) -> None:
    (store,) = (world / "cache" / "stores").glob("*/manifest.json")
    shutil.copytree(store.parent, folder / "store")


def read_store(folder: Path) -> None:
    store = Store(folder)
    assert "/" not in f"{store.name}-{store.manifest['content']}"
    for row in range(len(store.tokens)):
        store.document(row, "text"), store.tokens[row]


# --- banks and runs --------------------------------------------------------------------------------------------------


def copy_of(name: str) -> Callable[[Path, Path], None]:
    return lambda folder, world: shutil.copytree(world / name, folder / name)  # type: ignore[func-returns-value]


def read_bank(folder: Path) -> None:
    bank = BankFolder(folder).open()
    for number in bank.numbers():
        bank.id(number), bank.text(number)
    bank.read(0, bank.numbers())
    list(BankFolder(folder).verify())


def read_parts(folder: Path) -> None:
    reader = FolderReader(folder)
    reader.weights()
    for name in reader.names():
        reader.tensor(name)
    reader.trainer()


TARGETS: dict[str, Target] = {
    "a BEIR folder": Target(
        make_beir, ("beir/corpus.jsonl", "beir/queries.jsonl", "beir/qrels/train.tsv"),
        lambda folder: read_corpus(BeirReader(folder / "beir")),
    ),
    "mapped lines": Target(
        make_jsonl, ("m.yaml", "rows.jsonl"), lambda folder: read_corpus(MappedReader(folder / "m.yaml"))
    ),
    "mapped parquet": Target(
        make_parquet, ("rows.parquet",), lambda folder: read_corpus(MappedReader(folder / "m.yaml"))
    ),
    "published pickles": Target(
        make_published, ("qdata_x.pkl", "mdata_x.pkl"),
        lambda folder: read_corpus(PublishedReader(folder / "qdata_x.pkl")),
    ),
    "a store": Target(make_store, ("store/manifest.json",), lambda folder: read_store(folder / "store")),
    "a bank": Target(
        copy_of("bank"), ("bank/manifest.json", "bank/segment-*.safetensors"), lambda folder: read_bank(folder / "bank")
    ),
    "a run": Target(
        copy_of("tiny"), ("tiny/config.yaml", "tiny/routing.json", "tiny/backbone/config.json"),
        lambda folder: open_run(folder / "tiny"), SLOW,
    ),
    "an export": Target(
        copy_of("exported"), ("exported/config.json", "exported/routing.json"),
        lambda folder: open_run(folder / "exported"), SLOW,
    ),
    "a config": Target(
        copy_of("tiny"), ("tiny/config.yaml",), lambda folder: check_file(str(folder / "tiny" / "config.yaml"))
    ),
    "a checkpoint": Target(
        lambda folder, shared: write(folder, 7) and None, ("step=7.ckpt/*",),
        lambda folder: check_sound(folder / "step=7.ckpt"),
    ),
    # as one whose checksums were made after the damage
    "a checkpoint's readers": Target(
        lambda folder, shared: write(folder, 7) and None,
        ("step=7.ckpt/weights.safetensors", "step=7.ckpt/msa_train.json", "step=7.ckpt/optimizer-0-0.safetensors",
         "step=7.ckpt/trainer.pt"),
        lambda folder: read_parts(folder / "step=7.ckpt"),
    ),
    "a report": Target(copy_of("reported"), ("reported/report.json",), lambda folder: Report.open(folder / "reported")),
}  # fmt: skip
PAIRS = [(name, pattern) for name, target in TARGETS.items() for pattern in target.files]


@pytest.fixture(scope="module")
def world(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, its export, a bank of it, the store that it was trained on, and a report."""
    root = tmp_path_factory.mktemp("world")
    corpus = write_corpus(root / "corpus", documents=10)
    flags = {"data.corpus": corpus, "data.queries_per_pack": 2, "trainer.limit_val_batches": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSA_TRAIN_CACHE", str(root / "cache"))
        cli.build(["fit", *tiny_run(root, steps=1, **flags, **{"trainer.val_check_interval": 1})])
        cli.build(["encode", f"--model={root / 'tiny'}", f"--corpus={corpus}", f"--out={root / 'bank'}"])
        cli.build(["export", str(root / "tiny"), f"--out={root / 'exported'}"])
    (root / "reported").mkdir()
    mean = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    row = {"task": "t", "method": "router", "length": 64, "scores": {"recall@1": mean}, "depths": [[0.5, 1]]}
    evaluation = {"step": 1, "seconds": 2.0, "settings": {"seed": 0}, "rows": [row], "metrics": {"t": "recall@1"}}
    report = {"format": 1, "trained": 64, "k": 2, "evaluations": [evaluation]}
    (root / "reported" / "report.json").write_text(json.dumps(report))
    return root


@pytest.mark.parametrize(("name", "pattern"), PAIRS, ids=[f"{name}: {pattern}" for name, pattern in PAIRS])
def test_damage_ends_in_success_or_a_user_error(name: str, pattern: str, world: Path, tmp_path: Path) -> None:
    target = TARGETS[name]
    target.make(tmp_path, world)
    file = sorted(tmp_path.glob(pattern))[0]
    whole = file.read_bytes()
    target.read(tmp_path)  # or nothing below would mean anything
    refused = 0

    @settings(max_examples=target.examples, deadline=None, derandomize=True, database=None)
    @given(DAMAGE)
    def damage(edits: list[tuple[str, int, bytes]]) -> None:
        nonlocal refused
        put(file, damaged(whole, edits))
        try:
            target.read(tmp_path)
        except UserError as error:
            refused += 1
            assert str(error)

    damage()
    assert refused, "no damage was found at all"
    put(file, whole)
    target.read(tmp_path)


PLAIN = [(name, pattern) for name, pattern in PAIRS if Path(pattern).suffix in (".json", ".jsonl", ".yaml")]


@pytest.mark.parametrize(("name", "pattern"), PLAIN, ids=[f"{name}: {pattern}" for name, pattern in PLAIN])
def test_strange_values_end_in_success_or_a_user_error(name: str, pattern: str, world: Path, tmp_path: Path) -> None:
    """The file is sound, and says something else."""
    target = TARGETS[name]
    target.make(tmp_path, world)
    file = sorted(tmp_path.glob(pattern))[0]
    text = file.read_text()
    plain = file.suffix == ".yaml"
    values = [yaml.safe_load(text)] if plain or file.suffix == ".json" else list(map(json.loads, text.splitlines()))

    @settings(max_examples=target.examples, deadline=None, derandomize=True, database=None)
    @given(
        st.lists(st.integers(0, 40), min_size=1, max_size=5),
        st.sampled_from([..., *VALUES]),
        st.integers(0, len(values) - 1),
    )
    def change(places: list[int], value: Any, row: int) -> None:
        rows = [altered(one, places, value) if number == row else one for number, one in enumerate(values)]
        dumped = [yaml.safe_dump(one) if plain else json.dumps(one) + "\n" for one in rows]
        put(file, "".join(dumped).encode())
        try:
            target.read(tmp_path)
        except UserError as error:
            assert str(error)

    change()
