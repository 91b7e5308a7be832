"""Evaluation during training: what it leaves behind, that training does not notice, that ranks and resumes agree."""

from __future__ import annotations

import json
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import ExtrapolationEvaluation, extrapolation
from callbacks.figures import COLOURS, draw_curves, draw_depths
from datamodules import RetrievalTask
from msa_train import cli
from msa_train.errors import UserError
from msa_train.evaluation.evaluate import DEPTHS, Row
from msa_train.evaluation.report import Evaluation, Report
from msa_train.evaluation.scores import Mean
from msa_train.evaluation.task import Trial
from msa_train.guard import REQUEUE
from tests.conftest import TINY_BACKBONE, newest
from tests.test_training import start

Arguments = Callable[..., list[str]]
RANKED = {"class_path": "datamodules.RetrievalTask", "init_args": {"questions": 7, "per_memory": 3}}
ANSWERED = {"class_path": "datamodules.AnswerTask", "init_args": {"questions": 3, "per_memory": 2}}
NEEDLE = {
    "class_path": "datamodules.NeedleTask",
    "init_args": {"task": "niah_single_1", "samples": 2, "document_tokens": 128},
}
KEYS = {**NEEDLE, "init_args": {**NEEDLE["init_args"], "task": "niah_multikey_2", "samples": 3}}  # type: ignore[dict-item]
ASK = {"max_new_tokens": 4, "documents": 2, "max_steps": 1}


def evaluated(tasks: list[dict[str, Any]] | None = None, **given: Any) -> dict[str, str]:
    settings = {"tasks": [RANKED] if tasks is None else tasks, "lengths": ["256", "1x", "2x"], "ask": ASK, **given}
    callback = {"class_path": "callbacks.ExtrapolationEvaluation", "init_args": settings}
    return {"trainer.callbacks": json.dumps([callback])}


