"""BeforeAfterReport: what a run has learnt, in one table and one figure.

Routing recall and language-model loss on held-out packs before and after training, beside a guess and BM25 on the
same packs.
"""

from __future__ import annotations

import json
import math
import time
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich import get_console
from rich.table import Table

from callbacks.evaluation import Evaluation, bm25_recall, evaluate_packs
from callbacks.parts import parts
from datamodules.planning import Plan
from msa_train.errors import UserError
from msa_train.findings import Finding
from msa_train.pack import MemoryPack
from msa_train.source import PackSource

NUMBERS, FIGURE = "before_after.json", "before_after.png"


class BeforeAfterReport(L.Callback):
    """Evaluates when training starts and ends; writes before_after.json and before_after.png and prints the table."""

    def __init__(self) -> None:
        self.before: dict[str, dict[str, Any]] = {}
        self.started = time.perf_counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a run that has nothing to report on."""
        self.examine(parts(trainer, pl_module, self)[0])

    def examine(self, data: PackSource) -> list[Finding]:
        """What the doctor says of it.

        Raises:
            UserError: There is nothing to report on.
        """
        if not data.val_splits:
            raise UserError("BeforeAfterReport needs a split in data.val_splits")
        return [Finding("run", "report", f"on {', '.join(data.val_splits)}")]

    def state_dict(self) -> dict[str, Any]:
        """What was measured before training outlives a resume."""
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        self.before = state["before"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the router that the run starts with, unless it goes on from a checkpoint that has that."""
        if not self.before:
            self.before = {split: vars(found) for split, (found, _) in self._evaluate(trainer, pl_module).items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures again, and reports."""
        data, module = parts(trainer, pl_module, self)
        after = self._evaluate(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        assert data.data is not None
        k = module.msa.top_k
        bm25 = {split: bm25_recall(packs, data.data, k) for split, (_, packs) in after.items()}
        report = self._report({split: found for split, (found, _) in after.items()}, bm25)
        print_report(report)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._write(trainer, report)

    def _write(self, trainer: L.Trainer, report: dict[str, Any]) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NUMBERS).write_text(json.dumps(report, indent=1) + "\n")
        figure = draw(report)
        figure.savefig(folder / FIGURE, dpi=120)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("routing/before_after", figure, trainer.global_step)
        say = partial(get_console().print, soft_wrap=True, highlight=False)
        for what, place in (("figure", FIGURE), ("numbers", NUMBERS)):
            say(f"{what:<12}{folder / place}")
        say(f"{'TensorBoard':<12}tensorboard --logdir {folder}")

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, tuple[Evaluation, list[tuple[Plan, MemoryPack]]]]:
        data, module = parts(trainer, pl_module, self)
        result = {}
        for split in data.val_splits:
            packs = data.evaluation_packs(split)  # all of them on every rank: few, and the numbers are whole
            with trainer.precision_plugin.forward_context():
                result[split] = evaluate_packs(module.net, (pack for _, pack in packs), module.msa.top_k), packs
        return result

    def _report(self, after: dict[str, Evaluation], bm25: dict[str, dict[str, float]]) -> dict[str, Any]:
        return {
            "seconds": round(time.perf_counter() - self.started, 1),
            "splits": {
                split: {
                    "before": self.before.get(split),  # a resumed run may have splits that it did not start with
                    "after": vars(found),
                    "random_recall@1": found.random_recall,
                    "bm25": bm25[split],
                }
                for split, found in after.items()
            },
        }


def print_report(report: dict[str, Any]) -> None:
    """The tables of a report."""
    console = get_console()  # the progress bar's own: what is printed beside it would be overwritten
    table = Table(title="Held-out queries, routed over their whole pack: recall@1")
    for name in ("split", "docs", "n", "random", "BM25", "before", "after", "LM loss"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for split, row in report["splits"].items():
        before, after = row["before"], row["after"]
        table.add_row(
            split,
            f"{after['documents']:.0f}",
            str(after["queries"]),
            f"{row['random_recall@1']:.3f}",
            f"{row['bm25']['recall@1']:.3f}",
            f"{before['routing']['recall@1']:.3f}" if before else "–",
            f"[bold]{after['routing']['recall@1']:.3f}[/bold]",
            f"{before['lm']:.2f} → {after['lm']:.2f}" if before else f"– → {after['lm']:.2f}",
        )
    console.print(table)
    if any(len(row["after"]["steps"]) > 1 for row in report["splits"].values()):
        console.print(_steps_table(report))


def _steps_table(report: dict[str, Any]) -> Table:
    table = Table(title="Evidence chains: recall@1 of each retrieval step, given the steps before")
    for name in ("split", "step", "n", "before", "after"):
        table.add_column(name, justify="left" if name == "split" else "right", no_wrap=True)
    for split, row in report["splits"].items():
        known = [f"{step['recall@1']:.3f}" for step in row["before"]["steps"]] if row["before"] else []
        befores = chain(known, repeat("–"))
        for number, (before, after) in enumerate(zip(befores, row["after"]["steps"], strict=False), start=1):
            told = f"[bold]{after['recall@1']:.3f}[/bold]"
            table.add_row(split, str(number), str(after["queries"]), before, told)
    return table


def draw(report: dict[str, Any]) -> Figure:
    """Recall before and after beside its baselines, as a matplotlib figure; no bar where there is no before."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    befores = [row["before"] for row in report["splits"].values()]
    series = {
        "random": ([row["random_recall@1"] for row in report["splits"].values()], "#c8c8c8"),
        "before training": ([one["routing"]["recall@1"] if one else math.nan for one in befores], "#9ecae1"),
        "BM25": ([row["bm25"]["recall@1"] for row in report["splits"].values()], "#fdae6b"),
        "trained router": ([row["after"]["routing"]["recall@1"] for row in report["splits"].values()], "#08519c"),
    }
    for number, (name, (values, colour)) in enumerate(series.items()):
        places = [place + (number - 1.5) * 0.2 for place in range(len(values))]
        bars = axes.bar(places, values, 0.19, label=name, color=colour)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    documents = next(iter(report["splits"].values()))["after"]["documents"]
    axes.set_xticks(range(len(report["splits"])), report["splits"].keys())
    axes.set(ylim=(0, 1.18), ylabel="recall@1", title=f"Held-out queries, {documents:.0f} documents per pack")
    axes.legend(ncols=2, fontsize=8, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure
