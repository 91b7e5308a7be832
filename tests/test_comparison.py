"""Comparing runs: every run, method and length of their latest evaluations, in tables and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from msa_train import cli
from msa_train.errors import UserError
from msa_train.evaluation.evaluate import Row
from msa_train.evaluation.report import Evaluation, Report
from msa_train.evaluation.scores import Mean


def write_run(folder: Path, values: Sequence[float], task: str = "niah", step: int = 7) -> Path:
    """A report of a router at 1K, 2K, 4K, and of BM25 at 1K."""
    rows = [
        Row("router", task, 1024 << place, scores={"accuracy": Mean(value, value - 0.125, value + 0.125, 30 + place)})
        for place, value in enumerate(values)
    ]
    rows.append(Row("BM25", task, 1024, scores={"accuracy": Mean(0.5, 0.25, 0.75, 30)}))
    rows.append(Row("BM25", task, 2048, note="left out: no time is left"))
    Report(1024, 8, [Evaluation(step, 1.0, {}, rows, {task: "accuracy"})]).save(folder)
    return folder


def test_every_run_method_and_length_is_in_table_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    one, two = write_run(tmp_path / "one", [0.75, 0.5, 0.25]), write_run(tmp_path / "t[b]wo", [0.625, 0.375], step=9)
    cli.build(["report", str(one), str(two), "--out", str(tmp_path / "out" / "both")])
    said = capsys.readouterr().out
    for words in ("0.750 [0.62, 0.88]", "0.625 [0.50, 0.75]", "t[b]wo", "4K", "BM25", "32"):
        assert words in said, words
    assert all(len(line) <= 80 or str(tmp_path) in line for line in said.splitlines())
    text = (tmp_path / "out" / "both.md").read_text()
    first = "| one | 7 | router | 0.750 [0.62, 0.88] n=30 | 0.500 [0.38, 0.62] n=31 | 0.250 [0.12, 0.38] n=32 | 66.7% |"
    assert first in text
    assert "| t[b]wo | 9 | router | 0.625 [0.50, 0.75] n=30 | 0.375 [0.25, 0.50] n=31 | – | 40.0% |" in text
    assert "| one | 7 | BM25 | 0.500 [0.25, 0.75] n=30 | – | – | – |" in text
    assert (tmp_path / "out" / "both.png").stat().st_size > 10_000


def test_a_run_is_shown_by_its_last_evaluation_that_asked_the_model(tmp_path: Path) -> None:
    run = write_run(tmp_path / "one", [0.75, 0.5])
    report = Report.open(run)
    (asked,) = report.evaluations
    alone = [row for row in asked.rows if row.method != "router"]
    report.with_evaluation(Evaluation(9, 1.0, {}, alone, asked.metrics)).save(run)
    cli.build(["report", str(run), "--out", str(tmp_path / "out")])
    assert "| one | 7 | router | 0.750" in (tmp_path / "out.md").read_text()


def test_tasks_of_single_runs_have_tables_of_their_own(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", [0.75]), write_run(tmp_path / "two", [0.5], task="facts")
    cli.build(["report", str(one), str(two), "--out", str(tmp_path / "both")])
    text = (tmp_path / "both.md").read_text()
    assert text.index("## niah") < text.index("## facts") and text.count("| one |") == text.count("| two |") == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["one", "one"], "named twice"), (["nowhere"], "no report.json"), (["broken"], "not a report of this version")],
)
def test_mistakes_are_named(runs: list[str], message: str, tmp_path: Path) -> None:
    write_run(tmp_path / "one", [0.5])
    (write_run(tmp_path / "broken", [0.5]) / "report.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match=message):
        cli.build(["report", *(str(tmp_path / run) for run in runs), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out.md").exists()
