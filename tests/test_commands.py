"""encode, ask, bank: from a trained run to answers with their documents, on the terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msa_train import cli
from msa_train.commands import printable
from msa_train.memory import BankFolder, encoding
from tests.conftest import write_corpus
from tests.memory.banks import assert_same

Arguments = Callable[..., list[str]]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def learnt(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that knows one pack by heart: its folder, its documents as a corpus, its questions and their answers."""
    root = tmp_path_factory.mktemp("learnt")
    phases = [{"name": "only", "steps": 150, "routing_weight": 1.0, "lm_weight": 1.0, "backbone_lr": 5e-3,
               "router_lr": 5e-3, "schedule": "cosine"}]  # fmt: skip
    flags = {
        "model.phases": json.dumps(phases), "model.msa.top_k": 3, "data.corpus": write_corpus(root / "animals"),
        "data.queries_per_pack": 6, "data.answer_share": 1.0, "data.overfit_packs": 1,
        "trainer.gradient_clip_val": 1.0, "trainer.log_every_n_steps": 50,
    }  # fmt: skip
    trained = cli.build(["fit", *tiny_run(root / "runs", steps=150, **flags)])
    data = trained.datamodule
    plan = data.stages[0].plan(0)
    (root / "corpus").mkdir()
    with (root / "corpus" / "corpus.jsonl").open("w") as file:  # in the pack's order: document n has the number n
        for row in plan.documents:
            file.write(json.dumps({"_id": data.data.document_id(row), "text": data.data.document_text(row)}) + "\n")
    asked = {
        data.data.query(one.query, "text"): (
            data.data.query(one.query, "answers")[0],
            data.data.document_id(one.steps[0][0]),
        )
        for one in plan.asked
    }
    assert len(asked) == 6
    return {"run": root / "runs" / "tiny", "corpus": root / "corpus", "asked": asked, "documents": len(plan.documents)}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Exit code and words of a command line."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["msa-train", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


@pytest.fixture
def bank(learnt: dict[str, Any], run: Run, tmp_path: Path) -> Path:
    code, _, said = run("encode", "--model", learnt["run"], "--corpus", learnt["corpus"], "--out", tmp_path / "bank")
    assert code == 0, said
    return tmp_path / "bank"


@pytest.mark.parametrize("mode", ["router", "generative"])
@pytest.mark.parametrize("steps", [1, 4])
def test_what_was_learnt_is_answered_with_its_document(
    mode: str, steps: int, learnt: dict[str, Any], bank: Path, run: Run
) -> None:
    """Six questions known by heart; with four steps allowed, the model itself ends retrieval after the first."""
    right = 0
    for question, (answer, document) in learnt["asked"].items():
        code, said, _ = run("ask", "--model", learnt["run"], "--bank", bank, "--mode", mode, "--max_steps", steps,
                            "--max_new_tokens", 24, question)  # fmt: skip
        assert code == 0
        words, _, documents = said.partition("\n\n")
        retrieved = re.findall(r"^\[(\d+)\] (\S+)  (-?\d\.\d{3})  step (\d)  (.+)$", documents, flags=re.MULTILINE)
        assert retrieved and all(-1 <= float(score) <= 1 for _, _, score, _, _ in retrieved)
        right += words.strip() == answer and [name for _, name, *_ in retrieved] == [document]
    assert right >= 5, "of six: whatever misroutes was not learnt"


def test_questions_are_read_until_an_empty_line(
    learnt: dict[str, Any], bank: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = list(learnt["asked"])[:2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "", "never asked"]) + "\n"))
    code, said, _ = run("ask", "--model", learnt["run"], "--bank", bank, "--mode", "generative")
    assert code == 0
    for question in questions:
        assert learnt["asked"][question][0] in said
    assert len(re.findall(r"^\[\d+\]", said, flags=re.MULTILINE)) == 2


