"""Qwen3-4B on 64K-token packs on two GPUs: whole steps by `msa-train fit`, from a store of a million documents.

    python benchmarks/scale.py WORK --tokenizer TOKENIZER [--gib 80] [--runs zero1 zero2 zero3] [--steps 14]

Writes a corpus of a million short documents into WORK, tokenises it, trains each strategy for a few steps from random
weights, and reads what the run's own Throughput logged; the first logs, which compile, are left out. With --small it
instead trains a small decoder for 10 steps, resumes it for 10 more, exports it and opens the export, under each.
Writes WORK/scale.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
SYLLABLES = ("ba", "ten", "ri", "mol", "sa", "ver", "ki", "dun", "lo", "pra", "mi", "steg", "na", "ful", "to", "wick")


class Cap(L.Callback):
    """Lets a GPU pass for one with less memory.

    Args:
        gib: Memory that may be allocated.
    """

    def __init__(self, gib: float) -> None:
        self.gib = gib

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Caps the allocator."""
        if not torch.cuda.is_available():
            return
        total = torch.cuda.get_device_properties(pl_module.device).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(self.gib / total, 1.0), trainer.strategy.root_device)


def write_corpus(folder: Path, documents: int, words: int) -> None:
    """A BEIR folder of made-up documents; every tenth answers a query."""
    (folder / "qrels").mkdir(parents=True)
    rng = np.random.default_rng(0)
    vocabulary = np.array(["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) for _ in range(20_000)])
    with (folder / "corpus.jsonl").open("w") as corpus:
        for first in range(0, documents, 10_000):
            drawn = vocabulary[(rng.random((min(10_000, documents - first), words)) ** 3 * len(vocabulary)).astype(int)]
            for number, row in enumerate(drawn, start=first):
                corpus.write(f'{{"_id": "d{number}", "title": "", "text": "{" ".join(row)} {number}."}}\n')
    with (folder / "queries.jsonl").open("w") as queries, (folder / "qrels" / "train.tsv").open("w") as qrels:
        qrels.write("query-id\tcorpus-id\tscore\n")
        for number in range(0, documents, 10):
            queries.write(f'{{"_id": "q{number}", "text": "What of {number}?"}}\n')
            qrels.write(f"q{number}\td{number}\t1\n")


def call(*words: str, log: Path) -> float:
    """Runs `msa-train` with these words; seconds that it took."""
    started = time.perf_counter()
    with log.open("a") as out:
        done = subprocess.run(
            [sys.executable, "-m", "msa_train", *words], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise SystemExit(f"msa-train {' '.join(words[:3])} ... failed; the end of {log}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - started


def logged(folder: Path, name: str) -> list[float]:
    """A column of a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def shared(given: argparse.Namespace, work: Path, name: str) -> list[str]:
    """What all runs have in common."""
    return [
        f"--runs={work / 'runs'}", f"--name={name}", "--overwrite=true", f"--data.corpus={work / 'corpus'}",
        f"--data.tokenizer={given.tokenizer}", "--data.val_splits=[]", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.devices=2",
    ]  # fmt: skip


def steps(given: argparse.Namespace, work: Path, strategy: str, extra: Sequence[str]) -> dict[str, Any]:
    """Whole steps of Qwen3-4B under a strategy."""
    name = f"{strategy}{len(extra)}"
    callbacks = [
        {"class_path": "callbacks.Throughput"},
        {"class_path": "benchmarks.scale.Cap", "init_args": {"gib": given.gib}},
    ]
    took = call(
        "fit", "--config=configs/qwen3_4b/model.yaml", "--config=configs/qwen3_4b/pretrain.yaml",
        f"--config=configs/strategy/{strategy}.yaml", *shared(given, work, name),
        "--model.backbone=configs/backbones/qwen3_4b.json", f"--data.document_tokens={given.tokens}",
        f"--data.queries_per_pack={given.queries}", "--data.num_workers=4", f"--trainer.max_steps={given.steps}",
        "--trainer.log_every_n_steps=2", "--checkpoint.every_n_train_steps=0",
        f"--trainer.callbacks={json.dumps(callbacks)}", *extra, log=work / f"{name}.log",
    )  # fmt: skip
    folder = work / "runs" / name
    tokens = logged(folder, "speed/tokens_per_s")[2:]
    per_step = 2 * (given.tokens + 32 * given.queries)
    return {
        "strategy": strategy, "extra": list(extra), "tokens_per_s": tokens, "mfu": logged(folder, "speed/mfu")[2:],
        "packs_per_s": logged(folder, "speed/packs_per_s")[2:],
        "step_s": 2 / statistics.median(logged(folder, "speed/packs_per_s")[2:]),
        "data_wait": logged(folder, "speed/data_wait")[2:],
        "peak_gib": max(logged(folder, "memory/peak_gib"), default=None),
        "loss": logged(folder, "loss/total"), "whole_run_s": took, "about_tokens_per_step": per_step,
    }  # fmt: skip


def round_trip(given: argparse.Namespace, work: Path, strategy: str) -> dict[str, Any]:
    """Train 10 steps, save, resume to 20, export to one folder, open that: the run's outputs, and the losses of a run
    that was not broken off."""
    from msa_train.bench import Load
    from msa_train.runs import open_run

    backbone = "configs/backbones/smollm2_135m.json"
    common = [
        "--config=configs/qwen3_4b/model.yaml", "--config=configs/qwen3_4b/pretrain.yaml",
        f"--config=configs/strategy/{strategy}.yaml", f"--model.backbone={backbone}", "--data.document_tokens=16384",
        "--data.queries_per_pack=16", "--data.num_workers=0", "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_train_steps=10", "--trainer.callbacks=[]",
    ]  # fmt: skip
    log = work / f"{strategy}-small.log"
    names = (f"{strategy}-whole", f"{strategy}-parts")
    for name, limits in zip(names, ((20,), (10, 20)), strict=True):
        for number, limit in enumerate(limits):
            words = [word for word in shared(given, work, name) if not (number and "overwrite" in word)]
            resume = ["--ckpt_path=last"] if number else []
            call("fit", *common, *words, f"--trainer.max_steps={limit}", *resume, *given.extra, log=log)
    losses = [logged(work / "runs" / name, "loss/total") for name in names]
    run, out = work / "runs" / names[1], work / f"{strategy}-export"
    call("export", str(run), f"--out={out}", log=log)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [open_run(place).model.to(device) for place in (run, out)]
    pack = Load(4096, queries=4).pack(64, 40_000).to(device)
    with torch.no_grad():
        outputs = [model(pack) for model in models]
        logits = [model.logits(output.hidden_AM) for model, output in zip(models, outputs, strict=True)]
    return {
        "strategy": strategy, "losses": losses[0], "losses_resumed": losses[1],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "logits_bitwise_equal": torch.equal(*logits),
        "scores_bitwise_equal": torch.equal(outputs[0].doc_score_LQD, outputs[1].doc_score_LQD),
        "exported": sorted(file.name for file in out.iterdir()),
    }  # fmt: skip


def agreement(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Fifty steps with everything that makes a step fast, and with none of it, on one GPU."""
    slow = {"attention": "sdpa", "elementwise": "plain", "rope": "torch", "pool": "torch"}
    ways = {
        "fast": ["--model.recompute=layers"],
        "plain": ["--model.recompute=none", f"--model.kernels={json.dumps(slow)}"],
        "documents": ["--model.recompute=documents"],
    }
    losses = {}
    for name, words in ways.items():
        call(
            "fit", "--config=configs/qwen3_4b/model.yaml", "--config=configs/qwen3_4b/pretrain.yaml",
            "--model.backbone=configs/backbones/smollm2_135m.json", *shared(given, work, f"agree-{name}"),
            "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=bf16-mixed",
            "--model.weights=float32", "--data.document_tokens=8192", "--data.queries_per_pack=16",
            "--data.num_workers=0", "--trainer.max_steps=50", "--trainer.log_every_n_steps=1",
            "--checkpoint.every_n_train_steps=0", "--trainer.callbacks=[]", *words, *given.extra,
            log=work / f"agree-{name}.log",
        )  # fmt: skip
        folder = work / "runs" / f"agree-{name}"
        losses[name] = {part: logged(folder, f"loss/{part}") for part in ("lm", "routing")}
    apart = {
        name: max(
            abs(a - b) / abs(b)
            for part in ("lm", "routing")
            for a, b in zip(losses[name][part], losses["plain"][part], strict=True)
        )
        for name in ("fast", "documents")
    }
    return {"losses": losses, "largest_relative_difference": apart}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--words", type=int, default=112)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--gib", type=float, default=80)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--runs", nargs="*", default=["zero1", "zero2", "zero3"])
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="Further words of every run; last.")
    parser.add_argument(
        "--small", nargs="*", default=[], help="Strategies to take through saving, resuming, exporting."
    )
    parser.add_argument("--agree", action="store_true", help="Fifty steps with all that is fast, and without.")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["MSA_TRAIN_CACHE"] = str(work / "cache")
    result: dict[str, Any] = {}
    file = work / "scale.json"
    if file.is_file():
        result = json.loads(file.read_text())
    if not (work / "corpus").is_dir():
        started = time.perf_counter()
        write_corpus(work / "corpus", given.documents, given.words)
        written = time.perf_counter() - started
        packed = call(
            "pack", f"--data.corpus={work / 'corpus'}", f"--data.tokenizer={given.tokenizer}",
            f"--data.num_workers={given.workers}", log=work / "pack.log",
        )  # fmt: skip
        result["store"] = {"documents": given.documents, "write_s": written, "pack_s": packed}
        print(json.dumps(result["store"]), flush=True)
    if torch.cuda.is_available():
        result["gpus"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        result["versions"] = {"torch": torch.__version__, "lightning": L.__version__}
    for strategy in given.runs:
        row = steps(given, work, strategy, given.extra)
        result.setdefault("steps", []).append(row)
        file.write_text(json.dumps(result, indent=1) + "\n")
        told = {name: row[name] for name in ("strategy", "step_s", "peak_gib", "data_wait", "mfu", "whole_run_s")}
        print(json.dumps(told), flush=True)
    if given.agree:
        result["agreement"] = agreement(given, work)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["agreement"]["largest_relative_difference"]), flush=True)
    for strategy in given.small:
        row = round_trip(given, work, strategy)
        result.setdefault("round_trips", []).append(row)
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({name: value for name, value in row.items() if "losses" not in name}), flush=True)


if __name__ == "__main__":
    main()
