"""A run that looks after itself: signals, steps that are no numbers, memory that runs out, ranks that hang."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.packing import PackDataset
from msa_train import cli
from msa_train.errors import UserError
from msa_train.guard import REQUEUE
from msa_train.losses import routing_loss
from tests.conftest import newest
from tests.test_training import ROOT, losses, start

Arguments = Callable[..., list[str]]
STILL = {"model.phases": json.dumps([{"name": "only", "steps": 12, "routing_weight": 1.0, "backbone_lr": 3e-3,
                                      "router_lr": 3e-3, "schedule": "constant"}])}  # fmt: skip


class Disturb(L.Callback):
    """Does something to a run at a step.

    Args:
        step: The step.
        what: `signal`, `validation` (a signal in its first pack), `nan` (the loss), `memory`, or `hang`.
        rank: On which rank.
    """

    def __init__(self, step: int, what: str, rank: int = 0) -> None:
        self.step, self.what, self.rank = step, what, rank

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Disturbs."""
        if trainer.global_step != self.step or trainer.global_rank != self.rank:
            return
        if self.what == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.what == "hang":
            time.sleep(1000)
        elif self.what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Breaks the gradient."""
        if self.what == "nan" and trainer.global_step == self.step:
            loss.register_hook(lambda gradient: gradient * torch.nan)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Signals at the first pack; the second sees it."""
        here = trainer.global_step == self.step and trainer.global_rank == self.rank
        if self.what == "validation" and batch_idx == 0 and here:
            os.kill(os.getpid(), signal.SIGTERM)


class Full(L.Callback):
    """Has a file of the run lie on a full disk.

    Args:
        name: The file.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Fills."""
        file = Path(trainer.default_root_dir) / self.name
        if not file.is_symlink():
            file.symlink_to("/dev/full")


class Fail(L.Callback):
    """Fails when training has ended, as an evaluation may."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fails."""
        raise RuntimeError("the evaluation's fault")


def disturb(step: int, what: str, **others: Any) -> dict[str, str]:
    given = {"class_path": "tests.test_guard.Disturb", "init_args": {"step": step, "what": what, **others}}
    return {"trainer.callbacks": json.dumps([given])}