def test_an_estimate_is_what_is_written_and_writes_nothing(learnt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    out = tmp_path / "bank"
    given = ("encode", "--model", learnt["run"], "--corpus", learnt["corpus"], "--out", out, "--keys", "int8")
    code, estimate, _ = run(*given, "--estimate")
    assert code == 0 and not out.exists()
    code, said, _ = run(*given)
    assert code == 0 and said.startswith(estimate) and f"bank        {out}" in said
    opened = BankFolder(out).open()
    assert f"documents   {len(opened):,}, {opened.tokens:,} tokens, {opened.chunks:,} chunks" in estimate
    assert opened.shape.precision == "int8" and len(opened) == learnt["documents"]


def test_documents_beyond_the_models_positions_are_split(learnt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"_id": "long", "text": "The red fox sleeps. " * 200}) + "\n")
    assert run("encode", "--model", learnt["run"], "--corpus", tmp_path, "--out", tmp_path / "bank")[0] == 0
    opened = BankFolder(tmp_path / "bank").open()
    longest = max(int(segment.tokens_D.max()) for segment in opened.segments)
    assert [opened.id(number) for number in opened.numbers()][:2] == ["long#1", "long#2"] and 400 < longest <= 512


def test_a_bank_is_changed_by_its_commands(learnt: dict[str, Any], bank: Path, run: Run, tmp_path: Path) -> None:
    before = BankFolder(bank).open()
    first, second = before.id(1), before.id(2)
    (tmp_path / "more").mkdir()
    rows = [
        {"_id": first, "text": before.text(1)},
        {"_id": second, "text": "The plaid yak lives nowhere."},
        {"_id": "new", "text": "The pink emu lives by the road."},
    ]
    (tmp_path / "more" / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said, _ = run("bank", bank, "--add", tmp_path / "more")
    assert code == 0 and "1 added, 1 replaced, 0 removed, 1 as they were" in said
    after = BankFolder(bank).open()
    assert after.text(2) == rows[1]["text"] and after.id(len(before) + 1) == "new" and len(after) == len(before) + 1
    code, said, _ = run("bank", bank, "--remove", "new", first, "--verify")
    assert code == 0 and "2 removed" in said and "every checksum as written" in said
    assert f"documents   {len(before) - 1:,}" in said and str(learnt["run"]) in said
    assert not BankFolder(bank).open().has(first)


def corpus_of(folder: Path, **texts: str) -> Path:
    """A corpus of these documents."""
    folder.mkdir(exist_ok=True)
    rows = [{"_id": name, "text": text} for name, text in texts.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_document_is_not_taken_for_a_part_by_its_name(learnt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    """Somebody's own `repo#1` and `repo#2` are no parts of `repo`, and none of its parts takes their place."""
    own = {"repo#1": "The red fox lives by the river.", "repo#2": "The blue heron lives by the sea."}
    out, issues = tmp_path / "bank", corpus_of(tmp_path / "issues", **own)
    assert run("encode", "--model", learnt["run"], "--corpus", issues, "--out", out)[0] == 0
    code, said, _ = run("bank", out, "--add", corpus_of(tmp_path / "readme", repo="This project is about foxes."))
    assert code == 0 and "1 added, 0 replaced, 0 removed, 0 as they were" in said
    assert BankFolder(out).open().names() == ["repo#1", "repo#2", "repo"]
    long = corpus_of(tmp_path / "long", repo="The red fox sleeps. " * 200)
    code, _, said = run("bank", out, "--add", long)
    assert code == 2 and "'repo#1' is of 'repo#1' in the bank and of 'repo'" in said and "another name" in said
    code, said, _ = run("bank", out, "--remove", "repo")
    assert code == 0 and "1 removed" in said
    opened = BankFolder(out).open()
    assert {name: opened.text(opened.number(name)) for name in opened.names()} == own
    code, _, said = run("bank", out, "--remove", "repo")
    assert code == 2 and "no document 'repo'" in said


def test_a_split_document_is_changed_and_removed_as_a_whole(learnt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    def corpus(sentences: int) -> Path:
        return corpus_of(tmp_path / "corpus", long="The red fox sleeps. " * sentences, note="The owl wakes.")

    out = tmp_path / "bank"
    assert run("encode", "--model", learnt["run"], "--corpus", corpus(200), "--out", out)[0] == 0
    before = BankFolder(out).open().names()
    assert len(before) > 4 and {"long#1", "long#4", "note"} <= set(before)
    code, said, _ = run("bank", out, "--add", corpus(60))
    assert code == 0 and BankFolder(out).open().names() != before
    left = BankFolder(out).open().names()
    assert len(left) < len(before) and f"{len(before) - len(left)} removed" in said
    assert run("bank", out, "--add", corpus(2))[0] == 0
    assert sorted(BankFolder(out).open().names()) == ["long", "note"]
    assert run("bank", out, "--add", corpus(200))[0] == 0
    code, said, _ = run("bank", out, "--remove", "long")
    assert code == 0 and BankFolder(out).open().names() == ["note"]


def test_breaking_off_is_one_line(
    learnt: dict[str, Any], bank: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("msa_train.generation.begin", broken)
    code, _, said = run("ask", "--model", learnt["run"], "--bank", bank, "hm?")
    assert code == 130 and said.strip() == "msa-train: broken off"


def test_other_peoples_letters_are_printed_and_commands_are_not() -> None:
    words = "日\u3000本 a\u00a0b \u200d é"
    assert printable(words) == words
    assert printable("a\x1b[2J\x9b\u202eb\r") == "a\ufffd[2J\ufffd\ufffdb\ufffd"


def test_adding_needs_the_run_or_its_new_place(learnt: dict[str, Any], bank: Path, run: Run, tmp_path: Path) -> None:
    manifest = json.loads((bank / "manifest.json").read_text())
    (bank / "manifest.json").write_text(json.dumps({**manifest, "run": str(tmp_path / "gone")}))
    code, _, said = run("bank", bank, "--add", learnt["corpus"])
    assert code == 2 and "no longer at" in said and "--model RUN" in said
    code, said, _ = run("bank", bank, "--add", learnt["corpus"], "--model", learnt["run"])
    assert code == 0 and f"0 added, 0 replaced, 0 removed, {learnt['documents']} as they were" in said


def test_adding_opens_the_checkpoint_that_encoded(learnt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    """A run has several; where none was named, and another is the newest now, the refusal says what to do."""
    earlier, newest = sorted(learnt["run"].glob("step=*.ckpt"))
    out, more = tmp_path / "bank", corpus_of(tmp_path / "more", new="The pink emu lives by the road.")
    assert run("encode", "--model", earlier, "--corpus", learnt["corpus"], "--out", out)[0] == 0
    code, said, _ = run("bank", out, "--add", more)
    assert code == 0 and "1 added" in said and f"encoded by  {earlier}" in said
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "run": str(learnt["run"])}))
    code, _, said = run("bank", out, "--add", more)
    assert code == 2 and "other weights" in said
    assert "with this model, or name the checkpoint that encoded it: --model RUN/step=N.ckpt" in said
    assert run("bank", out, "--add", more, "--model", newest)[0] == 2
    code, said, _ = run("bank", out, "--add", more, "--model", earlier)
    assert code == 0 and "0 added, 0 replaced, 0 removed, 1 as they were" in said


def test_a_document_cannot_command_the_terminal(learnt: dict[str, Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    hostile = {"_id": "a\x1b]0;owned\x07", "text": "The red fox\x1b[2J\x9b lives [bold]here[/bold]."}
    (tmp_path / "corpus" / "corpus.jsonl").write_text(json.dumps(hostile) + "\n")
    out = tmp_path / "bank"
    assert run("encode", "--model", learnt["run"], "--corpus", tmp_path / "corpus", "--out", out)[0] == 0
    code, said, _ = run("ask", "--model", learnt["run"], "--bank", out, "Where does the red fox live?")
    assert code == 0 and "[bold]here[/bold]" in said
    assert not {letter for letter in said if ord(letter) < 32 or 127 <= ord(letter) < 160} - {"\n"}


def test_the_example_builds_asks_changes_and_asks_again(learnt: dict[str, Any]) -> None:
    script = Path(__file__).parent.parent / "examples" / "ask_a_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), str(learnt["run"])], capture_output=True, text=True, timeout=300, check=True
    )
    said = done.stdout
    assert said.startswith("4 documents, ") and said.count("What does aviary.census do?") == 3
    assert said.index("one document replaced") < said.index("and removed")
    assert "aviary.census" not in said.partition("and removed")[2].partition("from ")[2], "it is gone"


BAD: dict[str, tuple[list[str], str]] = {
    "no run": (["ask", "--model", "{tmp}/none", "--bank", "{bank}", "hm?"], "no run '.*none'"),
    "no bank": (["ask", "--model", "{run}", "--bank", "{tmp}/none", "hm?"], "is no memory bank"),
    "empty question": (["ask", "--model", "{run}", "--bank", "{bank}", " "], "the question is empty"),
    "no documents": (["ask", "--model", "{run}", "--bank", "{bank}", "--documents", "0", "hm?"], "documents is 0"),
    "unknown mode": (["ask", "--model", "{run}", "--bank", "{bank}", "--mode", "oracle", "hm?"], "mode"),
    "misspelt option": (["ask", "--modle", "{run}", "--bank", "{bank}", "hm?"], "did you mean"),
    "run as bank": (["ask", "--model", "{run}", "--bank", "{run}", "hm?"], "is no memory bank"),
    "bank as run": (["ask", "--model", "{bank}", "--bank", "{bank}", "hm?"], "not a run of msa-train"),
    "no corpus": (["encode", "--model", "{run}", "--corpus", "{tmp}/none", "--out", "{tmp}/out"], "neither a folder"),
    "empty corpus": (["encode", "--model", "{run}", "--corpus", "{tmp}/empty", "--out", "{tmp}/out"], "it needs"),
    "bank is there": (["encode", "--model", "{run}", "--corpus", "{corpus}", "--out", "{bank}"], "holds a bank"),
    "folder in use": (["encode", "--model", "{run}", "--corpus", "{corpus}", "--out", "{corpus}"], "corpus.jsonl"),
    "batch of nothing": (
        ["encode", "--model", "{run}", "--corpus", "{corpus}", "--out", "{tmp}/out", "--batch_tokens", "0"],
        "batch_tokens is 0",
    ),
    "unknown document": (["bank", "{bank}", "--remove", "nobody"], "no document 'nobody'"),
    "bank of nothing": (["bank", "{tmp}/none"], "is no memory bank"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_and_changes_nothing(
    case: str, learnt: dict[str, Any], bank: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "corpus.jsonl").write_text("")
    places = {"tmp": tmp_path, "bank": bank, "run": learnt["run"], "corpus": learnt["corpus"]}
    before = {path: path.stat().st_mtime_ns for path in bank.iterdir()}
    arguments, message = BAD[case]
    code, _, said = run(*(argument.format(**places) for argument in arguments))
    line = said.strip().splitlines()[-1]
    assert code == 2 and line.startswith("msa-train: error: ") and "Traceback" not in said, said
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in bank.iterdir()}


def test_another_runs_bank_is_refused(
    learnt: dict[str, Any], bank: Path, run: Run, tiny_run: Arguments, tmp_path: Path
) -> None:
    cli.build(["fit", *tiny_run(tmp_path / "runs", steps=1)])
    code, _, said = run("ask", "--model", tmp_path / "runs" / "tiny", "--bank", bank, "hm?")
    assert code == 2 and re.search("the bank was encoded with other|with another tokenizer", said), said


def test_a_bank_that_does_not_fit_is_refused_with_the_figures(
    learnt: dict[str, Any], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    given = ("encode", "--model", learnt["run"], "--corpus", learnt["corpus"], "--out", tmp_path / "out")
    code, _, said = run(*given)
    assert code == 2 and re.search(r"the bank takes \d\.\d MiB, 0\.0 MiB are free there", said)
    assert not (tmp_path / "out").exists()


class Encoded:
    """Counts the documents that are encoded, each in a segment of its own, and breaks off behind so many."""

    def __init__(self) -> None:
        self.documents, self.most = 0, 1_000_000


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Encoded:
    counted, honest = Encoded(), encoding.Encoder._encode

    def encode(self: Any, *batch: Any) -> Any:
        if counted.documents == counted.most:
            raise KeyboardInterrupt
        counted.documents += 1
        return honest(self, *batch)

    monkeypatch.setattr(encoding, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(encoding.Encoder, "_encode", encode)
    return counted


def test_an_encoding_that_was_broken_off_goes_on(
    learnt: dict[str, Any], run: Run, tmp_path: Path, encoded: Encoded
) -> None:
    given = ("encode", "--model", learnt["run"], "--corpus", learnt["corpus"], "--out", tmp_path / "out")
    encoded.most = 4
    assert run(*given)[0] == 130
    code, _, said = run("bank", tmp_path / "out")
    assert code == 2 and "broken off" in said
    encoded.most = 1_000_000
    assert run(*given)[0] == 0
    assert encoded.documents == learnt["documents"], "what was done is not done again"


def test_an_encoding_goes_on_where_what_is_left_of_it_fits(
    learnt: dict[str, Any], run: Run, tmp_path: Path, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("encode", "--model", learnt["run"], "--corpus", learnt["corpus"], "--out", tmp_path / "out")
    encoded.most = learnt["documents"] // 2
    assert run(*given)[0] == 130
    written = sum(file.stat().st_size for file in (tmp_path / "out").glob("segment-*"))
    usage, encoded.most = shutil.disk_usage(tmp_path), 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=written // 100))
    code, _, said = run(*given)
    assert code == 2 and "are free there" in said
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=written))
    code, _, said = run(*given)
    assert code == 0, said
    assert encoded.documents == learnt["documents"] == len(BankFolder(tmp_path / "out").open())


@pytest.mark.parametrize("most", [0, 1, 4, 5])
def test_adding_that_was_broken_off_leaves_a_whole_bank_and_goes_on(
    learnt: dict[str, Any], bank: Path, run: Run, tmp_path: Path, encoded: Encoded, most: int
) -> None:
    """Three documents are new, one and some parts of another are replaced, and that other has a part too many."""
    first, long = BankFolder(bank).open().id(1), "The red fox sleeps. "
    assert run("bank", bank, "--add", corpus_of(tmp_path / "before", long=long * 200))[0] == 0
    shutil.copytree(bank, tmp_path / "whole")
    more = {"a": "A pink emu.", "b": "A grey gnu.", first: "A plaid yak.", "long": "A " + long * 170, "c": "A newt."}
    given = ("--add", corpus_of(tmp_path / "more", **more))
    encoded.documents = 0
    code, said, _ = run("bank", tmp_path / "whole", *given)
    assert code == 0 and "3 added, 3 replaced, 1 removed, 2 as they were" in said and encoded.documents == 6
    before, encoded.documents, encoded.most = BankFolder(bank).open(), 0, most
    assert run("bank", bank, *given)[0] == 130
    code, said, _ = run("bank", bank, "--verify")
    assert code == 0 and "every checksum as written" in said
    assert len(BankFolder(bank).open()) == len(before) + min(most, 3), "what is done is kept"
    encoded.documents, encoded.most = 0, 1_000_000
    assert run("bank", bank, *given)[0] == 0
    assert_same(BankFolder(bank).open(), BankFolder(tmp_path / "whole").open())
