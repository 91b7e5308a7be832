"""The scripts of examples/ do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.beir import BeirReader
from msa_train.cli import build
from msa_train.evaluation.report import Evaluation, Report

ROOT = Path(__file__).parent.parent


def test_chains_are_a_corpus_whose_held_out_people_are_nowhere_else(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples" / "write_chains.py"), str(tmp_path / "chains"), "--chains", "60"]
    said = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    reader = BeirReader(tmp_path / "chains")
    texts = {document.id: document.text for document in reader.documents()}
    queries = list(reader.queries())
    assert f"{len(texts)} documents, 60 chains" in said and len(queries) == 60
    assert {len(query.steps) for query in queries} == {2, 3, 4}
    held_out = [query for query in queries if "test" in query.relevant]
    assert len(held_out) == 6
    for query in queries:
        steps = [texts[name] for (name,) in query.steps]
        for one, other in zip(steps, steps[1:], strict=False):
            assert " ".join(other.split()[:2]) in one, "a step is known from the one before it"
        assert query.answers[0] in steps[-1] and " ".join(steps[0].split()[:2]) in query.text
        people = " ".join(steps[-1].split()[:2])
        mentions = [
            text
            for name, text in texts.items()
            if people in text and name.split("-")[0] != query.steps[0][0].split("-")[0]
        ]
        assert mentions == []


@pytest.mark.parametrize("saved", [False, True])
def test_the_slurm_script_starts_what_msa_train_understands(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run with a srun that writes its arguments down; the command line then reads them."""
    script, seen = ROOT / "examples" / "slurm.sh", tmp_path / "seen"
    subprocess.run(["bash", "-n", str(script)], check=True)
    srun = tmp_path / "srun"
    srun.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {seen}\n")
    srun.chmod(0o755)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script.read_text(), re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"], "a task per GPU"
    if saved:
        (tmp_path / "qwen3_4b_slurm" / "step=100.ckpt").mkdir(parents=True)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUNS": str(tmp_path), "SLURM_NNODES": asked["nodes"],
        "SLURM_NTASKS_PER_NODE": asked["ntasks-per-node"], "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
    }  # fmt: skip
    subprocess.run([str(script), "--data.corpus", "a corpus"], check=True, env=environment, cwd=ROOT)
    words = seen.read_text().splitlines()
    command = words.index("msa-train")
    assert all(word.startswith("--") for word in words[:command]) and words[command + 1] == "fit"
    assert words[-2:] == ["--data.corpus", "a corpus"] and ("--ckpt_path" in words) == saved
    monkeypatch.chdir(ROOT)
    here = ["--trainer.accelerator=cpu", "--trainer.num_nodes=1", "--trainer.devices=1", "--trainer.strategy=auto"]
    found = build([*words[command + 1 :], *here, "--trainer.precision=32-true"], run=False)
    assert found is not None and found.config.fit.name == "qwen3_4b_slurm"
    assert (words[words.index("--trainer.num_nodes") + 1], words[words.index("--trainer.devices") + 1]) == ("2", "8")


STAND_IN = """
import pathlib, sys, time, yaml
run, words = pathlib.Path(sys.argv[1]), sys.argv[2:]
saved = [int(path.name[5:-5]) for path in run.glob("step=*.ckpt")]
assert ("--ckpt_path" in words) == bool(saved)
run.mkdir(exist_ok=True)
(run / "config.yaml").write_text(yaml.safe_dump({"model": {"phases": [{"steps": 20}, {"steps": 60}]}}))
with (run / "starts").open("a") as file:
    file.write(f"{max(saved, default=0)}\\n")
for step in range(max(saved, default=0) + 10, 90, 10):
    (run / f"step={step}.ckpt").mkdir()
    time.sleep(3.0 if step == 40 and not saved else 0.1)  # long enough to be killed there
"""


def test_the_recipe_is_killed_half_way_once_and_goes_on(tmp_path: Path) -> None:
    from examples.smollm2_memory import saved_step, train

    (tmp_path / "stand_in.py").write_text(STAND_IN)
    run = tmp_path / "run"
    fit = [sys.executable, str(tmp_path / "stand_in.py"), str(run)]
    train(run, fit)
    assert (run / "starts").read_text().split() == ["0", "40"] and saved_step(run) == 80
    train(run, fit)
    assert (run / "starts").read_text().split() == ["0", "40"], "what is done is not done again"


def test_the_recipe_tells_of_a_training_that_fails(tmp_path: Path) -> None:
    from examples.smollm2_memory import train

    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "run", [sys.executable, "-c", "raise SystemExit(3)"])
    assert ended.value.code == 3


def test_the_recipe_takes_what_msa_train_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its commands, with the parts that need a network or a GPU already there."""
    from examples import smollm2_memory

    commands: list[list[str]] = []
    monkeypatch.setattr(smollm2_memory, "run_command", lambda command: commands.append(list(command)))
    monkeypatch.setattr(smollm2_memory, "train", lambda run, fit: commands.append([*fit]))
    smollm2_memory.main(["--name", "mine", "--seed", "3", "--config", "configs/smollm2_135m/days.yaml"])
    fetch, needles, fit, test, export = commands
    assert fetch[1] == "examples/fetch_corpora.py" and needles[1] == "examples/write_needles.py"
    monkeypatch.chdir(ROOT)
    here = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", f"--runs={tmp_path}"]
    found = build([*fit[3:], *here], run=False)
    assert found.config.fit.name == "mine" and found.datamodule.packing.seed == 3
    assert found.model.timeline.steps == 16_000 and found.model.blueprint.lora is None
    assert (
        test[3] == "test" and test[-2:] == ["--ckpt_path", "last"] and "configs/evaluation/smollm2_memory.yaml" in test
    )
    assert export[3] == "export" and export[-2:] == ["--only", "routers"]


def test_a_report_that_was_cut_short_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from examples import smollm2_memory

    run, done = tmp_path / "checkpoints" / "mine", list[str]()
    run.mkdir(parents=True)

    def command(words: list[str]) -> None:
        done.append(words[3] if len(words) > 3 else words[1])
        if done[-1] == "test":
            assert not (run / "report.json").exists()
            Report(1024, 16, [Evaluation(3, 1.0, {}, [], {}, cut=done.count("test") == 1)]).save(run)

    monkeypatch.setattr(smollm2_memory, "ROOT", tmp_path)
    monkeypatch.setattr(smollm2_memory, "run_command", command)
    monkeypatch.setattr(smollm2_memory, "train", lambda run, fit: None)
    for _ in range(3):
        smollm2_memory.main(["--name", "mine"])
    assert done.count("test") == 2
