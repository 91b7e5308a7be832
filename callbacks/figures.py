"""Figures of evaluations: scores over the memory's length, and over where in it the answer stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from msa_train.evaluation.evaluate import DEPTHS, Row
from msa_train.evaluation.report import Evaluation, Report, label

COLOURS = ("#08519c", "#fd8d3c", "#31a354", "#9e9ac8", "#d62728", "#8c6d31")


def draw_curves(report: Report, evaluation: Evaluation) -> Figure:
    """Every method's headline score over the memory's length, a panel per task; the band is the 95% interval. Where
    answers are written, the dashed line says how many of the documents that hold them were found. A method has one
    colour in all panels."""
    figure, drawn = panels(len(evaluation.metrics), 5.6, 4.0)
    methods = dict.fromkeys(row.method for row in evaluation.rows)
    colours = dict(zip(methods, cycle(COLOURS), strict=False))
    for axes, (task, metric) in zip(drawn, evaluation.metrics.items(), strict=False):
        for method in evaluation.methods(task):
            cells, colour = evaluation.cells(task, method), colours[method]
            draw_lines(axes, cells, metric, colour, method, "-")
            if cells and all("gold_recall" in cell.scores for cell in cells):
                found = [cell.scores["gold_recall"].value for cell in cells]
                axes.plot([cell.length for cell in cells], found, "--", color=colour, alpha=0.6, lw=1,
                          label=f"{method}: documents found")  # fmt: skip
        lengths = sorted({row.length for row in evaluation.rows if row.task == task})
        axes.axvline(report.trained, color="grey", linestyle=":", lw=1, label="trained length")
        axes.set_xticks(lengths, [_below(n, report) for n in lengths], fontsize=8)
        axes.set(title=task, ylabel=metric)
    draw_legend(figure)
    return figure


def draw_lines(axes: Any, cells: Sequence[Row], metric: str, colour: str, name: str, style: str) -> None:
    """One method's score over the memory's length, with its interval; nothing where there is no cell.

    Args:
        axes: Where.
        cells: Measured cells, the shortest memory first.
        metric: The score.
        colour: Of line and band.
        name: In the legend.
        style: Of the line.
    """
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: label(int(tokens)) if tokens >= 1 else "")
    axes.minorticks_off()
    axes.set(ylim=(-0.02, 1.03), xlabel="tokens of memory")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if cells:
        means, tokens = [cell.scores[metric] for cell in cells], [cell.length for cell in cells]
        axes.plot(tokens, [mean.value for mean in means], f"o{style}", color=colour, label=name, markersize=4)
        axes.fill_between(tokens, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.13, lw=0)


def draw_legend(figure: Figure) -> None:
    """One legend below all panels: in a panel it would hide what many lines show."""
    named = {name: line for axes in figure.axes for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = max(int(figure.get_figwidth() // 2.8), 1)  # inches that the longest name takes
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, fontsize=8)


def draw_depths(report: Report, evaluation: Evaluation) -> Figure:
    """The model's headline score by the memory's length and the place of the answer, a panel per task that was
    measured; a mean over tasks has no places."""
    model = evaluation.rows[0].method
    cells_of = {task: evaluation.cells(task, model) for task in evaluation.metrics}
    shown_of = {task: cells for task, cells in cells_of.items() if any(cell.depths for cell in cells)}
    figure, drawn = panels(max(len(shown_of), 1), 5.6, 3.6)
    for axes, (task, cells) in zip(drawn, shown_of.items(), strict=False):
        axes.set(title=f"{task}: {evaluation.metrics[task]}", xlabel="tokens of memory", ylabel="place of the answer")
        value = np.array([[mean if n else np.nan for mean, n in cell.depths] for cell in cells]).T
        image = axes.imshow(value, aspect="auto", vmin=0, vmax=1, cmap="viridis", origin="upper")
        for (band, place), shown in np.ndenumerate(value):
            if not np.isnan(shown):
                colour = "black" if shown > 0.6 else "white"
                axes.text(place, band, f"{shown:.2f}", ha="center", va="center", fontsize=6, color=colour)
        axes.set_xticks(range(len(cells)), [_below(cell.length, report) for cell in cells], fontsize=8)
        axes.set_yticks(range(0, DEPTHS, 3), [f"{band * 100 // DEPTHS}%" for band in range(0, DEPTHS, 3)], fontsize=8)
        figure.colorbar(image, ax=axes)
    return figure


def panels(number: int, width: float, height: float) -> tuple[Figure, Sequence[Any]]:
    """A figure of so many panels, three in a row or as a square.

    Args:
        number: Panels.
        width: Of a panel, in inches.
        height: Of a panel, in inches.
    """
    columns = number if number <= 3 else math.ceil(math.sqrt(number))
    rows = -(-number // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    drawn = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in drawn[number:]:
        axes.set_visible(False)
    return figure, drawn


def _below(length: int, report: Report) -> str:
    return label(length, report.trained).replace(" ", "\n")
