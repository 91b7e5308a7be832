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