def cells(folder: Path, place: int = -1) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Scores of an evaluation, by method, task and length."""
    rows = Report.open(folder).evaluations[place].rows
    return {(row.method, row.task, row.length): {name: vars(mean) for name, mean in row.scores.items()} for row in rows}


def weights(run: Any) -> dict[str, torch.Tensor]:
    return dict(run.model.named_parameters())


def test_training_with_it_is_bitwise_training_without(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = evaluated([RANKED, ANSWERED], every_n_steps=2, at_steps=[3], baselines=["untrained", "bm25"])
    with_it = cli.build(["fit", *tiny_run(tmp_path, steps=5, name="with", **flags)])
    without = cli.build(["fit", *tiny_run(tmp_path, steps=5, name="without")])
    assert len(weights(with_it)) > 20
    for name, weight in weights(without).items():
        assert torch.equal(weight, weights(with_it)[name]), name
    logs = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("with", "without")]
    assert logs[0] == logs[1] and len(logs[0]) > 5
    assert with_it.model.net.training == without.model.net.training

    report = Report.open(tmp_path / "with")
    assert [one.step for one in report.evaluations] == [2, 3, 4, 5]
    assert {row.method for row in report.evaluations[0].rows} == {"router"}, "baselines come at the end alone"
    assert {row.method for row in report.evaluations[-1].rows} == {"router", "untrained router", "BM25"}


def test_baselines_alone_score_what_they_score_beside_the_router(tiny_run: Arguments, tmp_path: Path) -> None:
    names = ["untrained", "bm25", "full_attention"]
    flags = evaluated([RANKED, ANSWERED], baselines=names)
    cli.build(["fit", *tiny_run(tmp_path, steps=1, name="with", **flags)])
    alone = evaluated([RANKED, ANSWERED], baselines=names, router=False)
    cli.build(["test", *tiny_run(tmp_path, steps=1, name="alone", **alone)])
    beside, found = cells(tmp_path / "with"), cells(tmp_path / "alone")
    assert {method for method, _, _ in beside} == {"router", "untrained router", "BM25", "full attention"}
    assert found == {key: scores for key, scores in beside.items() if key[0] != "router"}
    assert len(found) == 3 * 3 * 2 and (tmp_path / "alone" / "extrapolation.png").is_file()


@pytest.mark.parametrize("command", ["fit", "test"])
def test_an_evaluation_that_is_told_to_stop_writes_what_it_has_and_can_be_made_anew(
    command: str,
    tiny_run: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told: list[Row] = []
    until = 3

    def tell(row: Row, **_: Any) -> None:
        told.append(row)
        if len(told) == until:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(extrapolation, "_tell", tell)
    before = signal.getsignal(signal.SIGTERM)
    words = tiny_run(tmp_path, steps=3, **evaluated([RANKED, ANSWERED], baselines=["bm25"]))
    if command == "fit":  # what is trained is trained: there is nothing to start again for
        cli.build([command, *words])
    else:
        with pytest.raises(SystemExit) as end:
            cli.build([command, *words])
        assert end.value.code == REQUEUE
    assert "told to stop: the evaluation is cut short" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    folder = tmp_path / "tiny"
    cut = Report.open(folder).evaluations[-1]
    rows = cut.rows
    assert cut.cut and "**Cut short:**" in (folder / "report.md").read_text()
    assert [bool(row.scores) for row in rows] == [True] * 3 + [False] * 3
    assert {row.note for row in rows[3:]} == {"left out: told to stop"}
    if command == "test":
        for ended, measured in ((2, 3), (4, 4)):
            until = ended
            told.clear()
            with pytest.raises(SystemExit):
                cli.build([command, *words])
            assert [one.measured for one in Report.open(folder).evaluations] == [measured], "what has more stays"
    if command == "fit":
        assert newest(folder)["global_step"] == 3
        monkeypatch.undo()
        cli.build(["test", *words, "--ckpt_path=last"])
        whole = Report.open(folder).evaluations
        assert not whole[-1].cut and len(whole[-1].rows) == 12 and all(row.scores for row in whole[-1].rows)
        monkeypatch.setattr(extrapolation, "_tell", tell)
        told.clear()
        with pytest.raises(SystemExit):
            cli.build(["test", *words, "--ckpt_path=last"])
        assert Report.open(folder).evaluations == whole, "a whole one outlives one that was cut short"


def test_what_it_leaves_behind(tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = evaluated([RANKED, ANSWERED], baselines=["bm25", "full_attention"])
    cli.build(["fit", *tiny_run(tmp_path, steps=3, **flags)])
    folder = tmp_path / "tiny"
    said = capsys.readouterr().out
    assert "retrieval_test" in said and "n=7" in said and "report.md" in said

    found = cells(folder)
    assert len(found) == 3 * 3 * 2
    for (method, task, _), scores in found.items():
        if method == "full attention" and task == "retrieval_test":
            assert not scores
            continue
        if task == "retrieval_test":
            assert {"recall@1", "recall@k", "mrr@10", "ndcg@10"} == set(scores)
        elif scores:
            assert {"exact_match", "f1", "empty"} <= set(scores)
            assert ("gold_recall" in scores) == (method != "full attention")
        for mean in scores.values():
            assert 0 <= mean["low"] <= mean["value"] <= mean["high"] <= 1 and mean["n"] in (3, 7)
    assert found["BM25", "retrieval_test", 256]["recall@1"]["value"] > 0.8, "the animals' names give them away"

    tables = (folder / "report.md").read_text()
    assert "ranks no documents" in tables and "the backbone has 512 positions" in tables
    assert all((folder / name).stat().st_size > 10_000 for name in ("extrapolation.png", "depth.png"))
    records = [json.loads(line) for line in (folder / "answers-3.jsonl").read_text().splitlines()]
    assert {record["method"] for record in records} == {"router", "BM25", "full attention"}
    assert all(record["gold"][0].startswith("d") for record in records)

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"extrapolation/curve", "extrapolation/depth"} <= set(tags["images"])
    wanted = {"extrapolation/retrieval_test/256", "extrapolation/answers_test/gold_recall/512",
              "extrapolation/retrieval_test/BM25/1K"}  # fmt: skip
    assert wanted <= set(tags["scalars"])
    (scalar,) = events.Scalars("extrapolation/retrieval_test/256")
    assert scalar.step == 3
    assert scalar.value == pytest.approx(found["router", "retrieval_test", 256]["recall@1"]["value"])


def test_testing_a_checkpoint_measures_what_training_did(tiny_run: Arguments, tmp_path: Path) -> None:
    shape = tmp_path / "config.json"  # a question about needles, answered, needs more than 512 positions
    shape.write_text(json.dumps({**TINY_BACKBONE, "max_position_embeddings": 1024}))
    flags = {"model.backbone": shape, **evaluated([RANKED, NEEDLE, ANSWERED, KEYS], lengths=["512", "1K"])}
    cli.build(["fit", *tiny_run(tmp_path, steps=10, **flags)])
    trained = cells(tmp_path / "tiny")
    (tmp_path / "tiny" / "report.json").unlink()
    cli.build(["test", *tiny_run(tmp_path, steps=10, ckpt_path="last", **flags)])
    assert cells(tmp_path / "tiny") == trained and len(trained) == 3 * 5 * 2

    mean = trained["router", "niah_mean_of_2", 512]["accuracy"]
    alone = [trained["router", task, 512]["accuracy"] for task in ("niah_single_1", "niah_multikey_2")]
    assert mean["value"] == pytest.approx(sum(one["value"] for one in alone) / 2) and mean["n"] == 2 + 3
    last = Report.open(tmp_path / "tiny").evaluations[-1]
    assert list(last.metrics)[1:3] == ["niah_mean_of_2", "niah_single_1"]
    assert last.settings["tasks"]["niah_mean_of_2"] == {"mean of": "niah_single_1, niah_multikey_2"}
    events = EventAccumulator(str(tmp_path / "tiny"))
    events.Reload()
    wanted = {"512", "gold_recall/1K", "BM25/512"}
    assert {f"extrapolation/niah_mean_of_2/{tag}" for tag in wanted} <= set(events.Tags()["scalars"])


def test_the_depth_figure_has_a_panel_for_every_task_that_was_measured_but_none_for_a_mean() -> None:
    mean = Mean(0.5, 0.25, 0.75, 4)
    depths = ((0.5, 2),) * DEPTHS
    rows = [
        Row("router", "one", 512, scores={"accuracy": mean}, depths=depths), Row("router", "two", 512, note="left out"),
        Row("router", "niah_mean_of_2", 512, scores={"accuracy": mean}),
    ]  # fmt: skip
    metrics = {"niah_mean_of_2": "accuracy", "one": "accuracy", "two": "accuracy"}
    evaluation = Evaluation(1, 1.0, {}, rows, metrics)
    report = Report(256, 8, [evaluation])
    assert [axes.get_title() for axes in draw_depths(report, evaluation).axes if axes.get_title()] == ["one: accuracy"]
    shown = [axes.get_title() for axes in draw_curves(report, evaluation).axes if axes.get_visible()]
    assert shown == list(metrics)


def test_a_method_has_one_colour_in_every_panel_and_none_is_left_out() -> None:
    mean = Mean(0.5, 0.25, 0.75, 4)
    methods = ["router", *(f"baseline {number}" for number in range(7))]
    asked = {"one": methods, "two": [methods[0], *methods[:0:-1][:3]]}
    rows = [Row(method, task, 512, scores={"accuracy": mean}) for task in asked for method in asked[task]]
    evaluation = Evaluation(1, 1.0, {}, rows, dict.fromkeys(asked, "accuracy"))
    first, second = draw_curves(Report(256, 8, [evaluation]), evaluation).axes
    one, two = ({str(line.get_label()): line.get_color() for line in axes.get_lines()} for axes in (first, second))
    assert set(methods) < set(one) and set(asked["two"]) < set(two)
    assert all(two[method] == one[method] for method in asked["two"])
    assert len({one[method] for method in methods[: len(COLOURS)]}) == len(COLOURS)


def test_two_ranks_measure_what_one_does(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = evaluated([RANKED, ANSWERED], baselines=["untrained", "bm25", "full_attention"], keys="float32")
    cli.build(["fit", *tiny_run(tmp_path, steps=10)])
    one = ["test", *tiny_run(tmp_path, steps=10, ckpt_path="last", **flags)]
    cli.build(one)
    alone = cells(tmp_path / "tiny")
    (tmp_path / "tiny" / "report.json").unlink()
    two = {"trainer.devices": 2, "trainer.strategy": "ddp_spawn", "trainer.use_distributed_sampler": "false"}
    cli.build([*one, *(f"--{name}={value}" for name, value in two.items())])
    together = cells(tmp_path / "tiny")
    assert together == alone and len(alone) == 4 * 2 * 3


class Struck(RetrievalTask, ABC):
    """Something happens at its second length, on one rank alone.

    Args:
        rank: Which.
    """

    def __init__(self, rank: int, **given: Any) -> None:
        super().__init__(**given)
        self.rank = rank

    def trials(self, length: int) -> Iterator[Trial]:
        if length > 256 and int(os.environ.get("LOCAL_RANK", "0")) == self.rank:
            self.happens()
        yield from super().trials(length)

    @abstractmethod
    def happens(self) -> None:
        """What."""


class Interrupted(Struck):
    """It is sent a signal."""

    def happens(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_the_evaluation_of_both(rank: int, tiny_run: Arguments, tmp_path: Path) -> None:
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.use_distributed_sampler": "false"}
    told = {"class_path": "tests.test_extrapolation.Interrupted", "init_args": {**RANKED["init_args"], "rank": rank}}
    done = start(tiny_run(tmp_path, steps=3, **two, **evaluated([told], baselines=["bm25"])), "test")
    assert done.returncode == REQUEUE and done.stderr.count("msa-train: told to stop") == 1, done.stderr[-2000:]
    (cut,) = Report.open(tmp_path / "tiny").evaluations
    assert cut.cut and [(row.method, row.length, bool(row.scores)) for row in cut.rows] == [
        ("router", 256, True), ("router", 512, False), ("router", 1024, False)
    ], "no rank goes on to the baseline"  # fmt: skip


def test_a_resumed_run_keeps_its_earlier_evaluations(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = evaluated(every_n_steps=5, baselines=[])
    whole = {"checkpoint.every_n_train_steps": 5, **flags}
    cli.build(["fit", *tiny_run(tmp_path, steps=15, name="whole", **whole)])
    cli.build(["fit", *tiny_run(tmp_path, steps=15, name="parts", **whole, **{"trainer.max_steps": 10})])
    cli.build(["fit", *tiny_run(tmp_path, steps=15, name="parts", ckpt_path="last", **whole)])
    assert [one.step for one in Report.open(tmp_path / "parts").evaluations] == [5, 10, 15]
    for place in range(3):
        assert cells(tmp_path / "parts", place) == cells(tmp_path / "whole", place)


def watch_figures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the evaluations that figures are drawn of."""
    drawn: list[str] = []

    def watched(draw: Callable[[Report, Evaluation], Any]) -> Callable[[Report, Evaluation], Any]:
        return lambda report, evaluation: drawn.append(evaluation.name) or draw(report, evaluation)

    monkeypatch.setattr(extrapolation, "draw_curves", watched(draw_curves))
    monkeypatch.setattr(extrapolation, "draw_depths", watched(draw_depths))
    return drawn


