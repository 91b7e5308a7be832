"""The report of a run: complete, measured on the same packs, and without a trace on training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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


def test_a_report_on_nothing_is_refused(tiny_run: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a split in data.val_splits"):
        cli.build(["fit", *tiny_run(tmp_path, steps=1, **{"data.val_splits": "[]", "trainer.callbacks": REPORT})])