def test_a_signal_ends_the_run_after_its_step_and_the_rest_is_that_of_the_uninterrupted_run(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.build(["fit", *tiny_run(tmp_path, steps=8, name="whole")])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        cli.build(["fit", *tiny_run(tmp_path, steps=8, name="parts", **disturb(3, "signal"))])
    assert end.value.code == REQUEUE and "told to stop: step 4 is saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    parts = tmp_path / "parts"
    assert newest(parts)["global_step"] == 4 and max(losses(parts)) == 3
    cli.build(["fit", *tiny_run(tmp_path, steps=8, name="parts"), "--ckpt_path=last"])
    assert losses(parts) == losses(tmp_path / "whole")
    whole, rest = newest(tmp_path / "whole"), newest(parts)
    for kind in ("state_dict", "moments"):
        assert all(torch.equal(whole[kind][name], rest[kind][name]) for name in whole[kind])


def test_the_last_step_is_saved_before_others_begin_what_may_fail(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.callbacks": json.dumps([{"class_path": "tests.test_guard.Fail"}])}
    with pytest.raises(RuntimeError, match="the evaluation's fault"):
        cli.build(["fit", *tiny_run(tmp_path, steps=5, **flags)])
    assert newest(tmp_path / "tiny")["global_step"] == 5


def test_a_signal_to_one_rank_stops_both_at_the_same_step(tiny_run: Arguments, tmp_path: Path) -> None:
    two = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    done = start(tiny_run(tmp_path, steps=8, **two, **disturb(3, "signal", rank=1)))
    assert done.returncode == REQUEUE, done.stderr[-2000:]
    assert newest(tmp_path / "tiny")["global_step"] == 4


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_pack_that_is_no_number_is_left_out_and_recorded(
    what: str, tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With constant rates: the weights of a run that never had the pack."""
    packs = datasets(monkeypatch)
    packs["skip"] = 2
    cli.build(["fit", *tiny_run(tmp_path, name="without", **STILL, **{"trainer.max_steps": 5})])
    packs["skip"] = None
    flags = disturb(2, "nan") if what == "gradient" else {}
    if what == "loss":
        monkeypatch.setattr("msa_train.module.routing_loss", poisoned(2))
    cli.build(["fit", *tiny_run(tmp_path, name="with", **STILL, **{"trainer.max_steps": 6}, **flags)])
    rows = [json.loads(line) for line in (tmp_path / "with" / "skipped.jsonl").read_text().splitlines()]
    assert rows == [{"step": 2, "packs": [2]}]
    found, wanted = newest(tmp_path / "with"), newest(tmp_path / "without")
    assert found["msa_train"]["skipped_steps"] == 1 and wanted["msa_train"]["skipped_steps"] == 0
    for kind in ("state_dict", "moments"):
        assert all(torch.equal(found[kind][name], wanted[kind][name]) for name in wanted[kind])


def datasets(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """Lets runs leave a pack out: later ones take its place."""
    read, given = PackDataset.__getitem__, {"skip": None}
    monkeypatch.setattr(
        PackDataset, "__getitem__",
        lambda self, index: read(self, index + (given["skip"] is not None and index >= given["skip"])),
    )  # fmt: skip
    return given


def poisoned(*calls: int) -> Callable[..., torch.Tensor]:
    """The routing loss, infinite at some calls."""
    count = iter(range(10**6))
    return lambda *args: routing_loss(*args) * (torch.inf if next(count) in calls else 1.0)


def test_too_many_of_them_end_the_run_with_a_report(
    tiny_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msa_train.module.routing_loss", poisoned(*range(12)))
    with pytest.raises(UserError, match=r"guard.max_skipped: 4 steps had no finite gradient.*skipped.jsonl. Lower"):
        cli.build(["fit", *tiny_run(tmp_path, steps=12, **{"guard.max_skipped": 3})])
    assert len((tmp_path / "tiny" / "skipped.jsonl").read_text().splitlines()) == 4


def test_out_of_memory_names_the_pack_and_what_to_lower(tiny_run: Arguments, tmp_path: Path) -> None:
    words = r"out of memory at step 3, in pack 2: \d+ documents, \d+ tokens, the longest \d+; 3 queries: set model.rec"
    with pytest.raises(UserError, match=words):
        cli.build(["fit", *tiny_run(tmp_path, steps=6, **disturb(3, "memory"))])


def test_a_rank_that_hangs_ends_the_job_and_all_leave_their_stacks(tiny_run: Arguments, tmp_path: Path) -> None:
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "guard.hang_minutes": 0.1}
    done = start(tiny_run(tmp_path, steps=8, **two, **disturb(3, "hang", rank=1)))
    assert done.returncode != 0
    stacks = {file.name: file.read_text() for file in (tmp_path / "tiny" / "stacks").iterdir()}
    assert set(stacks) == {"rank-0.txt", "rank-1.txt"}
    hung = r"test_guard.py.*on_train_batch_start"
    assert re.search(hung, stacks["rank-1.txt"]) and not re.search(hung, stacks["rank-0.txt"])
    assert "stacks of all ranks are in" in done.stderr


def test_a_rank_that_hangs_ends_on_a_full_disk_too(tmp_path: Path) -> None:
    (tmp_path / "rank-0.txt").symlink_to("/dev/full")
    script = (
        "import sys, time; from pathlib import Path; from msa_train.hang import HangWatch\n"
        "watch = HangWatch(Path(sys.argv[1]), 0, 1, 0.5); watch.working(); watch.start(); time.sleep(60)"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=40)
    assert done.returncode == 1, "not 0, which would be the sleep's end"
    assert 'File "<string>", line 2 in <module>' in done.stderr, "its stacks"


def test_a_skipped_step_that_no_disk_takes_is_a_warning_and_a_torn_line_none(
    tiny_run: Arguments, tmp_path: Path
) -> None:
    full = {"trainer.max_steps": 4, "checkpoint.every_n_train_steps": 2}
    record = tmp_path / "tiny" / "skipped.jsonl"
    given = [
        {"class_path": "tests.test_guard.Full", "init_args": {"name": record.name}},
        {"class_path": "tests.test_guard.Disturb", "init_args": {"step": 2, "what": "nan"}},
    ]
    with pytest.warns(
        UserWarning, match=r"skipped.jsonl could not be written \(No space left on device\): training goes"
    ):
        cli.build(["fit", *tiny_run(tmp_path, steps=6, **full, **{"trainer.callbacks": json.dumps(given)})])
    assert newest(tmp_path / "tiny")["global_step"] == 4
    record.unlink()
    record.write_text('{"step": 1, "packs": [1]}\n{"step": 2, "pa')
    cli.build(["fit", *tiny_run(tmp_path, steps=6), "--ckpt_path=last"])
    assert [json.loads(line) for line in record.read_text().splitlines()] == [{"step": 1, "packs": [1]}]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_during_a_validation_breaks_it_off_and_the_run_goes_on_with_it(
    ranks: int, tiny_run: Arguments, tmp_path: Path
) -> None:
    flags: dict[str, Any] = {
        "trainer.limit_val_batches": 2, "trainer.val_check_interval": 3, "trainer.devices": ranks, "data.val_packs": 4
    }  # fmt: skip
    if ranks > 1:
        flags["trainer.strategy"] = "ddp"
    done = start(tiny_run(tmp_path, steps=7, name="whole", **flags))
    assert done.returncode == 0, done.stderr[-2000:]
    told = start(tiny_run(tmp_path, steps=7, name="parts", **flags, **disturb(3, "validation", rank=ranks - 1)))
    assert told.returncode == REQUEUE and "told to stop: step 3 is saved" in told.stderr, told.stderr[-2000:]
    done = start([*tiny_run(tmp_path, steps=7, name="parts", **flags), "--ckpt_path=last"])
    assert done.returncode == 0, done.stderr[-2000:]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert losses(parts) == losses(whole) and len(losses(whole)) == 7
    validated = losses(whole, "loss/lm/test")
    assert list(validated) == [2, 5], "in the rows of the steps before"
    assert losses(parts, "loss/lm/test") == validated, "as the run that was not told"


def test_a_signal_behind_the_last_step_changes_nothing(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.limit_val_batches": 2, "trainer.val_check_interval": 3}
    for step, what in ((2, "signal"), (3, "validation")):
        cli.build(["fit", *tiny_run(tmp_path, steps=3, name=what, **flags, **disturb(step, what))])
        assert newest(tmp_path / what)["global_step"] == 3 and losses(tmp_path / what, "loss/lm/test")


class Draw(L.Callback):
    """Remembers what each step would draw."""

    drawn: dict[int, float]

    def __init__(self) -> None:
        self.drawn = {}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws."""
        self.drawn[trainer.global_step] = float(torch.rand(()))


def test_a_resumed_run_draws_what_the_uninterrupted_one_drew(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.callbacks": json.dumps([{"class_path": "tests.test_guard.Draw"}])}

    def drawn(*words: str, **others: Any) -> dict[int, float]:
        found = cli.build(["fit", *tiny_run(tmp_path, steps=7, **flags, **others), *words])
        return next(one.drawn for one in found.trainer.callbacks if hasattr(one, "drawn"))  # type: ignore[union-attr]

    whole = drawn(name="whole")
    first, rest = drawn(name="parts", **{"trainer.max_steps": 4}), drawn("--ckpt_path=last", name="parts")
    assert len(set(whole.values())) == 7 and {**first, **rest} == whole and len(rest) == 3


def test_deterministic_runs(tiny_run: Arguments, tmp_path: Path) -> None:
    try:
        for name in ("one", "two"):
            cli.build(["fit", *tiny_run(tmp_path, steps=3, name=name, **{"trainer.deterministic": "true"})])
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
