"""When a run saves checkpoints, and which of them it keeps.

The invariants: a checkpoint goes only after a newer one is whole, so a run that is killed, or whose disk is full,
always has one to go on from. And it is saved only when its step is in the log: Lightning logs a step after all have
seen its end, so it is saved where the next thing begins, a step or a validation; else a kill in between would leave a
hole.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from msa_train.errors import UserError
from msa_train.folders import LINK, checkpoints_of, discard, folder_of, is_whole, leftovers, point_to, remove, step_of

Mode = Literal["max", "min"]
SCORES = "scores.json"  # what the monitored value was at each step that was validated


class Checkpoints(Checkpoint):
    """Saves step=N.ckpt folders into the run's folder, and a last one at the end.

    Args:
        dirpath: The run's folder.
        every_n_train_steps: Steps from one checkpoint to the next; 0 saves none at all, for a trial.
        keep_last: How many of the newest to keep. With two, one that a disk has damaged is no loss of the run.
        keep_every: Keep those of every so many steps for good; 0 for none.
        keep_best: How many of the best by `monitor` to keep. Validations then save as well.
        monitor: A logged value, like routing/recall@1/test.
        mode: Whether its largest or its smallest value is the best.

    Raises:
        UserError: The arguments contradict each other.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_train_steps: int = 100,
        keep_last: int = 2,
        keep_every: int = 0,
        keep_best: int = 0,
        monitor: str | None = None,
        mode: Mode = "max",
    ) -> None:
        for name, value, least in (
            ("every_n_train_steps", every_n_train_steps, 0), ("keep_last", keep_last, 1), ("keep_every", keep_every, 0),
            ("keep_best", keep_best, 0),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"checkpoint.{name} is {value}: give at least {least}")
        if (keep_best > 0) != (monitor is not None):
            raise UserError(
                "checkpoint.keep_best and checkpoint.monitor need each other: give both, like "
                "--checkpoint.keep_best 1 --checkpoint.monitor routing/recall@1/test"
            )
        self.folder, self.every = Path(dirpath), every_n_train_steps
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self.monitor, self.mode = monitor, mode
        self._due = False
        self._tried = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What a run goes on from is saved; what a kill left half written or half deleted goes."""
        self._tried = trainer.global_step
        for path in leftovers(self.folder) if trainer.is_global_zero else ():
            remove(path)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Sees that it is time."""
        if self.every and trainer.global_step and trainer.global_step % self.every == 0:
            self._due = True

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Saves what is due."""
        if self._due:
            self.save(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what is due, before a validation that may take long."""
        if self._due and trainer.state.fn == "fit":
            self.save(trainer, validate_first=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves what is among the best."""
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise UserError(
                f"checkpoint.monitor: nothing logs '{self.monitor}'; there are "
                f"{', '.join(sorted(name for name in trainer.callback_metrics if '/' in name))}"
            )
        if trainer.is_global_zero:
            step, before = trainer.global_step, read_scores(self.folder)
            with spared(self.folder / SCORES):
                _write_scores(self.folder, {**{at: before[at] for at in before if at < step}, step: float(value)})
        kept = trainer.strategy.broadcast(trainer.is_global_zero and trainer.global_step in self._best())
        if kept:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last step."""
        self.save(trainer)

    def save(self, trainer: L.Trainer, validate_first: bool = False) -> None:
        """Saves the step that was taken last, unless it is there; all ranks together.

        Args:
            trainer: The run's.
            validate_first: Its validation is to come: who goes on from it begins with that.
        """
        step, self._due = trainer.global_step, False
        if not self.every or trainer.fast_dev_run or step == self._tried:  # type: ignore[attr-defined]
            return
        self._tried = step
        folder = folder_of(self.folder, step)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                logger.experiment.flush()
        trainer.lightning_module.validate_first = validate_first  # type: ignore[assignment]
        trainer.save_checkpoint(folder)
        if trainer.is_global_zero and is_whole(folder):
            with spared(self.folder / LINK):
                point_to(folder)
            # what lies beyond is of a branch that was given up, when the run went back to an earlier checkpoint
            for other in checkpoints_of(self.folder):
                if (step_of(other) or 0) > step:
                    discard(other)
            for old in superfluous(self.folder, self.keep_last, self.keep_every, self._best()):
                discard(old)

    def _best(self) -> set[int]:
        return best_steps(self.folder, self.keep_best, self.mode)


@contextmanager
def spared(file: Path) -> Iterator[None]:
    """Makes a warning of what a disk refuses to the first rank alone: the others wait for it in the next collective."""
    try:
        yield
    except OSError as error:
        warnings.warn(
            f"{file} could not be written ({error.strerror or error}): training goes on. Make room on that disk.",
            stacklevel=3,
        )


def best_steps(run: Path, count: int, mode: Mode) -> set[int]:
    """The steps with the best of a run's scores."""
    scores = {step: value for step, value in read_scores(run).items() if not math.isnan(value)}
    sign = 1 if mode == "max" else -1
    return set(sorted(scores, key=lambda step: sign * scores[step], reverse=True)[:count])


def superfluous(run: Path, keep_last: int, keep_every: int = 0, best: set[int] | None = None) -> list[Path]:
    """A run's checkpoints that need not be kept.

    Args:
        run: The run's folder.
        keep_last: How many of the newest stay; only whole ones count.
        keep_every: Those of every so many steps stay; 0 for none.
        best: Steps that stay.
    """
    whole = [folder for folder in checkpoints_of(run) if is_whole(folder)]

    def stays(folder: Path) -> bool:
        step = step_of(folder) or 0
        return step in (best or ()) or bool(keep_every and step % keep_every == 0)

    return [folder for folder in whole[keep_last:] if not stays(folder)]


def read_scores(run: Path) -> dict[int, float]:
    """The monitored value by step; empty where a run monitors none.

    Raises:
        UserError: The file is damaged.
    """
    file = run / SCORES
    if not file.is_file():
        return {}
    try:
        return {int(step): float(value) for step, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{file}: not what a run writes; delete it, and the best are counted anew") from error


def _write_scores(run: Path, scores: dict[int, float]) -> None:
    aside = run / f"{SCORES}.writing"
    aside.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    aside.replace(run / SCORES)
