"""metrics.csv that survives a resume: Lightning's own deletes the rows of the run that it goes on with."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only


class ContinuedCSVLogger(CSVLogger):
    """A CSVLogger whose file goes on from the resumed step: earlier rows stay, rows from that step on are replaced.

    Args:
        run_folder: Folder of metrics.csv.
    """

    def __init__(self, run_folder: str) -> None:
        super().__init__(save_dir=run_folder, name="", version="", flush_logs_every_n_steps=1)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Writes a row."""
        if self._experiment is None:
            earlier = self._rows_before(step or 0)
            self.experiment.metrics = earlier
        super().log_metrics(metrics, step)

    def _rows_before(self, step: int) -> list[dict[str, Any]]:
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if row.get("step", "").isdigit()]
        return [{**row, "step": int(row["step"])} for row in rows if int(row["step"]) < step]
