"""The report of a run: complete, measured on the same packs, and without a trace on training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from callbacks.report import _steps_table, draw
from msa_train import cli
from msa_train.errors import UserError

Arguments = Callable[..., list[str]]
REPORT = json.dumps([{"class_path": "callbacks.BeforeAfterReport"}])


def test_report_is_written_and_training_does_not_notice(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_report = cli.build(["fit", *tiny_run(tmp_path, steps=5, name="with", **{"trainer.callbacks": REPORT})])
    said = capsys.readouterr().out
    without = cli.build(["fit", *tiny_run(tmp_path, steps=5, name="without")])
    for (name, weight), (_, other) in zip(
        with_report.model.named_parameters(), without.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, other), name

    report = json.loads((tmp_path / "with" / "before_after.json").read_text())
    row = report["splits"]["test"]
    assert row["before"]["queries"] == row["after"]["queries"] >= 4
    assert row["after"]["lm"] < row["before"]["lm"]
    assert row["random_recall@1"] == pytest.approx(1 / row["after"]["documents"], rel=0.02)
    assert row["bm25"]["recall@1"] > 0.9, "the animals' names give them away"
    assert (tmp_path / "with" / "before_after.png").stat().st_size > 10_000
    assert "tensorboard --logdir" in said and "before" in said


def test_a_split_that_the_run_did_not_start_with_is_reported_without_its_beginning(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"trainer.callbacks": REPORT, "trainer.max_steps": 1}
    cli.build(["fit", *tiny_run(tmp_path, steps=2, **{**words, "data.val_splits": '["test"]'})])
    words |= {"trainer.max_steps": 2, "ckpt_path": "last", "data.val_splits": '["test","train"]'}
    capsys.readouterr()
    cli.build(["fit", *tiny_run(tmp_path, steps=2, **words)])
    said = [line.split() for line in capsys.readouterr().out.splitlines() if "→" in line]
    report = json.loads((tmp_path / "tiny" / "before_after.json").read_text())
    assert report["splits"]["train"]["before"] is None and report["splits"]["test"]["before"]["lm"] > 0
    assert [("–" in line) for line in said] == [False, True], said
    axes = draw(report).axes[0]
    bars = {str(one.get_label()): [bar.get_height() for bar in one] for one in axes.containers}
    assert "before training" in bars and "untrained router" not in bars
    first, second = bars["before training"]
    assert first == report["splits"]["test"]["before"]["routing"]["recall@1"] and math.isnan(second)
    assert not [text for text in axes.texts if "nan" in text.get_text()]


def test_retrieval_steps_that_were_not_measured_before_have_a_dash() -> None:
    steps = [{"recall@1": 0.25, "queries": 5}, {"recall@1": 0.75, "queries": 3}]
    rows = {"known": steps, "fewer": steps[:1], "none": None}
    report = {
        "splits": {
            name: {"before": known and {"steps": known}, "after": {"steps": steps}} for name, known in rows.items()
        }
    }
    assert list(_steps_table(report).columns[3].cells) == ["0.250", "0.750", "0.250", "–", "–", "–"]


def test_a_trial_leaves_no_file(tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"trainer.callbacks": REPORT, "trainer.fast_dev_run": 1}
    cli.build(["fit", *tiny_run(tmp_path, **words)])
    said = capsys.readouterr().out
    assert "recall@1" in said and "before_after" not in said
    assert not list(tmp_path.glob("tiny/before_after*"))


def test_a_report_on_nothing_is_refused(tiny_run: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a split in data.val_splits"):
        cli.build(["fit", *tiny_run(tmp_path, steps=1, **{"data.val_splits": "[]", "trainer.callbacks": REPORT})])
