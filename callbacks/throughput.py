"""Throughput: what a run makes of its hardware, over the time that really passed, data waits and all.

Between two logging steps it counts the packs that were trained on and divides by the time that passed. The clock stands
still from the start of an evaluation or a checkpoint (`pause`) until the next pack is there. The invariant: a pack that
is counted and the time that it took are in the same interval.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning as L
import torch

from callbacks.parts import packed_memory, parts
from msa_train.errors import UserError
from msa_train.estimate.sizes import CARDS
from msa_train.findings import Finding
from msa_train.module import MemorySparseModule
from msa_train.operations import ModelSizes, PackSizes, training_operations
from msa_train.pack import MemoryPack
from msa_train.phases import Phase

# how a driver calls a card, and how the estimate does; the first line whose words are all in the driver's
PEAKS = (
    ("H100 PCIe", "H100-PCIe"),
    ("H800 PCIe", "H100-PCIe"),
    ("H100 NVL", "H100-NVL"),
    ("H200 NVL", "H100-NVL"),
    ("H100", "H100"),
    ("H200", "H200"),
    ("H800", "H800"),
    ("A100", "A100-80GB"),
    ("A800", "A800"),
    ("H20", "H20"),
    ("B200", "B200"),
)
FETCH = "train_dataloader_next"  # how Lightning's profilers call the wait for a batch


class Throughput(L.Callback):
    """Logs tokens, queries and packs per second over all ranks, MFU, the share of data waits, and the peak of memory.

    Tags: `speed/tokens_per_s`, `speed/queries_per_s`, `speed/packs_per_s`, `speed/mfu`, `speed/data_wait`,
    `memory/peak_gib`. Evaluations and checkpoints are left out of the time. Ranks read equally long packs, so the first
    rank's count times the number of ranks serves; of a pack that ranks share, each counts an equal part of the whole.

    MFU is the share of the card's peak that useful matrix operations take (msa_train/operations.py); what is recomputed
    to save memory is not useful. It is the first rank's. The peaks of A100, A800, B200, H20, H100, H200 and H800 are
    known, from the vendor's data sheets: dense bf16, of a whole card. On other devices there is no MFU unless
    `peak_tflops` is given.

    Args:
        peak_tflops: Peak of one device in TFLOP/s, dense and in the precision that is trained in.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not 0 < peak_tflops < float("inf"):
            raise UserError(f"Throughput: peak_tflops is {peak_tflops}: give the device's peak in TFLOP/s, above 0")
        self.peak_tflops = peak_tflops
        self.clock = Clock()
        self.counted = _Counted()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses data whose packs may differ in length from rank to rank."""
        parts(trainer, pl_module, self)

    def examine(self, data: Any) -> list[Finding]:
        """What the doctor says of it.

        Raises:
            UserError: The data is of another class than datamodules.PackedMemory.
        """
        packed_memory(data, self)
        if self.peak_tflops is not None:
            return [Finding("run", "throughput", f"MFU against {self.peak_tflops:g} TFLOP/s")]
        cards = ", ".join(sorted({name.partition(" ")[0] for name, _ in PEAKS}))
        return [Finding("run", "throughput", f"MFU on {cards}; elsewhere with callbacks.Throughput's peak_tflops")]

    def pause(self) -> None:
        """Stops the clock until the next pack: for whatever else is done between two packs, such as an evaluation."""
        if self.clock.running and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was launched belongs to the packs that are counted, not to the pause
        self.clock.pause()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks up the model's sizes and the device's peak."""
        assert isinstance(pl_module, MemorySparseModule)
        self.sizes = ModelSizes.of(pl_module.net)
        self.peak = self.peak_tflops
        if self.peak is None and pl_module.device.type == "cuda":
            self.peak = known_peak(torch.cuda.get_device_name(pl_module.device))
        self.profiler = trainer.profiler  # type: ignore[attr-defined]
        trainer.profiler = _FetchWatch(self.profiler, self.clock)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives Lightning its profiler back."""
        trainer.profiler = self.profiler  # type: ignore[attr-defined]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: MemoryPack, batch_idx: int
    ) -> None:
        """Starts the clock after a pause."""
        assert isinstance(pl_module, MemorySparseModule)
        self.phase: Phase = pl_module.timeline.at(trainer.global_step)[1]
        self.clock.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: MemoryPack, batch_idx: int
    ) -> None:
        """Counts, and logs at the interval."""
        assert isinstance(pl_module, MemorySparseModule)
        pack = PackSizes.of(batch, pl_module.msa.chunk_size, self.phase.top_k or pl_module.msa.top_k)
        shared, whole = (1, batch) if batch.shares is None else (batch.shares.ranks, batch.shares)
        self.counted.packs += 1 / shared
        self.counted.tokens += whole.tokens / shared
        self.counted.queries += whole.queries / shared
        self.counted.operations += training_operations(self.sizes, pack, self.phase.trainable == "all")
        if not pl_module.logs_after(batch_idx):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()  # at the logging interval only, where the values are read anyway
            pl_module.log("memory/peak_gib", torch.cuda.max_memory_allocated() / 2**30, batch_size=1)
        elapsed, waited = self.clock.read()
        world = trainer.world_size
        values = {
            "tokens_per_s": self.counted.tokens * world / elapsed,
            "queries_per_s": self.counted.queries * world / elapsed,
            "packs_per_s": self.counted.packs * world / elapsed,
            "data_wait": waited / elapsed,
        }
        if self.peak is not None:
            values["mfu"] = self.counted.operations / (elapsed * self.peak * 1e12)
        for name, value in values.items():
            pl_module.log(f"speed/{name}", value, batch_size=1, prog_bar=name == "tokens_per_s")
        self.counted = _Counted()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.pause()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Stops the clock."""
        self.pause()


