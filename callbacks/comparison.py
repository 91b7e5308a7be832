"""Comparing runs: of each the latest evaluation that asked its model, in one table per task and one figure.

Lengths are compared as tokens, whatever each run was trained on. A baseline that several runs have stands there once
for each, since its backbone may be another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich import get_console
from rich.markup import escape
from rich.table import Table

from callbacks.figures import COLOURS, draw_legend, draw_lines, panels
from msa_train.errors import UserError
from msa_train.evaluation.report import Evaluation, Report, label, table


def compare_runs(folders: Sequence[Path], out: Path) -> None:
    """Prints the tables, and writes OUT.md and OUT.png.

    Args:
        folders: Runs' folders, each with a report.json.
        out: Where to write, without an ending.

    Raises:
        UserError: A run has no report, or is named twice; or nothing can be written there.
    """
    tables, figure = (out.with_name(f"{out.name}.{ending}") for ending in ("md", "png")) if out.name else (out, out)
    if not out.name or tables.is_dir() or figure.is_dir():
        raise UserError(f"--out '{out}': give a file's name without an ending; OUT.md and OUT.png are written")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError("a run is named twice: name each once")
    latest: dict[str, Evaluation] = {}
    for name, folder in zip(names, folders, strict=True):
        report = Report.open(folder)
        if not report.evaluations:
            raise UserError(f"{folder}: its report holds no evaluation yet")
        latest[name] = report.latest
    metrics = {task: metric for one in latest.values() for task, metric in one.metrics.items()}
    parts = [f"# {', '.join(names)}\n"]
    for task, metric in metrics.items():
        head, rows = _rows(latest, task, metric)
        _show(latest, task, metric)
        parts += [f"## {task}\n", table(head, rows), ""]
    try:
        tables.parent.mkdir(parents=True, exist_ok=True)
        tables.write_text("\n".join(parts))
        _draw(latest, metrics).savefig(figure, dpi=120)
    except OSError as error:
        raise UserError(f"--out '{out}': cannot be written ({error.strerror}): give another place") from error
    for what, place in (("tables", tables), ("figure", figure)):
        get_console().print(f"{what:<12}{place}", soft_wrap=True, highlight=False, markup=False)


def _rows(latest: dict[str, Evaluation], task: str, metric: str) -> tuple[list[str], list[list[str]]]:
    lengths = sorted({row.length for one in latest.values() for row in one.rows if row.task == task and row.scores})
    rows = []
    for name, one in latest.items():
        for method in one.methods(task):
            cells = {cell.length: cell.scores[metric] for cell in one.cells(task, method) if metric in cell.scores}
            if cells:
                told = [cells[n].told() if n in cells else "–" for n in lengths]
                rows.append([name, f"{one.step:,}", method, *told, one.told_lost(task, method)])
    return ["run", "steps", metric, *map(label, lengths), "lost"], rows


def _show(latest: dict[str, Evaluation], task: str, metric: str) -> None:
    """A column per run and method, as many side by side as the terminal has room for."""
    columns = {
        escape(f"{name}\n{method}"): {cell.length: cell.scores[metric] for cell in one.cells(task, method)}
        for name, one in latest.items()
        for method in one.methods(task)
        if one.cells(task, method)
    }
    room = max((get_console().width - 20) // 20, 1)
    for some in (list(columns.items())[first : first + room] for first in range(0, len(columns), room)):
        shown = Table(title=f"{task}: {metric} [95% interval]")
        for head in ("tokens", "n", *(head for head, _ in some)):
            shown.add_column(head, justify="right")
        for length in sorted({length for _, cells in some for length in cells}):
            counts = sorted({cells[length].n for _, cells in some if length in cells})
            told = [
                f"{(mean := cells[length]).value:.3f} [{mean.low:.2f}, {mean.high:.2f}]" if length in cells else "–"
                for _, cells in some
            ]
            shown.add_row(label(length), "–".join(map(str, dict.fromkeys((counts[0], counts[-1])))), *map(escape, told))
        get_console().print(shown)


def _draw(latest: dict[str, Evaluation], metrics: dict[str, str]) -> Figure:
    figure, drawn = panels(len(metrics), 5.6, 4.0)
    for axes, (task, metric) in zip(drawn, metrics.items(), strict=False):
        for place, (name, one) in enumerate(latest.items()):
            for method in one.methods(task):
                model = method == one.rows[0].method
                text = name if model else f"{name}: {method}"
                colour, style = COLOURS[place % len(COLOURS)], "-" if model else ":"
                draw_lines(axes, one.cells(task, method), metric, colour, text, style)
        axes.set(title=task, ylabel=metric)
    draw_legend(figure)
    return figure
