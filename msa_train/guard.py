"""What looks after a run that nobody watches: pre-emption, steps that are no numbers, ranks that hang.

The invariant: ranks decide together. A signal that reaches one of them is agreed on at the end of a step, or before a
pack of a validation, by a word from host to host that no device waits for; all then save that very step and leave.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch

from msa_train.errors import UserError
from msa_train.folders import folder_of, is_whole, remove
from msa_train.hang import STACKS, HangWatch
from msa_train.module import MemorySparseModule, packs_per_step
from msa_train.saving import Checkpoints, spared

REQUEUE = 75  # the exit code that says: start me again (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends them before it takes the machine away
SKIPPED = "skipped.jsonl"


class Guard(L.Callback):
    """Looks after a run.

    On SIGTERM or SIGUSR1 the step is finished and saved, and the exit code is 75. A validation is broken off, and comes
    first when the run goes on. An evaluation that is told to stop writes down what it has; in a test the exit code is
    the same, behind the last step the run ends as it would have.

    Args:
        hang_minutes: A step that takes longer ends the job, with the stacks of all ranks in the run's folder.
        max_skipped: Steps without a finite gradient, after which the run gives up. They change no weight, and are kept
            in skipped.jsonl with the packs they had.
    """

    def __init__(self, hang_minutes: float = 30.0, max_skipped: int = 100) -> None:
        if hang_minutes <= 0 or max_skipped < 0:
            raise UserError(
                f"guard: hang_minutes {hang_minutes:g} must be above 0, max_skipped {max_skipped} at least 0"
            )
        self.hang_minutes, self.max_skipped = hang_minutes, max_skipped
        self._signal: int | None = None
        self._leaving = False
        self._group: Any = None
        self._watch: HangWatch | None = None
        self._before: dict[signal.Signals, Any] = {}

    # --- starting and ending ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens and watches, in the place of Lightning, which leaves without saving; and forgets the skipped steps
        that are taken again."""
        self._listen(trainer)
        run = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            remove(run / STACKS)
            if (run / SKIPPED).is_file():
                kept = [json.dumps(row) + "\n" for row in _rows(run / SKIPPED) if row["step"] < trainer.global_step]
                with spared(run / SKIPPED):
                    (run / SKIPPED).write_text("".join(kept), encoding="utf-8")
        trainer.strategy.barrier()
        self._watch = HangWatch(run / STACKS, trainer.global_rank, trainer.world_size, 60 * self.hang_minutes)
        self._watch.start()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listens, as evaluations ask whether they were told to stop."""
        self._listen(trainer)

    def on_test_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leaves where it was agreed on."""
        if self._agreed():
            self.leave(trainer, "told to stop: the test is broken off")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watches no more."""
        if self._watch is not None:
            self._watch.end()
            self._watch = None
        for one, handler in self._before.items():
            if signal.getsignal(one) == self._heard:  # else Lightning has put back already what was there before it
                signal.signal(one, handler)
        self._before = {}

    def _listen(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._heard) for one in SIGNALS}

    @property
    def told(self) -> bool:
        """Whether a signal told this rank to stop."""
        return self._signal is not None

    def leave(self, trainer: L.Trainer, what: str) -> NoReturn:
        """Ends the process with the code that asks for another start.

        Args:
            trainer: Of the run.
            what: What became of the run, and how to go on.
        """
        environment = getattr(trainer.strategy, "cluster_environment", None)
        launched = environment is not None and not environment.creates_processes_externally
        if trainer.is_global_zero:
            print(f"msa-train: {what}", file=sys.stderr, flush=True)
        # Lightning takes another code of a process that it launched for a crash, and kills this one
        raise SystemExit(0 if launched and not trainer.is_global_zero else REQUEUE)

    # --- at every step ------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leaves where it was agreed on, now that the step before is logged."""
        self._leave(trainer, validate_first=False)
        assert self._watch is not None
        self._watch.working()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agrees on leaving, and looks at the steps since the last log."""
        assert self._watch is not None and isinstance(pl_module, MemorySparseModule)
        self._watch.idle()
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._leaving = self._leaves(trainer)
        if pl_module.logs_after(batch_idx) or self._leaving:
            self._record(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves before a validation."""
        self._leave(trainer, validate_first=True)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Leaves a validation, which may take longer than there is time; who goes on from its step begins with it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._leaving = self._leaves(trainer)
            self._leave(trainer, validate_first=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks at the last steps, and has them saved before others evaluate, which may take long or fail."""
        assert isinstance(pl_module, MemorySparseModule)
        self._record(trainer, pl_module)
        self._save(trainer)

    def _heard(self, signum: int, frame: Any) -> None:
        self._signal = signum

    def _agreed(self) -> bool:
        if self._group is None:
            return self.told
        heard = torch.tensor([float(self.told)])
        torch.distributed.all_reduce(heard, group=self._group)
        return bool(heard.item())

    def _leaves(self, trainer: L.Trainer) -> bool:
        # nothing goes on from the last step: told then, a run ends as it would have
        return self._agreed() and trainer.global_step != trainer.max_steps

    def _leave(self, trainer: L.Trainer, validate_first: bool) -> None:
        if not self._leaving:
            return
        self._save(trainer, validate_first)
        saved = is_whole(folder_of(Path(trainer.default_root_dir), trainer.global_step))
        told = f"told to stop: step {trainer.global_step} {'is' if saved else 'could not be'} saved"
        self.leave(trainer, f"{told}; exit code {REQUEUE} asks for another start with --ckpt_path last")

    def _save(self, trainer: L.Trainer, validate_first: bool = False) -> None:
        for keeper in trainer.checkpoint_callbacks:
            if isinstance(keeper, Checkpoints):
                keeper.save(trainer, validate_first)

    def _record(self, trainer: L.Trainer, module: MemorySparseModule) -> None:
        skipped = module.take_skipped()
        if not skipped:
            return
        count = packs_per_step(trainer, getattr(trainer, "datamodule", None))
        file = Path(trainer.default_root_dir) / SKIPPED
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            with spared(file), file.open("a", encoding="utf-8") as out:
                for step in skipped:
                    packs = list(range(step * count, (step + 1) * count))
                    out.write(json.dumps({"step": step, "packs": packs}) + "\n")
        if module.skipped_steps > self.max_skipped:
            raise UserError(
                f"guard.max_skipped: {module.skipped_steps} steps had no finite gradient, the last one step "
                f"{skipped[-1]}; their packs are in {file}. Lower the learning rates or trainer.gradient_clip_val, or "
                "look at the packs"
            )


def _rows(file: Path) -> list[dict[str, Any]]:
    """The skipped steps that a file holds; a line that a kill or a full disk has torn is none."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
