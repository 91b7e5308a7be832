"""Samples are what the model answers, shown as data; training does not notice, and nobody waits for the first rank."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

import callbacks.samples as samples
from callbacks import Samples
from datamodules import PackedMemory
from datamodules.planning import Plan
from msa_train import cli
from msa_train.errors import UserError
from msa_train.generation import Answerer, AskConfig
from msa_train.memory import Encoder, Passage
from msa_train.runs import layer_shares
from msa_train.source import PackSource
from tests.conftest import newest, write_corpus
from tests.datamodules.corpora import write_tangled_corpus
from tests.test_training import start

Arguments = Callable[..., list[str]]
ASK = {"max_new_tokens": 5}
SAMPLES = json.dumps([{"class_path": "callbacks.Samples", "init_args": {"questions": 4, "ask": ASK}}])
ALL = json.dumps(
    [
        {"class_path": "callbacks.Throughput", "init_args": {"peak_tflops": 0.1}},
        {"class_path": "callbacks.RouterMonitor", "init_args": {"settle": 0}},
        {"class_path": "callbacks.Samples", "init_args": {"ask": ASK}},
    ]
)
VALIDATES = {"trainer.limit_val_batches": 2, "trainer.val_check_interval": 4}
HOSTILE = (
    "a | b \\| c\n\n# head\n- list\n| x |\n<script>alert(1)</script> <img src=x onerror=alert(1)>\r\n"
    "[link](javascript:alert(1)) ![i](http://x/y.png) `code` *b* _i_ ~~s~~ &lt;b&gt; &#60;b&#62; "
    "\x1b[2J\x00\x9b \u202eabc "
    "http://example.org <http://example.org>\t---|---\u2028line $x$ |"
)


def written(folder: Path) -> list[dict[str, Any]]:
    """Rows of samples.jsonl."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_training_with_all_three_callbacks_is_bitwise_training_without(tiny_run: Arguments, tmp_path: Path) -> None:
    """Weights, optimiser, logged values, and the random numbers that would come next."""
    states, logs, random = [], [], []
    for name, callbacks in (("with", ALL), ("without", "[]")):
        flags = {"trainer.callbacks": callbacks, "trainer.gradient_clip_val": 1.0, **VALIDATES}
        found = cli.build(["fit", *tiny_run(tmp_path, steps=10, name=name, **flags)])
        random.append(torch.rand(3).tolist())
        states.append(newest(tmp_path / name))
        with (tmp_path / name / "metrics.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        kept = ("loss/", "train/", "routing/", "step")
        logs.append([{key: value for key, value in row.items() if key.startswith(kept) and value} for row in rows])
        assert all(module.training for module in found.model.modules())
    assert len(written(tmp_path / "with")) == 3 * 4, "validated after 4 and 8 steps, and asked at the end"
    assert random[0] == random[1]
    assert len(logs[0]) == len(logs[1]) == 12 and logs[0] == logs[1]
    assert len(states[0]["state_dict"]) > 20
    for name, weight in states[0]["state_dict"].items():
        assert torch.equal(weight, states[1]["state_dict"][name]), name
    assert len(states[0]["moments"]) > 20 and states[0]["optimizer"] == states[1]["optimizer"]
    for name, value in states[0]["moments"].items():
        assert torch.equal(value, states[1]["moments"][name]), name


def test_samples_are_what_the_trained_model_answers_over_the_documents_of_the_pack(
    tiny_run: Arguments, tmp_path: Path
) -> None:
    ask = {**ASK, "documents": 7}
    callback = json.dumps([{"class_path": "callbacks.Samples", "init_args": {"ask": ask}}])
    found = cli.build(["fit", *tiny_run(tmp_path, steps=6, **{"trainer.callbacks": callback, **VALIDATES})])
    rows = written(tmp_path / "tiny")
    assert [row["step"] for row in rows] == [4] * 4 + [6] * 4 and {row["split"] for row in rows} == {"test"}
    last, module, data = rows[4:], found.model, found.datamodule
    assert [row["query"] for row in last] == [row["query"] for row in rows[:4]]

    net, collection = module.net.eval(), data.data
    shares = layer_shares([module.layer_recall[layer] for layer in net.routed_layers])
    asked = []
    for index in (0, 1):  # three questions of a pack, and one of the next
        plan = data.packers["test"].plan(index)
        passages = [
            Passage(collection.document_id(row), collection.document_text(row), collection.document(row))
            for row in plan.documents
        ]
        bank = Encoder(net, data.protocol, "float32").bank(passages)
        answerer = Answerer(net, data.protocol, bank, shares, AskConfig(max_steps=2, max_new_tokens=5, documents=7))
        for one in plan.asked:
            asked.append((one.query, answerer.ask([collection.query(one.query, "text")])[0]))
    for row, (query, answer) in zip(last, asked[:4], strict=True):
        assert row["question"] == collection.query(query, "text") and row["answer"] == answer.text
        assert row["expected"] == [f"by river {collection.query(query, 'id')[1:]}"]
        wanted = "d" + row["query"][1:]
        assert [one["id"] for one in row["documents"]] == [document.id for document in answer.documents]
        for one, document in zip(row["documents"], answer.documents, strict=True):
            assert one["score"] == pytest.approx(document.score, abs=1e-5)
            assert one["relevance"] == ("right" if one["id"] == wanted else "wrong")
    assert {one["relevance"] for row in rows for one in row["documents"]} == {"right", "wrong"}

    board = EventAccumulator(str(tmp_path / "tiny"), size_guidance={"tensors": 0})
    board.Reload()
    texts = board.Tensors("samples/test/text_summary")
    assert [text.step for text in texts] == [4, 6]
    assert texts[1].tensor_proto.string_val[0].decode() == samples.table(last)


def cells(markdown: str) -> list[list[str]]:
    """The cells of a table as TensorBoard shows it: text, with nothing in it that is a tag but line breaks."""
    shown = markdown_to_safe_html(markdown)
    lines = re.findall(r"<tr>(.*?)</tr>", shown, flags=re.DOTALL)
    found = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line, flags=re.DOTALL) for line in lines]
    outside = re.sub(r"</?(table|thead|tbody|tr|th|td|br ?/?)( [^>]*)?>", "", shown)
    assert "<" not in outside, outside
    return [[html.unescape(cell) for cell in line] for line in found]


