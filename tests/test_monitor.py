"""The monitor tells of a layer that is lost, and of nothing else; what it drew before a resume it draws on."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import msa_train.attention as attention
from callbacks import RouterMonitor
from callbacks.monitor import MEASURES, draw
from msa_train import cli
from msa_train.errors import UserError
from msa_train.source import PackSource
from tests.conftest import TINY_BACKBONE, newest
from tests.test_training import losses, start

Arguments = Callable[..., list[str]]
LAYERS = ["2", "3", "overall"]


@pytest.fixture
def watched(tiny_run: Arguments, tmp_path: Path) -> Arguments:
    """Arguments of a run with two routed layers, six queries a pack, a validation every 4 packs and a monitor. Its
    weights stay as they are: what is found changes only where a test spoils it."""
    backbone = tmp_path / "backbone.json"
    backbone.write_text(json.dumps({**TINY_BACKBONE, "num_hidden_layers": 4}))

    def arguments(monitor: dict[str, Any] | None = None, **flags: Any) -> list[str]:
        callback = {
            "class_path": "callbacks.RouterMonitor",
            "init_args": {"settle": 0, "patience": 2, **(monitor or {})},
        }
        still = [{"name": "still", "steps": flags.get("steps", 20), "backbone_lr": 0.0, "router_lr": 0.0}]
        given = {
            "model.phases": json.dumps(still), "model.backbone": backbone,
            "data.queries_per_pack": 6, "data.document_tokens": 768,
            "trainer.limit_val_batches": 2, "trainer.val_check_interval": 4, "checkpoint.every_n_train_steps": 4,
            "trainer.callbacks": json.dumps([callback]), **flags,
        }  # fmt: skip
        return tiny_run(tmp_path / "runs", **given)

    return arguments


def monitor_of(found: Any) -> RouterMonitor:
    """A run's monitor."""
    return next(item for item in found.trainer.callbacks if isinstance(item, RouterMonitor))


def told(caught: list[warnings.WarningMessage], words: str) -> list[str]:
    """Warnings with these words."""
    return [str(one.message) for one in caught if words in str(one.message)]


def spoil(monkeypatch: pytest.MonkeyPatch, layer: int, lead: float = 0.001, start: int = 0) -> None:
    """The first document wins every query, by so much, in the first (0) or second (1) routed layer, from a forward
    pass on."""
    original, calls = attention.document_scores, [0]

    def spoilt(*arguments: Any) -> Tensor:
        score_QD = original(*arguments)
        number, calls[0] = calls[0], calls[0] + 1
        if number % 2 != layer or number // 2 < start:
            return score_QD
        best = score_QD.amax(1, keepdim=True) + lead
        return torch.where(torch.arange(score_QD.shape[1]) == 0, best, score_QD)

    monkeypatch.setattr(attention, "document_scores", spoilt)