def known_peak(card: str) -> float | None:
    """Peak of a card in TFLOP/s, dense bf16; None where it is not known. A slice of a card (MIG) is not the card.

    >>> known_peak("NVIDIA H100 80GB HBM3"), known_peak("NVIDIA H100 PCIe"), known_peak("NVIDIA A100-SXM4-80GB")
    (989, 756, 312)
    >>> known_peak("NVIDIA A10"), known_peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    (None, None)
    """
    words = set(re.split(r"[\s-]", card))
    if "MIG" in words:
        return None
    return next((CARDS[card].tflops for name, card in PEAKS if words.issuperset(name.split())), None)


@dataclass
class _Counted:
    """What was trained on since the last log, by this rank."""

    packs: float = 0.0
    tokens: float = 0.0
    queries: float = 0.0
    operations: float = 0.0


class Clock:
    """Time that passed while it ran, and the part of it that a wait took."""

    def __init__(self) -> None:
        self.elapsed = self.waited = 0.0
        self._since: float | None = None
        self._waiting: float | None = None

    @property
    def running(self) -> bool:
        """Whether time counts now."""
        return self._since is not None

    def start(self) -> None:
        """Goes on, if it stood still."""
        if self._since is None:
            self._since = perf_counter()

    def pause(self) -> None:
        """Stands still."""
        if self._since is not None:
            self.elapsed += perf_counter() - self._since
            self._since = self._waiting = None

    def wait(self) -> None:
        """A wait begins; it counts if the clock runs."""
        if self._since is not None:
            self._waiting = perf_counter()

    def waited_for(self) -> None:
        """The wait is over."""
        if self._waiting is not None:
            self.waited += perf_counter() - self._waiting
            self._waiting = None

    def read(self) -> tuple[float, float]:
        """Seconds that passed and that were waited since the last reading."""
        if self._since is not None:
            now = perf_counter()
            self.elapsed += now - self._since
            self._since = now
        read = max(self.elapsed, 1e-9), self.waited
        self.elapsed = self.waited = 0.0
        return read


class _FetchWatch:
    """The run's own profiler, and a clock that is told when the loop waits for a pack: Lightning has no hook for it."""

    def __init__(self, profiler: Any, clock: Clock) -> None:
        self._profiler, self._clock = profiler, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profiler, name)

    def start(self, action: str) -> None:
        self._profiler.start(action)
        if action.endswith(FETCH):
            self._clock.wait()

    def stop(self, action: str) -> None:
        if action.endswith(FETCH):
            self._clock.waited_for()
        self._profiler.stop(action)