def test_hostile_text_is_shown_and_obeyed_by_nobody() -> None:
    document = {"id": HOSTILE, "score": 0.5, "step": 1, "relevance": "wrong"}
    sample = {"question": HOSTILE, "expected": [HOSTILE, "b"], "answer": HOSTILE, "documents": [document, document]}
    head, row = cells(samples.table([sample]))
    assert head == ["question", "expected", "answer", "documents"] and len(row) == 4
    shown = row[0]
    for words in (
        "a | b \\| c ⏎  ⏎ # head ⏎ - list ⏎ | x | ⏎ <script>alert(1)</script> <img src=x onerror=alert(1)> ⏎ ",
        "[link](javascript:alert(1)) ![i](http://x/y.png) `code` *b* _i_ ~~s~~ &lt;b&gt; &#60;b&#62; ",
        "\ufffd[2J\ufffd\ufffd \ufffdabc",
        "http://example.org <http://example.org> ---|--- ⏎ line $x$ |",
    ):
        assert words in shown, words
    assert row[2] == shown and row[1].startswith(shown) and row[3].count("0.500 wrong") == 2


def test_an_empty_answer_and_a_long_one_keep_the_table_whole() -> None:
    sample = {"question": "q" * 2000, "expected": [], "answer": "", "documents": []}
    assert cells(samples.table([sample]))[1] == ["q" * samples.SHOWN + "…", "(none)", "(none)", "(none)"]


def test_a_resumed_run_writes_every_step_once(tiny_run: Arguments, tmp_path: Path) -> None:
    """Rows behind the checkpoint go, even half a row that a kill left; those before it stay."""
    flags = {"trainer.callbacks": SAMPLES, **VALIDATES, "checkpoint.every_n_train_steps": 6}
    cli.build(["fit", *tiny_run(tmp_path, steps=12, **flags, **{"trainer.max_steps": 6})])
    file = tmp_path / "tiny" / "samples.jsonl"
    before = file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in before] == [4] * 4 + [6] * 4
    with file.open("a") as handle:
        handle.write(before[0].replace('"step": 4', '"step": 10') + "\n" + before[1][:40])
    cli.build(["fit", *tiny_run(tmp_path, steps=12, **flags), "--ckpt_path=last"])
    assert [row["step"] for row in written(tmp_path / "tiny")] == [4] * 4 + [6] * 4 + [8] * 4 + [12] * 4
    assert file.read_text().splitlines()[:8] == before


