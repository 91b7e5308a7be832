"""What a campaign of benchmarks/smollm2_memory.py left in its folder, as one JSON, and the figure and tables of that.

    {"recipe", "variants": {NAME: {"over", "ask", "fit", "overlay", "training", "evaluation", "failed", and of its run
     "steps", "steps_s", "speed", "losses", "held_out", "environment", "report"}}}

`training` and `evaluation` are the processes, each with its exit code, wall time and GPU, and the number of the
evaluation; `steps_s` is the time of the steps alone, without validations and checkpoints. `speed` is apart for every
length of packs, median and largest of what was logged. `held_out` is recall by layer: before training (recall@1 alone,
which callbacks.RouterMonitor keeps), at the first and at the last validation. `report` is the last evaluation of
report.json, without depths; where a variant was evaluated in several processes, it has the rows of all of them.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.smollm2_variants import GROUPS, SEEDS
from callbacks.figures import draw_curves
from examples.smollm2_memory import RECIPE
from msa_train.checkpoints import newest_checkpoint
from msa_train.environment import FILE as ENVIRONMENT
from msa_train.evaluation.report import FILE as REPORT
from msa_train.evaluation.report import FORMAT, Report, label, table
from msa_train.folders import TRAINER

RESULT = "smollm2_memory.json"
OVERALL = "overall"
SPEED = {
    "tokens_per_s": "speed/tokens_per_s", "mfu": "speed/mfu", "data_wait": "speed/data_wait",
    "peak_gib": "memory/peak_gib",
}  # fmt: skip
RECALLS = ("recall@1", "recall@5", "recall@k")
MILLION = 2**20
Row = dict[str, Any]


def read_record(work: Path, name: str) -> dict[str, Any]:
    """How a variant was made and how its processes ended; empty before that."""
    file = work / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def run_of(name: str, number: int = 1) -> str:
    """The run of a variant's evaluation; the first is its training's too."""
    return name if number == 1 else f"{name}-{number}"


def runs_of(first: Path) -> list[Path]:
    """The folders of a variant's runs that are there, in their order."""
    others = [path for path in first.parent.glob(f"{first.name}-*") if path.name.rpartition("-")[2].isdecimal()]
    others.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    return [path for path in (first, *others) if path.exists()]


def gathered(work: Path, names: Iterable[str]) -> dict[str, Any]:
    """All that is there of these variants."""
    found = {}
    for name in names:
        record = read_record(work, name)
        if record:
            found[name] = {**record, **of_run(work / "runs" / name)}
    return {"recipe": RECIPE, "variants": found}


def dumped(result: dict[str, Any]) -> str:
    """As a file has it: one line for every row of an evaluation."""
    rows: list[str] = []

    def short(value: Any) -> Any:
        if isinstance(value, dict) and {"method", "task", "length"} <= value.keys():
            rows.append(json.dumps(value))
            return f"<row {len(rows) - 1}>"
        if isinstance(value, dict):
            return {name: short(one) for name, one in value.items()}
        return [short(one) for one in value] if isinstance(value, list) else value

    text = json.dumps(short(result), indent=1)
    return re.sub(r'"<row (\d+)>"', lambda found: rows[int(found[1])], text) + "\n"


# --- of a run ---------------------------------------------------------------------------------------------------


