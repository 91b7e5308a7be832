"""Report: an evaluation as numbers (report.json) and as tables (report.md).

    report.json  {"format": 1, "trained": tokens, "k": k,
                  "evaluations": [{"step", "seconds", "settings", "rows", "metrics", "cut"}, ...]}

The invariant: every mean is written with its interval and its number of questions, and whatever was left out has its
reason beside it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msa_train.errors import UserError
from msa_train.evaluation.evaluate import Row
from msa_train.evaluation.methods import ROUTER
from msa_train.evaluation.scores import Mean, degradation

FORMAT = 1
FILE, TABLES = "report.json", "report.md"
UNITS = {"": 1, "K": 2**10, "M": 2**20}


@dataclass(frozen=True)
class Evaluation:
    """What was measured at one step.

    Args:
        step: Steps trained.
        seconds: Time that it took.
        settings: How it was done, for the record.
        rows: Its cells.
        metrics: Headline score of every task and of every mean over tasks, in the order of the tables.
        cut: It ended before its time, told to stop or by a failure: what it left out is no choice of anybody's.
    """

    step: int
    seconds: float
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    metrics: Mapping[str, str]
    cut: bool = False

    @property
    def routed(self) -> bool:
        """Whether the model itself was asked, and not baselines alone."""
        return any(row.method == ROUTER for row in self.rows)

    @property
    def name(self) -> str:
        """Its step, and whether baselines were asked alone; it takes the place of an earlier one of its name."""
        return f"{self.step}" if self.routed else f"{self.step}-baselines"

    @property
    def measured(self) -> int:
        """How many cells have scores."""
        return sum(bool(row.scores) for row in self.rows)

    def cells(self, task: str, method: str) -> list[Row]:
        """What a method scored on a task, the shortest memory first; without what was left out."""
        return [row for row in self.rows if row.task == task and row.method == method and row.scores]

    def methods(self, task: str) -> list[str]:
        """Methods that a task was given to."""
        return list(dict.fromkeys(row.method for row in self.rows if row.task == task))

    def lost(self, task: str, method: str) -> float | None:
        """What a method loses from the shortest to the longest memory, in percent; None where that says nothing."""
        cells = self.cells(task, method)
        if len(cells) < 2:
            return None
        return degradation(*(cell.scores[self.metrics[task]].value for cell in (cells[0], cells[-1])))

    def told_lost(self, task: str, method: str) -> str:
        """The same as a table has it; with the length that it was measured to, where others go further."""
        lost, cells = self.lost(task, method), self.cells(task, method)
        if lost is None:
            return "–"
        longest = max(row.length for row in self.rows if row.task == task and row.scores)
        return f"{lost:.1f}%" + (f" to {label(cells[-1].length)}" if cells[-1].length < longest else "")


@dataclass(frozen=True)
class Report:
    """All evaluations of a run.

    Args:
        trained: Tokens of a training pack's documents.
        k: Cutoff of recall@k.
        evaluations: In the order of their steps.
    """

    trained: int
    k: int
    evaluations: Sequence[Evaluation]

    def with_evaluation(self, new: Evaluation) -> Report:
        """This with one more, in the place of an earlier one of its name."""
        kept = [one for one in self.evaluations if one.name != new.name]
        return replace(self, evaluations=sorted([*kept, new], key=lambda one: one.step))

    def until(self, step: int) -> Report:
        """This without the evaluations of later steps."""
        return replace(self, evaluations=[one for one in self.evaluations if one.step <= step])

    @property
    def latest(self) -> Evaluation:
        """The last evaluation that asked the model itself; where none did, the last one."""
        return ([one for one in self.evaluations if one.routed] or self.evaluations)[-1]

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def of(values: Mapping[str, Any]) -> Report:
        """From plain data, as `json` writes it.

        Raises:
            KeyError: Something is missing; TypeError or ValueError where it is something else.
        """
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}")
        return Report(
            int(values["trained"]),
            int(values["k"]),
            [
                Evaluation(**{**one, "rows": [_row(row) for row in one["rows"]], "metrics": dict(one["metrics"])})
                for one in values["evaluations"]
            ],
        )

    def save(self, folder: Path, shown: Evaluation | None = None) -> None:
        """Writes report.json and report.md, each aside and then renamed.

        Args:
            folder: Where.
            shown: The evaluation of the tables; the latest by default.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((FILE, json.dumps(self.json(), indent=1) + "\n"), (TABLES, self.markdown(shown))):
            aside = folder / f"{name}.writing"
            aside.write_text(text, encoding="utf-8")
            aside.replace(folder / name)

    @staticmethod
    def open(folder: Path) -> Report:
        """The report of a run.

        Raises:
            UserError: There is none, or it is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            raise UserError(
                f"{folder}: no {FILE}; add callbacks.ExtrapolationEvaluation to the run, or evaluate it: "
                "msa-train test --config RUN/config.yaml --ckpt_path last"
            )
        try:
            report = Report.of(json.loads(file.read_text(encoding="utf-8")))
            for one in report.evaluations:
                report.markdown(one)  # what cannot be told is damaged as well
        except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
            raise UserError(f"{file}: not a report of this version; evaluate the run again") from error
        return report

    def markdown(self, shown: Evaluation | None = None) -> str:
        """An evaluation as tables, by default the latest; and the course of training where there are several."""
        last = shown or self.latest
        parts = [
            f"# Extrapolation after {last.step:,} steps\n",
            f"Trained on packs of {self.trained:,} document tokens. Every value is a mean over n questions with its "
            f"95% bootstrap interval. {last.seconds:.0f} s.\n",
        ]
        if last.cut:
            parts.append("**Cut short:** it was told to stop, or failed; `msa-train test` makes it anew.\n")
        for task, metric in last.metrics.items():
            parts += self._task(last, task, metric)
        course = [one for one in self.evaluations if one.routed]
        if last.routed and len(course) > 1:
            parts += _course(course, last)
        settings = ", ".join(_line(f"{name} {value}") for name, value in last.settings.items() if name != "tasks")
        return "\n".join([*parts, f"Settings: {settings}; k is {self.k}.", ""])

    def _task(self, last: Evaluation, task: str, metric: str) -> list[str]:
        rows = [row for row in last.rows if row.task == task]
        lengths = sorted({row.length for row in rows})
        by_cell = {(row.method, row.length): row for row in rows}
        parts = [f"## {_line(task)}\n"]
        for name in [metric, *sorted({name for row in rows for name in row.scores} - {metric})]:
            methods = [one for one in last.methods(task) if any(name in cell.scores for cell in last.cells(task, one))]
            lines = [
                [method, *(_told(by_cell.get((method, length)), name) for length in lengths)]
                + ([last.told_lost(task, method)] if name == metric else [])
                for method in methods
            ]
            head = [name, *(label(length, self.trained) for length in lengths), *(["lost"] if name == metric else [])]
            parts += [table(head, lines), ""]
        documents = {row.length: row for row in rows if row.scores}
        sizes = [f"{label(n, self.trained)}: {documents[n].documents:,.0f}" for n in lengths if n in documents]
        parts.append(f"Documents, on average: {', '.join(sizes)}.\n" if sizes else "Nothing was measured.\n")
        notes: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row.note:
                notes.setdefault((row.method, row.note), []).append(label(row.length, self.trained))
        told = [_line(f"* {method}, {', '.join(where)}: {note}") for (method, note), where in notes.items()]
        about = [_line(f"{name} {value}") for name, value in dict(last.settings.get("tasks", {}).get(task, {})).items()]
        return [*parts, *told, *([""] if told else []), *([f"Recorded: {'; '.join(about)}.\n"] if about else [])]


def label(length: int, trained: int = 0) -> str:
    """A length as people read it.

    >>> label(16384), label(1048576), label(4608), label(294912, 4608), label(1_000_000)
    ('16K', '1M', '4.5K', '288K (64x)', '1000000')
    """
    times = f" ({length // trained}x)" if trained and length % trained == 0 else ""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        words = f"{length / size:.3f}".rstrip("0").rstrip(".")
        if size <= length < 10_000 * size and float(words) * size == length:  # two lengths never share a label
            return f"{words}{unit}{times}"
    return f"{length}{times}"


def parse_length(words: str | int, trained: int) -> int:
    """Tokens of a length.

    Args:
        words: Tokens; or `16K`, `1M`; or `64x`, so many times the trained length.
        trained: Tokens of a training pack's documents.

    Raises:
        UserError: It is none of these.

    >>> parse_length("16K", 0), parse_length("1.5M", 0), parse_length("64x", 4608), parse_length(5000, 0)
    (16384, 1572864, 294912, 5000)
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(x|K|M)?", str(words))
    tokens = 0.0 if found is None else float(found[1]) * {**UNITS, "x": trained}[found[2] or ""]
    if not 1 <= tokens < math.inf:
        raise UserError(f"lengths: {words!r} is no length; give tokens, like 65536, 64K or 1M, or 64x the trained one")
    return int(tokens)


def _told(row: Row | None, name: str) -> str:
    if row is None or name not in row.scores:
        return "–"
    return row.scores[name].told()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_line(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def _line(text: str) -> str:
    """A name or a reason in one line, whatever is in it."""
    return " ".join(text.split())


def _course(evaluations: Sequence[Evaluation], last: Evaluation) -> list[str]:
    """The model's headline scores at the longest memory of one evaluation, over steps."""
    longest = max((row.length for row in last.rows if row.method == ROUTER and row.scores), default=0)
    rows = []
    for one in evaluations:
        cells = {row.task: row for row in one.rows if row.method == ROUTER and row.length == longest}
        rows.append([f"{one.step:,}", *(_told(cells.get(task), metric) for task, metric in last.metrics.items())])
    return [f"## {ROUTER} over steps, {label(longest)} tokens of memory\n", table(["step", *last.metrics], rows), ""]


def _row(values: Mapping[str, Any]) -> Row:
    scores = {name: Mean(**mean) for name, mean in values["scores"].items()}
    return Row(**{**values, "scores": scores, "depths": tuple((float(mean), int(n)) for mean, n in values["depths"])})