def test_two_ranks_run_through_and_the_first_one_asks(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.callbacks": ALL, **VALIDATES}
    done = start(tiny_run(tmp_path, steps=5, **flags))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in written(tmp_path / "tiny")] == [4] * 4 + [5] * 4


def test_questions_are_those_whose_documents_are_all_there(tmp_path: Path) -> None:
    corpus = write_tangled_corpus(tmp_path / "tangled")
    data = PackedMemory(
        str(corpus), vocab_size=400, max_document_tokens=60, document_tokens=2048, queries_per_pack=5, chunk_size=8
    )
    data.setup()
    assert data.data is not None
    chosen = samples.choose(data, "test", 9)
    assert sum(len(one.queries) for one in chosen) == 9 and len(chosen) > 1
    chains = 0
    for one in chosen:
        steps = [data.data.steps(query) for query in one.queries]
        assert all(set(step) & set(one.documents) for chain in steps for step in chain)
        chains += sum(len(chain) > 1 for chain in steps)
    assert chains > 0
    asked = next(row for row in range(240) if data.data.steps(row) and data.data.related(row))
    text = data.data.document_text
    evidence = {text(row) for step in data.data.steps(asked) for row in step}
    related = {text(row) for row in data.data.related(asked)}
    assert related - evidence
    for row in range(data.data.documents):
        wanted = "right" if text(row) in evidence else "related" if text(row) in related else "wrong"
        assert samples.relevance(data.data, asked, row) == wanted


def test_a_split_without_a_question_to_ask_is_refused(corpus_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PackedMemory(str(corpus_folder), vocab_size=400, document_tokens=512, queries_per_pack=3)
    data.setup()
    monkeypatch.setattr(data.packers["test"].planner, "plan", lambda index: Plan([], []))
    with pytest.raises(
        UserError, match=r"no pack of 'test' holds all documents of a question: raise data.answer_share"
    ):
        samples.choose(data, "test", 3)


def test_a_copy_of_a_right_document_is_right(tmp_path: Path) -> None:
    """The same text in another corpus."""
    corpora = [str(write_corpus(tmp_path / name, number)) for name, number in (("first", 40), ("second", 50))]
    data = PackedMemory(dict.fromkeys(corpora, 1.0), vocab_size=400, document_tokens=512, queries_per_pack=3)
    data.setup()
    assert data.data is not None
    right = [row for row in range(90) if samples.relevance(data.data, 7, row) == "right"]
    assert [data.data.document_id(row) for row in right] == ["first/d7", "second/d7"]


def test_what_cannot_be_asked_is_refused(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"needs data of class datamodules.PackedMemory: use that, or leave"):
        Samples().examine(object.__new__(PackSource))
    with pytest.raises(UserError, match="questions is 0: give at least 1"):
        Samples(questions=0)
    with pytest.raises(UserError, match=r"Samples needs a split in data.val_splits"):
        cli.build(["fit", *tiny_run(tmp_path, **{"data.val_splits": "[]", "trainer.callbacks": SAMPLES})])
    cli.build(["doctor", *tiny_run(tmp_path, name="sound", **{"trainer.callbacks": SAMPLES})])
    assert "4 questions of test, answers of 5 tokens" in " ".join(capsys.readouterr().out.split())


def test_mixed_precision_answers_as_well(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.callbacks": ALL, "trainer.precision": "bf16-mixed", **VALIDATES}
    cli.build(["fit", *tiny_run(tmp_path, steps=5, **flags)])
    assert len(written(tmp_path / "tiny")) == 8


def test_a_debug_run_leaves_no_file(tiny_run: Arguments, tmp_path: Path) -> None:
    cli.build(["fit", *tiny_run(tmp_path, **{"trainer.callbacks": ALL, "trainer.fast_dev_run": "true"})])
    assert not (tmp_path / "tiny" / "samples.jsonl").exists()