@pytest.mark.parametrize(("first", "kept"), [(4, [2, 4]), (1, [])])
def test_a_run_that_goes_back_gives_up_what_it_evaluated_later(
    first: int, kept: list[int], tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {**evaluated(every_n_steps=2, baselines=[]), "checkpoint.every_n_train_steps": 1, "checkpoint.keep_last": 9}
    cli.build(["fit", *tiny_run(tmp_path, steps=6, **flags)])
    folder = tmp_path / "tiny"
    assert [one.step for one in Report.open(folder).evaluations] == [2, 4, 6]
    drawn = watch_figures(monkeypatch)
    back = {**flags, **evaluated(at_end=False, baselines=[]), "ckpt_path": folder / f"step={first}.ckpt"}
    cli.build(["fit", *tiny_run(tmp_path, steps=6, **back, **{"trainer.max_steps": first + 1})])
    assert sorted(path.name for path in folder.glob("answers-*")) == [f"answers-{step}.jsonl" for step in kept]
    names = ("report.json", "report.md", "extrapolation.png", "depth.png")
    assert [(folder / name).is_file() for name in names] == [bool(kept)] * 4
    if kept:
        assert [one.step for one in Report.open(folder).evaluations] == kept
        assert (folder / "report.md").read_text().startswith(f"# Extrapolation after {kept[-1]} steps\n")
    assert drawn == [str(step) for step in kept[-1:] for _ in range(2)]


def test_tables_and_figures_are_of_the_evaluation_that_was_made_last(
    tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = watch_figures(monkeypatch)
    flags = {**evaluated(every_n_steps=2, baselines=[]), "checkpoint.every_n_train_steps": 2}
    cli.build(["fit", *tiny_run(tmp_path, steps=4, **flags)])
    folder = tmp_path / "tiny"
    own = contents(folder)
    alone = evaluated(router=False, baselines=["bm25"])
    cli.build(["test", *tiny_run(tmp_path, steps=4, ckpt_path="last", **alone)])
    tables = (folder / "report.md").read_text()
    assert drawn == ["2", "2", "4", "4", "4-baselines", "4-baselines"]
    assert "| BM25 |" in tables and "| router |" not in tables
    report = Report.open(folder)
    assert [one.name for one in report.evaluations] == ["2", "4", "4-baselines"] and report.latest.step == 4
    assert (folder / "answers-4.jsonl").read_bytes() == own["answers-4.jsonl"]
    assert (folder / "answers-4-baselines.jsonl").is_file()
    cli.build(["test", *tiny_run(tmp_path, steps=4, ckpt_path=folder / "step=2.ckpt", **flags)])
    assert drawn[6:] == ["2", "2"] and (folder / "report.md").read_text().startswith("# Extrapolation after 2 steps\n")


class Faulty(Struck):
    """It fails."""

    def happens(self) -> None:
        raise ZeroDivisionError("ours")


def faulty(rank: int) -> dict[str, Any]:
    return {"class_path": "tests.test_extrapolation.Faulty", "init_args": {**RANKED["init_args"], "rank": rank}}


def test_what_was_measured_outlives_a_failure(tiny_run: Arguments, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="ours"):
        cli.build(["fit", *tiny_run(tmp_path, steps=2, **evaluated([faulty(0)], baselines=["bm25"]))])
    folder = tmp_path / "tiny"
    (cut,) = Report.open(folder).evaluations
    assert cut.cut and [(row.method, row.length, row.scores["recall@1"].n) for row in cut.rows] == [("router", 256, 7)]
    assert len((folder / "answers-2.jsonl").read_text().splitlines()) == 7
    assert "or failed; `msa-train test` makes it anew" in (folder / "report.md").read_text()


def test_what_was_measured_outlives_a_failure_of_another_rank(tiny_run: Arguments, tmp_path: Path) -> None:
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.use_distributed_sampler": "false"}
    done = start(tiny_run(tmp_path, steps=2, **two, **evaluated([faulty(1)], baselines=["bm25"])), "test")
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr, done.stderr[-2000:]
    (cut,) = Report.open(tmp_path / "tiny").evaluations
    assert cut.cut and [(row.method, row.length) for row in cut.rows] == [("router", 256)]
    assert (tmp_path / "tiny" / "depth.png").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "tasks are none"),
        ({"tasks": [RANKED, RANKED]}, "each with a name of its own"),
        ({"lengths": ["10 miles"]}, "'10 miles' is no length"),
        ({"lengths": ["16"]}, "lower per_memory, or begin with longer memories"),
        ({"budget_s": 0}, "budget_s above 0"),
        ({"tasks": [{**RANKED, "init_args": {"split": "dev"}}]}, "no split 'dev'"),
        ({"tasks": [{**NEEDLE, "init_args": {"task": "niah_9"}}]}, "niah_9"),
        ({"router": False, "baselines": []}, "there are only baselines: give some"),
        ({"router": False}, "ask the baselines in `msa-train test`"),
        ({"judge": {"model": ""}}, "model is empty"),
        ({"judge": {"model": "any", "key_variable": "NO_SUCH_KEY"}}, "NO_SUCH_KEY"),
        ({"baselines": ["dense"], "dense_model": "nowhere"}, "cannot open the embedding model 'nowhere'"),
        (
            {"tasks": [{**NEEDLE, "init_args": {"task": "niah_single_1", "document_tokens": 600}}], "lengths": ["1K"]},
            "task 'niah_single_1': document 'noise-600/1' has 568 .* 512 positions: lower document_tokens",
        ),
    ],
)
def test_mistakes_are_told_before_training(
    settings: dict[str, Any], message: str, tiny_run: Arguments, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        cli.build(["fit", *tiny_run(tmp_path, steps=1, **evaluated(**settings))])
    assert not list(tmp_path.glob("tiny/metrics.csv"))


def test_a_document_longer_than_the_models_positions_is_told_before_training(
    tiny_run: Arguments, tmp_path: Path
) -> None:
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({**TINY_BACKBONE, "max_position_embeddings": 24}))
    flags = {"model.backbone": shape}
    with pytest.raises(UserError, match=r"task 'retrieval_test': .* 24 positions: lower data.max_document_tokens"):
        cli.build(["fit", *tiny_run(tmp_path, steps=1, **flags, **evaluated())])
    alone = evaluated(router=False, baselines=["bm25"])
    cli.build(["test", *tiny_run(tmp_path, steps=1, **flags, **alone)])
    assert cells(tmp_path / "tiny"), "what has no positions of the model's needs none"


