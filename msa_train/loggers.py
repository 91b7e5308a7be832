"""metrics.csv that survives a resume: Lightning's own deletes the rows of the run that it goes on with."""

from __future__ import annotations

import csv
import warnings
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

SHARED = {"step", "epoch"}  # what every row has


class ContinuedCSVLogger(CSVLogger):
    """A CSVLogger whose file goes on from the resumed step: earlier rows stay, what is logged again and all behind it
    is replaced. A validation that is made anew has the step of a training row, which stays.

    Args:
        run_folder: Folder of metrics.csv.
    """

    def __init__(self, run_folder: str) -> None:
        super().__init__(save_dir=run_folder, name="", version="", flush_logs_every_n_steps=1)
        self._earlier: list[dict[str, Any]] = []

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, which deletes the file when it is made: so the rows are taken before."""
        if self._experiment is None:
            self._earlier = self._read()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory")
                self._experiment = super().experiment
            self._experiment.metrics = list(self._earlier)
            self._experiment.save()
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Writes a row; the first one takes the place of the rows that an interrupted run wrote beyond it."""
        writer = self.experiment
        names = metrics.keys() - SHARED

        def beyond(row: dict[str, Any]) -> bool:
            return step is not None and (row["step"] > step or (row["step"] == step and not names.isdisjoint(row)))

        kept = list(takewhile(lambda row: not beyond(row), self._earlier))
        if len(kept) < len(self._earlier):
            Path(writer.metrics_file_path).unlink()
            writer.metrics = kept
        self._earlier = []
        super().log_metrics(metrics, step)

    def _read(self) -> list[dict[str, Any]]:
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if (row.get("step") or "").isdigit()]
        return [{**{k: v for k, v in row.items() if v}, "step": int(row["step"])} for row in rows]
