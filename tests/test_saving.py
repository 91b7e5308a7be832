"""Which checkpoints a run keeps, and what `msa-train checkpoint` says of them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train import cli
from msa_train.errors import UserError
from msa_train.folders import WEIGHTS, checkpoints_of, step_of
from msa_train.saving import Checkpoints, best_steps, read_scores
from tests.conftest import newest
from tests.test_folders import flip

Arguments = Callable[..., list[str]]


def steps_of(run: Path) -> list[int | None]:
    return sorted(step_of(folder) or 0 for folder in checkpoints_of(run))


@pytest.fixture(scope="module")
def run(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven steps, a checkpoint at every second, three kept, and every fourth."""
    runs = tmp_path_factory.mktemp("runs")
    flags = {"checkpoint.every_n_train_steps": 2, "checkpoint.keep_last": 3, "checkpoint.keep_every": 4}
    cli.build(["fit", *tiny_run(runs, steps=11, **flags)])
    return runs / "tiny"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "tiny", symlinks=True))


def test_the_last_ones_stay_and_every_so_many_and_the_end_is_saved(run: Path) -> None:
    assert steps_of(run) == [4, 8, 10, 11]
    assert (run / "last.ckpt").resolve().name == "step=11.ckpt" and newest(run)["global_step"] == 11


def test_a_trial_saves_nothing(tiny_run: Arguments, tmp_path: Path) -> None:
    cli.build(["fit", *tiny_run(tmp_path, steps=3, **{"checkpoint.every_n_train_steps": 0})])
    assert steps_of(tmp_path / "tiny") == [] and not (tmp_path / "tiny" / "last.ckpt").exists()


def test_the_best_stay_by_what_a_validation_found(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {
        "checkpoint.every_n_train_steps": 100, "checkpoint.keep_best": 2, "checkpoint.keep_last": 1,
        "checkpoint.monitor": "loss/lm/test", "checkpoint.mode": "min", "trainer.val_check_interval": 3,
        "trainer.limit_val_batches": 1,
    }  # fmt: skip
    cli.build(["fit", *tiny_run(tmp_path, steps=13, **flags)])
    scores = read_scores(tmp_path / "tiny")
    assert list(scores) == [3, 6, 9, 12] and len(set(scores.values())) == 4
    best = set(sorted(scores, key=scores.get)[:2])  # type: ignore[arg-type]
    assert best_steps(tmp_path / "tiny", 2, "min") == best and best_steps(tmp_path / "tiny", 2, "max").isdisjoint(best)
    assert set(steps_of(tmp_path / "tiny")) == {*best, 13}


def test_going_back_gives_the_branch_up(copy: Path, tiny_run: Arguments) -> None:
    flags = {"checkpoint.every_n_train_steps": 1, "trainer.max_steps": 5, "ckpt_path": copy / "step=4.ckpt"}
    cli.build(["fit", *tiny_run(copy.parent, steps=11, **flags)])
    assert steps_of(copy) == [4, 5]


def test_a_damaged_newest_is_told_and_the_run_ends_as_it_would_have(
    copy: Path, run: Path, tiny_run: Arguments, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(copy / "step=11.ckpt" / WEIGHTS)
    cli.build(["fit", *tiny_run(copy.parent, steps=11, **{"checkpoint.every_n_train_steps": 2}), "--ckpt_path=last"])
    assert "step=11.ckpt/weights.safetensors: damaged" in capsys.readouterr().err
    whole, again = newest(run), newest(copy)
    assert all(torch.equal(whole["state_dict"][name], again["state_dict"][name]) for name in whole["state_dict"])
    assert all(torch.equal(whole["moments"][name], again["moments"][name]) for name in whole["moments"])
    assert (copy / "metrics.csv").read_text() == (run / "metrics.csv").read_text()


def command(*words: Any) -> None:
    cli.build(["checkpoint", *map(str, words)])


def test_list_verify_and_prune(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("list", copy)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [f"step={step}.ckpt" for step in (4, 8, 10, 11)]
    assert "SingleDeviceStrategy on 1 ranks, 1 packs a step" in rows[0]
    command("verify", copy)
    assert "whole: 4 checkpoints" in capsys.readouterr().out
    flip(copy / "step=8.ckpt" / WEIGHTS)
    with pytest.raises(UserError, match="1 of 4 checkpoints are damaged"):
        command("verify", copy)
    assert "step=8.ckpt/weights.safetensors: damaged" in capsys.readouterr().out
    command("verify", copy / "step=10.ckpt")
    (copy / "step=99.ckpt.writing").mkdir()
    (copy / "step=10.ckpt" / WEIGHTS).unlink()
    capsys.readouterr()
    command("list", copy)
    assert "NOT WHOLE" in capsys.readouterr().out.splitlines()[2]
    command("prune", copy, "--keep_last=1", "--dry_run")
    assert len(steps_of(copy)) == 4 and "would go    step=8.ckpt" in capsys.readouterr().out
    command("prune", copy, "--keep_last=1")
    assert steps_of(copy) == [10, 11], "what is not whole is nobody's backup, and stays for a look"
    assert not (copy / "step=99.ckpt.writing").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"every_n_train_steps": -1}, "every_n_train_steps is -1: give at least 0"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"keep_best": 1}, "keep_best and checkpoint.monitor need each other"),
        ({"monitor": "a/b"}, "keep_best and checkpoint.monitor need each other"),
    ],
)
def test_what_contradicts_itself_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Checkpoints("x", **given)


def test_a_value_that_nobody_logs_is_told(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"checkpoint.keep_best": 1, "checkpoint.monitor": "loss/lm/nope", "trainer.val_check_interval": 1,
             "trainer.limit_val_batches": 1}  # fmt: skip
    with pytest.raises(UserError, match="nothing logs 'loss/lm/nope'; there are .*loss/lm/test"):
        cli.build(["fit", *tiny_run(tmp_path, steps=2, **flags)])


def test_scores_and_links_that_no_disk_takes_are_warnings(
    tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("msa_train.saving.point_to", refused)
    given = {"class_path": "tests.test_guard.Full", "init_args": {"name": "scores.json.writing"}}
    flags = {
        "checkpoint.keep_best": 1, "checkpoint.monitor": "loss/lm/test", "trainer.val_check_interval": 2,
        "trainer.limit_val_batches": 1, "trainer.callbacks": json.dumps([given]),
    }  # fmt: skip
    with pytest.warns(UserWarning, match="could not be written") as told:
        cli.build(["fit", *tiny_run(tmp_path, steps=4, **flags)])
    words = [str(one.message) for one in told]
    for name in ("scores.json", "last.ckpt"):
        wanted = f"tiny/{name} could not be written (No space left on device): training goes on."
        assert any(wanted in word for word in words), words
    assert newest(tmp_path / "tiny")["global_step"] == 4


def test_every_start_records_what_it_ran_with(copy: Path, tiny_run: Arguments) -> None:
    cli.build(["fit", *tiny_run(copy.parent, steps=12, **{"trainer.max_steps": 12}), "--ckpt_path=last"])
    rows = [json.loads(line) for line in (copy / "environment.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 11]
    assert rows[0]["packages"]["torch"].startswith(torch.__version__.partition("+")[0]) and rows[0]["ranks"] == 1
    assert rows[0]["data"] == rows[1]["data"] and len(rows[0]["data"]) == 1
    assert rows[0]["data"][0].startswith("animals-")