def test_a_collapsed_layer_is_named_before_validation_would_tell(
    watched: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, layer=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cli.build(["fit", *watched(steps=6)])
    (said,) = told(caught, "has collapsed")
    assert said.startswith("step 2: the router has collapsed in layer 3 (diversity 0.17)"), said
    assert "on training packs, at 2 logging steps in a row" in said and "Compare with the untrained router" in said
    assert "layer 2" not in said and monitor_of(found).told["collapse"] == ["3"]


def test_a_healthy_router_is_left_in_peace(watched: Arguments) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cli.build(["fit", *watched(steps=8)])
    assert not told(caught, "collapsed") and not told(caught, "finds less")
    monitor = monitor_of(found)
    assert monitor.told == {"collapse": [], "fall": []} and [row["step"] for row in monitor.history["test"]] == [
        0,
        4,
        8,
    ]


def test_low_diversity_must_last_and_be_past_the_start(watched: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, layer=0)
    flags = {"trainer.limit_val_batches": 0}
    for monitor, words in (({"patience": 5}, "step 5:"), ({"settle": 3}, "step 4:"), ({"patience": 7}, None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cli.build(["fit", *watched(monitor, steps=6, name=f"run-{words}", **flags)])
        said = told(caught, "has collapsed")
        assert [one.partition(" the")[0] for one in said] == ([words] if words else [])


def test_held_out_queries_tell_of_a_collapse_past_the_start(
    watched: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 4 it may be the start still; at step 8 it is not."""
    spoil(monkeypatch, layer=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cli.build(["fit", *watched({"patience": 99, "settle": 5}, steps=9)])
    (said,) = told(caught, "has collapsed")
    assert said.startswith("step 8: the router has collapsed in layer 3 (diversity 0.") and "queries of 'test'" in said


def test_a_collapse_overall_is_told_once_by_whoever_watches(
    watched: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the monitor the module tells; with it, the monitor, and the module holds its peace."""
    spoil(monkeypatch, layer=0, lead=9.0)  # so much that it decides the mean over layers as well
    for name, flags, words in (
        ("without", {"trainer.callbacks": "[]"}, "the most popular document wins"),
        ("with", {}, "in layer 2 (diversity 0.17), all layers together (diversity 0.17)"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cli.build(["fit", *watched(steps=5, name=name, **flags)])
        (said,) = told(caught, "the router has collapsed")
        assert words in said


def test_recall_below_the_untrained_routers_is_told_with_both_numbers(
    watched: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packs are validated before the first step; from the fourth pass on the second layer is spoilt."""
    spoil(monkeypatch, layer=1, start=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = cli.build(["fit", *watched({"patience": 99}, steps=8)])
    history = monitor_of(found).history["test"]
    assert [row["step"] for row in history] == [0, 4, 8]
    before, after = history[0]["recall@1"]["3"], history[1]["recall@1"]["3"]
    assert after < before - 0.02
    (said,) = told(caught, "finds less than before training")
    assert f"layer 3 {before:.3f} -> {after:.3f}" in said and said.startswith("step 4:") and "'test'" in said
    assert "router_lr" in said and "layer 2" not in said


def test_a_slack_forgives(watched: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, layer=1, start=4)
    found = cli.build(["fit", *watched({"patience": 99, "slack": 1.0}, steps=4)])
    assert monitor_of(found).told["fall"] == []


def test_the_measurement_before_training_is_what_a_validation_finds(watched: Arguments) -> None:
    found = cli.build(["fit", *watched(steps=4)])
    untrained = cli.build(["validate", *watched(steps=4, name="untrained")])
    row = monitor_of(found).history["test"][0]
    values = untrained.model.held_out_values["test"]
    for measure in MEASURES:
        wanted = [values[f"layer_2/{measure}"], values[f"layer_3/{measure}"], values[measure]]
        assert list(row[measure]) == LAYERS
        assert list(row[measure].values()) == [float(value) for value in wanted], measure


def test_every_validation_is_drawn_on_tensorboard(watched: Arguments, tmp_path: Path) -> None:
    found = cli.build(["fit", *watched(steps=8)])
    board = EventAccumulator(str(tmp_path / "runs" / "tiny"), size_guidance={"images": 0})
    board.Reload()
    drawn = board.Images("routing/layers/test")
    assert [image.step for image in drawn] == [0, 4, 8]
    assert all(image.width > 1000 and len(image.encoded_image_string) > 10_000 for image in drawn)
    for name in ("margin", "layer_2/margin", "layer_3/margin"):
        logged = board.Scalars(f"routing/{name}/test")
        assert len(logged) == 2 and all(-2 < one.value < 2 for one in logged)
    rows = monitor_of(found).history["test"]
    assert all(math.isfinite(row[measure][layer]) for row in rows for measure in MEASURES for layer in LAYERS)


def test_the_picture_holds_every_layer_step_and_measure() -> None:
    layers = {"5": 0.25, "6": 0.5, "overall": 0.75}
    rows = [{"step": 10 * number, **{measure: layers for measure in MEASURES}} for number in range(20)]
    rows[3] = {**rows[3], "margin": {**layers, "6": -1.5}}
    axes = [one for one in draw(rows, "test").axes if one.get_title()]
    assert [one.get_title() for one in axes] == list(MEASURES)
    for one in axes:
        cells = one.images[0].get_array()
        assert cells.shape == (3, 20) and [label.get_text() for label in one.get_yticklabels()] == list(layers)
        assert len(one.get_xticks()) <= 8 and one.get_xticklabels()[1].get_text() == "30"
    assert axes[1].images[0].get_clim() == (-1.5, 1.5) and axes[0].images[0].get_clim() == (0, 1)


@pytest.mark.parametrize("killed", [4, 6])
def test_history_after_a_resume_is_that_of_the_uninterrupted_run(watched: Arguments, killed: int) -> None:
    """Resumed at 4, where the checkpoint came before the validation of its step; and at 6, between validations."""
    learning = [{"name": "only", "steps": 10, "routing_weight": 1.0, "backbone_lr": 3e-3, "router_lr": 3e-3}]
    flags = {"checkpoint.every_n_train_steps": 2, "model.phases": json.dumps(learning)}
    whole = monitor_of(cli.build(["fit", *watched(steps=10, name="whole", **flags)])).state_dict()
    cli.build(["fit", *watched(steps=10, name="parts", **flags, **{"trainer.max_steps": killed})])
    saved = newest(runs_of(watched) / "parts")
    seen = next(state for name, state in saved["callbacks"].items() if "RouterMonitor" in name)["history"]["test"]
    assert [row["step"] for row in seen] == ([0] if killed == 4 else [0, 4])
    parts = monitor_of(cli.build(["fit", *watched(steps=10, name="parts", **flags), "--ckpt_path=last"])).state_dict()
    rows = whole["history"]["test"]
    assert [row["step"] for row in rows] == [0, 4, 8] and rows[0]["margin"] != rows[1]["margin"] != rows[2]["margin"]
    assert whole["told"]["collapse"] and parts == whole


def test_a_run_that_began_without_a_monitor_is_told_so(watched: Arguments) -> None:
    cli.build(["fit", *watched(steps=8, **{"trainer.max_steps": 6, "trainer.callbacks": "[]"})])
    with pytest.warns(UserWarning, match="the checkpoint knows of no validation before training"):
        found = cli.build(["fit", *watched(steps=8), "--ckpt_path=last"])
    assert [row["step"] for row in monitor_of(found).history["test"]] == [8]


def test_two_ranks_watch_the_same_numbers(watched: Arguments, tmp_path: Path) -> None:
    """Both measure half of the packs; what they find together is what one finds alone."""
    found = cli.build(["fit", *watched(steps=1, name="alone", **{"trainer.limit_val_batches": 2})])
    flags = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.limit_val_batches": 1}
    done = start(watched(steps=4, **flags))
    assert done.returncode == 0, done.stderr[-2000:]
    saved = newest(tmp_path / "runs" / "tiny")["callbacks"]
    (row,) = next(state for name, state in saved.items() if "RouterMonitor" in name)["history"]["test"]
    for measure, by_layer in monitor_of(found).history["test"][0].items():
        assert row[measure] == pytest.approx(by_layer, abs=1e-6), measure
    assert len(losses(tmp_path / "runs" / "tiny", "routing/recall@1/test")) == 1


def test_other_data_is_refused_and_the_doctor_warns_of_what_cannot_be_seen(
    watched: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"needs data of class datamodules.PackedMemory: use that, or leave"):
        RouterMonitor().examine(object.__new__(PackSource))
    for flags, words in (
        ({"data.val_splits": "[]"}, "training packs alone are watched"),
        ({"data.queries_per_pack": 4}, "data.queries_per_pack 4: a pack of so few queries looks diverse"),
        ({}, "every routed layer, on training packs and test"),
    ):
        cli.build(["doctor", *watched(**flags)])
        assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"settle": -1}, {"slack": -0.1}])
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"RouterMonitor: {next(iter(wrong))} is -?[0-9.]+: give at least"):
        RouterMonitor(**wrong)


def runs_of(watched: Arguments) -> Path:
    """Where the runs of `watched` live."""
    return Path(next(one for one in watched() if one.startswith("--runs=")).partition("=")[2])
