"""Speed is what was trained on over the time that it took; the clock is the test's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

import callbacks.throughput as throughput
from callbacks import Throughput
from datamodules.packed_memory import PackLoader
from msa_train import cli
from msa_train.errors import UserError
from msa_train.operations import ModelSizes, PackSizes, training_operations
from msa_train.source import PackSource
from tests.test_training import start

Arguments = Callable[..., list[str]]
TRAIN, VALIDATE, SAVE, FETCH = 4.0, 100.0, 1000.0, 1.0  # seconds that each takes
now = 0.0


def spend(seconds: float) -> None:
    """Time passes."""
    global now
    now += seconds


class Spend(L.Callback):
    """Time passes in training, and far more of it in what does not count."""

    def on_train_batch_start(self, *_: Any) -> None:
        """Trains."""
        spend(TRAIN)

    def on_validation_end(self, *_: Any) -> None:
        """Validates."""
        spend(VALIDATE)

    def on_save_checkpoint(self, *_: Any) -> None:
        """Saves."""
        spend(SAVE)


class Look(L.Callback):
    """Another callback that evaluates between two packs, and says so."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Evaluates."""
        next(item for item in trainer.callbacks if isinstance(item, Throughput)).pause()  # type: ignore[attr-defined]
        spend(VALIDATE)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds as `spend` says, and a second for every pack that is fetched."""
    monkeypatch.setattr(throughput, "perf_counter", lambda: now)
    original = PackLoader.__iter__

    def slow(loader: PackLoader) -> Any:
        for pack in original(loader):
            spend(FETCH)
            yield pack

    monkeypatch.setattr(PackLoader, "__iter__", slow)


def rows(folder: Path) -> list[dict[str, float]]:
    """Logged speeds, a row for each interval."""
    with (folder / "metrics.csv").open() as handle:
        found = [row for row in csv.DictReader(handle) if row.get("speed/tokens_per_s")]
    return [{name: float(value) for name, value in row.items() if value} for row in found]


def beside(*classes: str, **arguments: Any) -> str:
    """Throughput, and then callbacks of this file."""
    first = {"class_path": "callbacks.Throughput", "init_args": arguments}
    return json.dumps([first, *({"class_path": f"tests.test_throughput.{name}"} for name in classes)])


def test_every_pack_of_an_interval_counts_with_its_time_and_nothing_else_does(
    tiny_run: Arguments, tmp_path: Path, clock: None
) -> None:
    """Two packs a step, three steps a log, validation after 5 packs and a checkpoint after 4 steps, all in between."""
    flags = {
        "trainer.callbacks": beside("Spend", peak_tflops=1e-6), "trainer.log_every_n_steps": 3,
        "trainer.accumulate_grad_batches": 2, "trainer.limit_val_batches": 1, "trainer.val_check_interval": 5,
        "checkpoint.every_n_train_steps": 4,
    }  # fmt: skip
    found = cli.build(["fit", *tiny_run(tmp_path, steps=6, **flags)])
    logged = rows(tmp_path / "tiny")
    assert len(logged) == 2
    packer, sizes = found.datamodule.stages[0], ModelSizes.of(found.model.net)
    # the first pack of a run, and the first after each pause, is fetched while the clock stands still
    for number, fetched in enumerate((4, 4)):
        packs = [packer.pack(index) for index in range(6 * number, 6 * number + 6)]
        seconds = 6 * TRAIN + fetched * FETCH
        row = logged[number]
        assert row["speed/packs_per_s"] == pytest.approx(6 / seconds)
        assert row["speed/tokens_per_s"] == pytest.approx(sum(pack.tokens for pack in packs) / seconds)
        assert row["speed/queries_per_s"] == pytest.approx(sum(pack.queries for pack in packs) / seconds)
        assert row["speed/data_wait"] == pytest.approx(fetched * FETCH / seconds)
        done = sum(training_operations(sizes, PackSizes.of(pack, 8, 2), True) for pack in packs)
        assert row["speed/mfu"] == pytest.approx(done / seconds / 1e6), "1e-6 TFLOP/s are a million a second"


def test_an_evaluation_that_pauses_costs_no_speed(tiny_run: Arguments, tmp_path: Path, clock: None) -> None:
    flags = {"trainer.callbacks": beside("Spend", "Look"), "trainer.log_every_n_steps": 2}
    cli.build(["fit", *tiny_run(tmp_path, steps=4, **flags)])
    logged = rows(tmp_path / "tiny")
    assert [row["speed/packs_per_s"] for row in logged] == [pytest.approx(1 / TRAIN)] * 2
    assert "speed/mfu" not in logged[0], "nobody knows the peak of a CPU"


def test_a_frozen_backbone_and_a_phases_top_k_are_counted_as_they_are(
    tiny_run: Arguments, tmp_path: Path, clock: None
) -> None:
    phases = [
        {"name": "routers", "steps": 2, "trainable": "routers", "top_k": 5},
        {"name": "all", "steps": 2, "backbone_lr": 1e-3},
    ]
    flags = {"trainer.callbacks": beside("Spend", peak_tflops=1e-6), "model.phases": json.dumps(phases)}
    found = cli.build(["fit", *tiny_run(tmp_path, **flags)])
    packer, sizes = found.datamodule.stages[0], ModelSizes.of(found.model.net)
    logged = rows(tmp_path / "tiny")
    assert len(logged) == 4
    for index, row in enumerate(logged):
        pack = PackSizes.of(packer.pack(index), 8, 5 if index < 2 else 2)
        seconds = TRAIN + (FETCH if index else 0)
        assert row["speed/mfu"] == pytest.approx(training_operations(sizes, pack, index >= 2) / seconds / 1e6)


def test_a_resumed_run_counts_its_own_packs_alone(tiny_run: Arguments, tmp_path: Path, clock: None) -> None:
    flags = {"trainer.callbacks": beside("Spend"), "trainer.log_every_n_steps": 2, "checkpoint.every_n_train_steps": 3}
    cli.build(["fit", *tiny_run(tmp_path, steps=7, **flags, **{"trainer.max_steps": 3})])
    spend(SAVE)
    cli.build(["fit", *tiny_run(tmp_path, steps=7, **flags), "--ckpt_path=last"])
    logged = rows(tmp_path / "tiny")
    assert [row["step"] for row in logged] == [1, 3, 5]
    assert [row["speed/packs_per_s"] for row in logged] == [
        pytest.approx(2 / (2 * TRAIN + FETCH)),
        pytest.approx(1 / TRAIN),  # step 4 alone, since the run was resumed at 3
        pytest.approx(2 / (2 * TRAIN + 2 * FETCH)),
    ]


def test_the_profiler_goes_on_and_is_given_back(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.callbacks": beside(), "trainer.profiler": "simple"}
    found = cli.build(["fit", *tiny_run(tmp_path, steps=3, **flags)])
    profiler = found.trainer.profiler
    assert type(profiler).__name__ == "SimpleProfiler"
    fetched = [len(times) for action, times in profiler.recorded_durations.items() if action.endswith(throughput.FETCH)]
    assert fetched == [3]


def test_two_ranks_log_the_speed_of_both(tiny_run: Arguments, tmp_path: Path) -> None:
    flags = {"trainer.devices": 2, "trainer.strategy": "ddp", "trainer.callbacks": beside(peak_tflops=1.0)}
    done = start(tiny_run(tmp_path, steps=3, **flags))
    assert done.returncode == 0, done.stderr[-2000:]
    logged = rows(tmp_path / "tiny")
    assert len(logged) == 3
    for row in logged:
        assert row["speed/packs_per_s"] > 0 and 0 <= row["speed/data_wait"] < 1 and 0 < row["speed/mfu"] < 1
        assert row["speed/queries_per_s"] / row["speed/packs_per_s"] == pytest.approx(3)


def test_a_pause_twice_is_a_pause_once(clock: None) -> None:
    watch = throughput.Clock()
    watch.wait()  # standing still, nothing counts
    spend(7)
    watch.waited_for()
    watch.start()
    spend(2)
    watch.wait()
    spend(3)
    watch.waited_for()
    watch.start()
    watch.pause()
    spend(50)
    watch.pause()
    watch.start()
    spend(5)
    assert watch.read() == (10, 3)
    spend(1)
    assert watch.read() == (1, 0)


def test_peaks_are_of_the_very_card() -> None:
    for card, peak in (
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H800", 989), ("NVIDIA H800 PCIe", 756), ("NVIDIA H20", 148), ("NVIDIA B200", 2250),
        ("NVIDIA A10", None), ("NVIDIA GH200 480GB", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("", None),
    ):  # fmt: skip
        assert throughput.known_peak(card) == peak, card


@pytest.mark.parametrize("peak", [0.0, -3.0, float("inf")])
def test_a_peak_that_is_none_is_refused(peak: float) -> None:
    with pytest.raises(UserError, match="give the device's peak in TFLOP/s"):
        Throughput(peak_tflops=peak)


def test_other_data_is_refused_with_the_mend() -> None:
    with pytest.raises(UserError, match=r"needs data of class datamodules.PackedMemory: use that, or leave"):
        Throughput().examine(object.__new__(PackSource))


def test_the_doctor_says_what_mfu_is_against(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (({}, "A100, A800, B200"), ({"peak_tflops": 71.5}, "MFU against 71.5 TFLOP/s")):
        cli.build(["doctor", *tiny_run(tmp_path, **{"trainer.callbacks": beside(**arguments)})])
        assert said in " ".join(capsys.readouterr().out.split())