def test_the_doctor_knows_which_lengths_have_documents(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = evaluated(lengths=["256", "1M"])
    cli.build(["doctor", *tiny_run(tmp_path, steps=20, **flags)])
    said = " ".join(capsys.readouterr().out.split())
    assert "retrieval_test to 256" in said and "add distractors" in said


def test_the_doctor_knows_that_haystacks_have_no_end(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.build(["doctor", *tiny_run(tmp_path, steps=20, **evaluated([NEEDLE, RANKED], lengths=["1536", "1M"]))])
    said = " ".join(capsys.readouterr().out.split())
    assert "niah_single_1 to 1M" in said and "retrieval_test to 1M" not in said and said.count("add distractors") == 1


def test_the_doctor_goes_on_where_the_data_cannot_be_opened(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.build(["doctor", *tiny_run(tmp_path, steps=20, **evaluated(), **{"data.corpus": tmp_path / "nowhere"})])
    said = capsys.readouterr().out
    assert "nowhere" in said and "retrieval_test" in said


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_debug_run_asks_the_shortest_memory_alone_and_leaves_no_trace(
    tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "any")
    told: list[Row] = []
    monkeypatch.setattr(extrapolation, "_tell", lambda row, **_: told.append(row))
    flags = evaluated(baselines=["bm25"], judge={"model": "any", "key_variable": "A_KEY"})
    trial = {**flags, "trainer.fast_dev_run": 1}
    cli.build(["fit", *tiny_run(tmp_path, **trial)])
    assert [(row.method, row.length) for row in told] == [("router", 256), ("BM25", 256)]
    assert not (tmp_path / "tiny").exists(), "a real run may start there"
    cli.build(["fit", *tiny_run(tmp_path, steps=1, **flags)])
    before = contents(tmp_path / "tiny")
    assert {"report.json", "report.md", "extrapolation.png", "depth.png", "answers-1.jsonl"} < set(before)
    cli.build(["fit", *tiny_run(tmp_path, **trial)])
    after = contents(tmp_path / "tiny")
    assert {name: after[name] for name in before} == before


def test_rounds_and_single_steps_do_not_measure_twice() -> None:
    callback = ExtrapolationEvaluation([RetrievalTask()], every_n_steps=4, at_steps=(8, 9))
    assert [step for step in range(1, 13) if callback.due(step, 12)] == [4, 8, 9]