def of_run(run: Path) -> dict[str, Any]:
    """What a run's folder tells; without what is not there."""
    found: dict[str, Any] = {}
    if (run / "metrics.csv").is_file() and (run / "config.yaml").is_file():
        with (run / "metrics.csv").open(newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        config = yaml.safe_load((run / "config.yaml").read_text())
        found |= of_training(config, rows) | {"held_out": held_out(rows, untrained(run))}
    if (run / ENVIRONMENT).is_file():
        starts = [json.loads(line) for line in (run / ENVIRONMENT).read_text().splitlines()]
        found["environment"] = {**starts[-1], "starts": [[one["started"], one["step"]] for one in starts]}
    reports = [json.loads((one / REPORT).read_text()) for one in runs_of(run) if (one / REPORT).is_file()]
    if reports:
        found["report"] = joined(reports)
    return found


def joined(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last evaluations of reports on the same weights as one: every task is in one of them; settings are the
    first's."""
    asked = [report["evaluations"][-1] for report in reports]
    first = {"trained": reports[0]["trained"], "k": reports[0]["k"], **asked[0]}
    for one in asked[1:]:
        first["seconds"] += one["seconds"]
        first["metrics"] = {**first["metrics"], **one["metrics"]}
        tasks = {**first["settings"]["tasks"], **one["settings"]["tasks"]}
        first["settings"] = {**first["settings"], "tasks": tasks}
    first["cut"] = any(one.get("cut", False) for one in asked)  # reports of before it was told lack it
    rows = [row for one in asked for row in one["rows"]]
    first["rows"] = [{name: value for name, value in row.items() if name != "depths"} for row in rows]
    return first


def of_training(config: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Steps, speed and losses of a run's config and log."""
    every = config["trainer"]["log_every_n_steps"]
    packs = every * config["trainer"]["accumulate_grad_batches"]
    planned = sum(phase["steps"] for phase in config["model"]["phases"])
    # a run that the clock ends repeats its last values in a row of its own
    logged = [row for row in rows if "loss/total" in row and (int(row["step"]) + 1) % every == 0]
    measured = [row for row in logged if "speed/packs_per_s" in row]
    tokens = config["data"]["init_args"]["document_tokens"]
    curriculum = {0: tokens} if isinstance(tokens, int) else {int(at): tokens[at] for at in tokens}
    starts = sorted(curriculum)
    speed = {}
    for start, stop in zip(starts, [*starts[1:], float("inf")], strict=True):
        mine = [row for row in measured if start <= row["step"] + 1 - every and row["step"] < stop]
        speed[label(curriculum[start])] = {
            name: {"median": statistics.median(values), "max": max(values)}
            for name, column in SPEED.items()
            if (values := [row[column] for row in mine if column in row])
        }
    return {
        "steps": {"planned": planned, "done": int(max((row["step"] for row in rows), default=-1)) + 1},
        "steps_s": round(sum(packs / row["speed/packs_per_s"] for row in measured), 1),
        "speed": speed,
        "losses": {part: logged[-1][f"loss/{part}"] for part in ("total", "lm", "routing")} if logged else {},
    }


def untrained(run: Path) -> dict[str, dict[str, float]]:
    """Recall@1 by layer before the first step, of every split, as the run's RouterMonitor remembers it."""
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        return {}
    state = torch.load(checkpoint / TRAINER, map_location="cpu", weights_only=True)
    history = state["callbacks"].get("RouterMonitor", {}).get("history", {})
    return {split: rows[0]["recall@1"] for split, rows in history.items() if rows[0]["step"] == 0}


def held_out(rows: Sequence[Row], before: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Recall by layer and losses on every split: before training, at the first and at the last validation."""
    found: dict[str, Any] = {split: {"untrained": {"recall@1": recall}} for split, recall in before.items()}
    for split in sorted({name.rpartition("/")[2] for row in rows for name in row if name.startswith("routing/")}):
        validated = [row for row in rows if f"routing/recall@1/{split}" in row]
        values = found.setdefault(split, {})
        for name, row in (("first", validated[0]), ("last", validated[-1])):
            values[name] = {"step": int(row["step"]) + 1}
            values[name] |= {part: row[f"loss/{part}/{split}"] for part in ("lm", "routing")}
            for recall in RECALLS:
                layers = {
                    int(where[1]): value
                    for column, value in row.items()
                    if (where := re.fullmatch(rf"routing/layer_(\d+)/{recall}/{re.escape(split)}", column))
                }
                values[name][recall] = {OVERALL: row[f"routing/{recall}/{split}"], **dict(sorted(layers.items()))}
    return found


# --- figure and tables ------------------------------------------------------------------------------------------


def figure(result: dict[str, Any], seed: str = SEEDS[0], baselines: Sequence[str] = GROUPS["baselines"]) -> Figure:
    """Curves of one seed's headline, and beside them those of every baseline.

    Args:
        result: What `gathered` found.
        seed: The variant; it was evaluated.
        baselines: Variants that are shown beside it, where they were evaluated.
    """
    variants = result["variants"]
    own = variants[seed]["report"]
    beside = [variants[name]["report"] for name in baselines if "report" in variants.get(name, {})]
    rows = [{**row, "depths": []} for report in (own, *beside) for row in report["rows"]]
    metrics = {task: metric for task, metric in own["metrics"].items() if headlined(task)}
    evaluation = {**{name: own[name] for name in ("step", "seconds", "settings")}, "rows": rows, "metrics": metrics}
    report = Report.of({"format": FORMAT, "trained": own["trained"], "k": own["k"], "evaluations": [evaluation]})
    return draw_curves(report, report.evaluations[0])


def tables(result: dict[str, Any], seeds: Sequence[str] = SEEDS, baselines: Sequence[str] = GROUPS["baselines"]) -> str:
    """The headline, the needle tasks apart, and a line for every other variant.

    Args:
        result: What `gathered` found.
        seeds: Variants that differ in their seeds alone.
        baselines: Variants that are shown beside them.
    """
    variants = result["variants"]
    told = {name: one["report"] for name, one in variants.items() if "report" in one}
    alike, beside = ([told[name] for name in names if name in told] for names in (seeds, baselines))
    if not told:
        return "Nothing was evaluated yet."
    parts = []
    if alike:
        metrics = {task: metric for report in alike for task, metric in report["metrics"].items()}
        others = [task for task in metrics if headlined(task)]
        needles = [task for task in metrics if not headlined(task)]
        spread = f"mean of {len(alike)} seeds, lowest to highest" if len(alike) > 1 else "one seed"
        for title, tasks in (("Headline", others), ("Needle tasks", needles)):
            parts += (
                [f"## {title}: {spread}\n", _by_length(alike, beside, {task: metrics[task] for task in tasks}), ""]
                if tasks
                else []
            )
    lines = [(name, told.get(name), variants[name]) for name in variants if name not in (*seeds[1:], *baselines)]
    cut = [name for name, report in told.items() if report.get("cut")]
    failed = [name for name in told if variants[name].get("failed")]
    notes = [
        f"\n{why}, so that rows are missing: {', '.join(names)}."
        for why, names in (("Cut short", cut), ("Failed in part", failed))
        if names
    ]
    return "\n".join([*parts, "## Ablations\n", _ablations(lines), *notes])


def headlined(task: str) -> bool:
    """Whether a task stands in the headline: means over needle tasks do, in the place of the tasks themselves."""
    return not task.startswith("niah_") or "_mean_of_" in task


def _by_length(seeds: Sequence[Row], beside: Sequence[Row], metrics: dict[str, str]) -> str:
    """Tasks, by the score of each, over lengths: the model over its seeds, then each baseline."""
    told = [row for report in (*seeds, *beside) for row in report["rows"]]
    lengths = sorted({row["length"] for row in told if row["task"] in metrics})
    lines = []
    for task, metric in metrics.items():
        for score in (metric, "recall@k") if metric == "recall@1" else (metric,):
            for reports in (seeds, *([one] for one in beside)):
                cells = [[_value(report, task, score, n) for report in reports] for n in lengths]
                if any(value is not None for cell in cells for value in cell):
                    named = f"recall@{seeds[0]['k']}" if score == "recall@k" else score
                    name = f"{task}: {named}, n {_asked(reports, task, score)}"
                    lines.append([name, reports[0]["rows"][0]["method"], *map(_spread, cells)])
    return table(["task", "by", *map(label, lengths)], lines)


def _ablations(lines: Sequence[tuple[str, Row | None, Row]]) -> str:
    """One line for every variant: needles, real questions and answers at the shortest length that all of them have, at
    a million and at the longest."""
    reports = [report for _, report, _ in lines if report is not None]
    asked = [{row["length"] for row in report["rows"]} for report in reports]
    every = set().union(*asked)
    lengths = sorted({min(every.intersection(*asked) or every), max(every), *({MILLION} & every)}) if every else []
    places = " / ".join(map(label, lengths))
    columns: list[tuple[str, Callable[[str], bool], str]] = [
        ("needles", lambda task: "_mean_of_" in task, "accuracy"),
        ("real recall@1", lambda task: task == "real", "recall@1"),
        ("real recall@k", lambda task: task == "real", "recall@k"),
        ("answers F1", lambda task: task == "answers", "f1"),
    ]
    rows = []
    for name, report, variant in lines:
        if report is None:
            why = str(variant.get("failed") or "not evaluated yet").partition("\n")[0]
            rows.append([name, variant.get("steps", {}).get("done", "–"), why, *["–"] * (len(columns) - 1)])
            continue
        cells = []
        for _, wanted, score in columns:
            tasks = [task for task in report["metrics"] if wanted(task)]
            values = [_value(report, task, score, n) for task in tasks[:1] for n in lengths]
            cells.append(" / ".join("–" if value is None else f"{value:.3f}" for value in values) or "–")
        rows.append([name, report["step"], *cells])
    k = reports[0]["k"] if reports else "k"
    head = [f"{column.replace('@k', f'@{k}')}: {places}" for column, _, _ in columns]
    return table(["variant", "steps", *head], [[str(cell) for cell in row] for row in rows])


def _value(report: Row, task: str, score: str, length: int) -> float | None:
    """A mean; None where it was not measured."""
    for row in report["rows"]:
        if (row["task"], row["length"]) == (task, length) and score in row["scores"]:
            return row["scores"][score]["value"]
    return None


def _asked(reports: Sequence[Row], task: str, score: str) -> str:
    """How many questions are behind the means of a task: the fewest and the most, where they differ."""
    rows = [row for report in reports for row in report["rows"] if row["task"] == task]
    asked = {row["scores"][score]["n"] for row in rows if score in row["scores"]}
    return " to ".join(map(str, sorted({min(asked), max(asked)})))


def _spread(values: Sequence[float | None]) -> str:
    """The mean over seeds, the lowest and the highest; and of how many, where some lack it."""
    there = [value for value in values if value is not None]
    if not there:
        return "–"
    apart = f" ({min(there):.3f} to {max(there):.3f})" if len(there) > 1 else ""
    lacking = f", {len(there)} of {len(values)}" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.3f}{apart}{lacking}"
