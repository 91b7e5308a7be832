"""What a run loses when its processes are killed, its files damaged, its disk full, a step broken: measured.

    python benchmarks/faults.py WORK [--only kill-ddp kill-zero2 damage disk sigterm nan hang] [--trials 20] [--seed 0]
    python benchmarks/faults.py WORK --table

Every run is two CPU processes over gloo, 60 steps of a tiny decoder, a checkpoint every 5, in a folder of its own. What
a fault left is taken up again as a user would, and at its end held against the uninterrupted run: every weight, and the
loss of every step, bitwise. Importing takes longer than such a run, so all is imported once and the ranks are forked.
Writes WORK/faults.json; --table prints the table of the one that lies there.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # torch, tokenizers and deepspeed look once, when they are imported; not this folder's names
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    os.environ.update(OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")
    os.environ.update(JE_ARROW_MALLOC_CONF="background_thread:false")  # no thread may be there when ranks are forked
    sys.path[0] = str(ROOT)

import lightning as L  # noqa: E402
import torch  # noqa: E402

from msa_train.checkpoints import newest_checkpoint, read_checkpoint  # noqa: E402

FAULTS = ("kill-ddp", "kill-zero2", "damage", "disk", "sigterm", "nan", "hang")
ZERO = {"class_path": "msa_train.strategies.ZeRO", "init_args": {"stage": 2, "persistence_threshold": 0}}
STRATEGIES = {
    "ddp": ["--trainer.strategy=ddp"],
    "zero2": [f"--trainer.strategy={json.dumps(ZERO)}", "--trainer.precision=bf16-true", "--model.weights=bfloat16"],
}
RANKS, STEPS, EVERY = 2, 60, 5
LIMIT_S = 180.0  # of a run that takes less than 20
HANG_MINUTES, HANG_MARGIN_S = 0.2, 30.0
REQUEUE = 75
BLOCK = 4096  # bytes; a file takes whole ones
HALF = re.compile(r"step=\d+\.ckpt\.writing")  # a checkpoint that is not whole yet

COLOURS = ("red", "green", "blue", "amber", "violet", "teal", "ochre", "ivory")
ANIMALS = ("fox", "heron", "otter", "lynx", "crane", "newt", "stoat", "finch", "moth", "hare")
BACKBONE = {
    "model_type": "qwen3", "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}  # fmt: skip


# --- what runs inside a run -------------------------------------------------------------------------------------


class Begun(L.Callback):
    """Writes down where a run started and how many steps have begun, at once: a kill takes nothing of it away.

    Args:
        out: File of two numbers of 8 characters.
    """

    def __init__(self, out: str) -> None:
        self.out, self.first = out, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers the step that the run goes on from."""
        self.first = trainer.global_step
        self._write(trainer, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Counts the step that begins."""
        self._write(trainer, trainer.global_step + 1)

    def _write(self, trainer: L.Trainer, begun: int) -> None:
        if trainer.is_global_zero:
            file = os.open(self.out, os.O_WRONLY | os.O_CREAT)
            os.pwrite(file, f"{self.first:8d}{begun:8d}".encode(), 0)
            os.close(file)


class Breaks(L.Callback):
    """Makes the last rank's part of one step not finite.

    Args:
        step: Which, from 0.
        what: Its `gradient`, or its `loss` from the decoder's last states on.
    """

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what
        self.hook: Any = None

    def _here(self, trainer: L.Trainer) -> bool:
        return trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        """Breaks what the loss is made of."""
        if self._here(trainer) and self.what == "loss":
            norm = pl_module.net.backbone.model.norm
            self.hook = norm.register_forward_hook(lambda module, given, out: out * torch.nan)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        """Breaks the gradient; mends what the loss is made of."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        elif self._here(trainer) and self.what == "gradient":
            loss.register_hook(lambda gradient: gradient * torch.nan)


class Sleeps(L.Callback):
    """Has the last rank never come back from a step.

    Args:
        step: Which, from 0.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Sleeps."""
        while trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            time.sleep(3600)


# --- a run ------------------------------------------------------------------------------------------------------


class Failed(Exception):
    """What was promised did not hold."""


class NotRun(Exception):
    """It could not be tried here."""


class Job:
    """The ranks of one `msa-train` command, forked, in a process group of their own.

    Args:
        words: The command's.
        log: File for what the ranks print.
    """

    def __init__(self, words: list[str], log: Path) -> None:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread alone, and other threads' locks"
        self.log, self.started = log, time.perf_counter()
        self.pids: list[int] = []
        self.codes: list[int | None] = [None] * RANKS
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(RANKS):
            leader = self.pids[0] if self.pids else 0
            pid = os.fork()
            if pid == 0:
                _run_rank(rank, port, leader, words, log)
            os.setpgid(pid, leader or pid)
            self.pids.append(pid)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.started

    def alive(self) -> bool:
        """Whether any rank still runs."""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                self.codes[rank] = os.waitstatus_to_exitcode(status) if done else None
        return None in self.codes

    def until(self, event: Callable[[], bool] = lambda: False, limit_s: float = LIMIT_S) -> bool:
        """Waits for an event, or the end: whether the event came first.

        Raises:
            Failed: Neither came in time.
        """
        while self.alive():
            if event():
                return True
            if self.seconds > limit_s:
                self.kill()
                raise Failed(f"still ran after {limit_s:.0f} s; {self.end()}")
            time.sleep(0.001)
        return False

    def ended(self, code: int = 0) -> None:
        """Waits for the end.

        Raises:
            Failed: A rank ended in another way.
        """
        self.until()
        if self.codes != [code] * RANKS:
            raise Failed(f"exit codes {self.codes}, not {code}; {self.end()}")

    def kill(self) -> None:
        """SIGKILL to all that the ranks are and have started."""
        try:
            os.killpg(self.pids[0], signal.SIGKILL)
        except ProcessLookupError:  # all of it has ended
            return
        while self.alive():
            time.sleep(0.001)

    def end(self) -> str:
        """The end of what the ranks printed."""
        return f"the end of {self.log.name}: {self.text()[-1500:]}"

    def text(self) -> str:
        """What the ranks printed."""
        return self.log.read_text(errors="replace")


def _run_rank(rank: int, port: int, leader: int, words: list[str], log: Path) -> NoReturn:
    """A forked process becomes a rank, as torchrun would start it, and ends."""
    code = 1
    try:
        os.setpgid(0, leader)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(ROOT)
        given = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "NODE_RANK": 0,
            "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults",
        }  # fmt: skip
        os.environ.update({name: str(value) for name, value in given.items()})
        from lightning.pytorch.utilities import rank_zero_only

        from msa_train.cli import main as msa_train

        rank_zero_only.rank = rank  # it looked when it was imported
        sys.argv = ["msa-train", *words]
        msa_train()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Bench:
    """Runs of one kind in one folder, and what was found.

    Args:
        work: The folder.
        seed: Of all that is drawn.
        rows: What was found before.
    """

    def __init__(self, work: Path, seed: int, rows: list[dict[str, Any]]) -> None:
        self.work, self.seed, self.rows = work, seed, rows
        self.uninterrupted: dict[str, tuple[Path, float]] = {}
        for name in ("runs", "logs"):
            shutil.rmtree(work / name, ignore_errors=True)
            (work / name).mkdir(parents=True)
        if not (work / "corpus").is_dir():
            write_corpus(work / "corpus")
        (work / "backbone.json").write_text(json.dumps(BACKBONE))

    def drawn(self, *names: Any) -> random.Random:
        """A generator of its own for every case: which others are measured does not move its moments."""
        return random.Random(f"{self.seed} {names}")

    def folder(self, *names: Any) -> Path:
        """A run's."""
        return self.work / "runs" / "-".join(str(name).replace(" ", "-") for name in names)

    @contextmanager
    def job(self, strategy: str, folder: Path, *more: str, callbacks: Sequence[Any] = ()) -> Iterator[Job]:
        """A run that trains, and that is gone at the end of the block."""
        self._begun(folder).unlink(missing_ok=True)
        phases = [{"name": "only", "steps": STEPS, "routing_weight": 1.0, "backbone_lr": 3e-3, "router_lr": 3e-3}]
        told = [callback(Begun, out=str(self._begun(folder))), *callbacks]
        words = [
            "fit", *STRATEGIES[strategy], f"--runs={folder.parent}", f"--name={folder.name}",
            "--trainer.accelerator=cpu", f"--trainer.devices={RANKS}", "--trainer.num_sanity_val_steps=0",
            f"--model.backbone={self.work / 'backbone.json'}", f"--model.phases={json.dumps(phases)}",
            "--model.msa.chunk_size=8", "--model.msa.top_k=2", "--data=datamodules.PackedMemory",
            f"--data.corpus={self.work / 'corpus'}", "--data.vocab_size=400", "--data.document_tokens=512",
            "--data.queries_per_pack=3", "--data.val_splits=[]", "--trainer.limit_val_batches=0",
            "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false", f"--checkpoint.every_n_train_steps={EVERY}",
            f"--trainer.callbacks={json.dumps(told)}", *more,
        ]  # fmt: skip
        job = Job(words, self.work / "logs" / f"{folder.name}.log")
        try:
            yield job
        finally:
            job.kill()

    def _begun(self, folder: Path) -> Path:
        return self.work / "logs" / f"{folder.name}.begun"

    def begun(self, folder: Path) -> tuple[int | None, int]:
        """The step that a run went on from, None before it trains; and how many have begun."""
        file = self._begun(folder)
        text = file.read_text() if file.is_file() else ""
        return (int(text[:8]), int(text[8:])) if len(text) == 16 else (None, 0)

    def whole(self, strategy: str) -> tuple[Path, float]:
        """The uninterrupted run and its seconds. It is run twice: two that differ would leave nothing to compare with.

        Raises:
            Failed: It fails, or differs.
        """
        if strategy not in self.uninterrupted:
            first, again = self.folder(strategy, "first"), self.folder(strategy, "whole")
            for folder in (first, again):
                shutil.rmtree(folder, ignore_errors=True)
                with self.job(strategy, folder) as job:
                    job.ended()
                    seconds = job.seconds
            steps = [step for step, _ in logged(first)]
            if steps != list(range(STEPS)):
                raise Failed(f"the uninterrupted run logged the steps {steps}")
            check_equal(first, again)
            self.uninterrupted[strategy] = again, seconds
        return self.uninterrupted[strategy]

    def take_up(self, strategy: str, folder: Path, found: dict[str, Any]) -> None:
        """Goes on with what a fault left, or starts it anew where nothing was saved yet, to the end.

        Raises:
            Failed: It does not end, or not where the uninterrupted run does.
        """
        found["anew"] = not folder.is_dir() or newest_checkpoint(folder) is None
        with self.job(strategy, folder, "--overwrite=true" if found["anew"] else "--ckpt_path=last") as job:
            job.ended()
        found["from"] = self.begun(folder)[0]  # None: all steps were done
        check_equal(folder, self.whole(strategy)[0])

    @contextmanager
    def row(self, fault: str, strategy: str, case: str) -> Iterator[dict[str, Any]]:
        """Measures one case, and writes down what was found and whether what is promised held."""
        row: dict[str, Any] = {"fault": fault, "strategy": strategy, "case": case, "held": True, "found": {}}
        try:
            yield row["found"]
        except NotRun as error:
            row |= {"held": None, "why": str(error)}
        except Exception as error:  # whatever a case meets, the others are measured
            row |= {"held": False, "why": str(error) if isinstance(error, Failed) else traceback.format_exc()}
        self.rows.append(row)
        told = {True: "held", False: "FAILED", None: "not run"}[row["held"]]
        print(f"{fault:10} {strategy:5} {case:24} {told:7} {json.dumps(row['found'])} {row.get('why', '')}", flush=True)


def callback(kind: type, **arguments: Any) -> dict[str, Any]:
    """One of this file's, as a configuration names it."""
    return {"class_path": f"benchmarks.faults.{kind.__name__}", "init_args": arguments}


# --- what is held against what ----------------------------------------------------------------------------------


def logged(folder: Path, column: str = "loss/total") -> list[tuple[int, str]]:
    """Steps and logged values in the order of the file, as text: equal text is an equal float."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), row[column]) for row in csv.DictReader(file) if row.get(column)]


def check_equal(folder: Path, whole: Path) -> None:
    """Holds a run that has ended against the uninterrupted one.

    Raises:
        Failed: A weight or a logged loss is not bitwise that one's.
    """
    ours, theirs = (read_checkpoint(_newest(place)) for place in (folder, whole))
    weights, wanted = ours["state_dict"], theirs["state_dict"]
    if ours["global_step"] != theirs["global_step"] or weights.keys() != wanted.keys():
        raise Failed(f"ended at step {ours['global_step']} with {len(weights)} weights")
    apart = [name for name in weights if not torch.equal(_bits(weights[name]), _bits(wanted[name]))]
    losses, expected = logged(folder), logged(whole)
    if apart or losses != expected:
        unlike = sorted({step for step, _ in set(losses) ^ set(expected)})
        raise Failed(f"weights differ: {apart[:3]}; {len(losses)} losses, which differ at the steps {unlike[:6]}")


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous().view(-1).view(torch.uint8)


def _newest(folder: Path) -> Path:
    newest = newest_checkpoint(folder)
    if newest is None:
        raise Failed(
            f"{folder.name} has no whole checkpoint, of {sorted(path.name for path in folder.glob('*.ckpt*'))}"
        )
    return newest


def named_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are named by their step."""
    return sorted(int(path.stem.rpartition("=")[2]) for path in folder.glob("*step=*.ckpt"))


def files_of(checkpoint: Path) -> list[Path]:
    """All files of a checkpoint, where they lie."""
    place = checkpoint.resolve()
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]


def write_corpus(folder: Path) -> None:
    """A BEIR folder of 80 animals that live somewhere."""
    (folder / "qrels").mkdir(parents=True)
    names = [f"{colour} {animal}" for animal in ANIMALS for colour in COLOURS]
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as queries:
        for number, name in enumerate(names):
            text = f"The {name} lives by the {COLOURS[number % 7]} river number {number}." + " Dusk." * (number % 3)
            corpus.write(json.dumps({"_id": f"d{number}", "title": name, "text": text}) + "\n")
            query = {"_id": f"q{number}", "text": f"Where does the {name} live?", "answers": [f"by river {number}"]}
            queries.write(json.dumps(query) + "\n")
    rows = "".join(f"q{number}\td{number}\t1\n" for number in range(len(names)))
    (folder / "qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")


# --- the faults -------------------------------------------------------------------------------------------------


def kill(bench: Bench, strategy: str, trials: int) -> None:
    """SIGKILL to both ranks: two of three at a moment of the run's time, the third while a checkpoint is written."""
    for number in range(trials):
        rng, folder = bench.drawn("kill", strategy, number), bench.folder("kill", strategy, number)
        writing = number % 3 == 2
        with bench.row(f"kill-{strategy}", strategy, "writing" if writing else "any moment") as found:
            seconds = bench.whole(strategy)[1]
            moment, nth, later_ms = rng.uniform(0, seconds), rng.randint(1, STEPS // EVERY), rng.choice((0, 0, 4, 12))
            found |= {"writing": nth, "later_ms": later_ms} if writing else {"moment_s": round(moment, 3)}
            with bench.job(strategy, folder) as job:
                event = _nth_writing(folder, nth) if writing else lambda: job.seconds >= moment  # noqa: B023
                if not job.until(event):
                    job.ended()
                    raise NotRun("no *.writing was seen" if writing else "it had ended before")
                time.sleep(later_ms / 1000 if writing else 0)
                job.kill()
                found |= {"killed_s": round(job.seconds, 3), "step": bench.begun(folder)[1]}
            found["half"] = [path.name for path in folder.glob("*") if HALF.fullmatch(path.name)]
            bench.take_up(strategy, folder, found)
            found["left"] = sorted(path.name for path in folder.glob("*.ckpt.*"))
            shutil.rmtree(folder)


def _nth_writing(folder: Path, nth: int) -> Callable[[], bool]:
    """Whether something is written aside in a folder for the n-th time."""
    seen, before = 0, False

    def look() -> bool:
        nonlocal seen, before
        now = folder.is_dir() and any(HALF.fullmatch(name) for name in os.listdir(folder))
        seen += now and not before
        before = now
        return seen >= nth

    return look


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


def damage(bench: Bench, strategy: str) -> None:
    """Every file of the newest checkpoint in turn: cut in half, one byte flipped, gone."""
    files: list[Path] = []
    with bench.row("damage", strategy, "two checkpoints") as found:
        whole, _ = bench.whole(strategy)
        found["kept"] = named_steps(whole)
        if len(found["kept"]) < 2:
            raise NotRun("the run keeps no two checkpoints that are named by their step")
        files = [path.relative_to(whole.resolve()) for path in files_of(_newest(whole))]
        found["files"] = len(files)
    if files:
        bench.rows.pop()  # nothing was tried yet
    for number, file in enumerate(files):
        for way, spoil in (("cut", _cut), ("flipped", _flip), ("missing", Path.unlink)):
            with bench.row("damage", strategy, f"{file} {way}") as found:
                folder = bench.folder("damage", strategy, number, way)
                shutil.copytree(whole, folder, symlinks=True)
                spoil(folder / file)
                with bench.job(strategy, folder, "--ckpt_path=last") as job:
                    job.ended()
                told = [line for line in job.text().splitlines() if file.name in line]
                found |= {"from": bench.begun(folder)[0], "told": told[0].strip()[:300] if told else None}
                if found["from"] != named_steps(whole)[-2] or not told:
                    raise Failed(f"went on from step {found['from']}; {job.end()}")
                check_equal(folder, whole)
                shutil.rmtree(folder)


def disk(bench: Bench, strategy: str) -> None:
    """The run's folder on a disk that holds one checkpoint and a half."""
    with bench.row("disk", strategy, "the second does not fit") as found:
        whole, _ = bench.whole(strategy)
        one = sum(_blocks(path) for path in files_of(_newest(whole)))
        others = [path for path in whole.rglob("*") if ".ckpt" not in str(path.relative_to(whole))]
        size = sum(_blocks(path) for path in others) + one * 3 // 2
        found |= {"disk_kib": size // 1024, "checkpoint_kib": one // 1024}
        place, copy = bench.work / f"small-{strategy}", bench.folder("disk", strategy)
        with _small_disk(place, size), bench.job(strategy, place / copy.name) as job:
            job.ended()
            shutil.copytree(place / copy.name, copy, symlinks=True)
        told = [line for line in job.text().splitlines() if "could not be saved" in line]
        found |= {"kept": named_steps(copy), "told": told[0].strip()[:300] if told else None}
        if logged(copy) != logged(whole) or not told:
            raise Failed(f"{len(logged(copy))} losses are logged; {job.end()}")
        read_checkpoint(_newest(copy))
        bench.take_up(strategy, copy, found)
        if found["anew"] or found["from"] is None:
            raise Failed(f"more or less than one checkpoint fitted: it went on from step {found['from']}")


@contextmanager
def _small_disk(place: Path, size: int) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, text=True)
    if mounted.returncode:
        raise NotRun(f"no root ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _blocks(path: Path) -> int:
    return -(-path.stat().st_size // BLOCK) * BLOCK


def sigterm(bench: Bench, strategy: str) -> None:
    """SIGTERM and SIGUSR1, to the first rank and to all, at some moment of some step."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        for whom in ("rank 0", "all ranks"):
            name = signal.Signals(number).name
            with bench.row("sigterm", strategy, f"{name} to {whom}") as found:
                rng, folder = bench.drawn(name, whom, strategy), bench.folder(name, whom, strategy)
                seconds = bench.whole(strategy)[1]
                step, later = rng.randint(1, STEPS - 5), rng.uniform(0, seconds / STEPS / 2)
                with bench.job(strategy, folder) as job:
                    _wait_for(bench, job, folder, step)
                    time.sleep(later)
                    found["step"] = bench.begun(folder)[1]
                    sent = time.perf_counter()
                    for pid in job.pids[:1] if whom == "rank 0" else job.pids:
                        os.kill(pid, number)
                    job.ended(REQUEUE)
                    found["ended_s"] = round(time.perf_counter() - sent, 2)
                bench.take_up(strategy, folder, found)
                if found["from"] is None or not 0 <= found["from"] - found["step"] <= 1:
                    raise Failed(f"the signal came in step {found['step']}, step {found['from']} was saved")
                shutil.rmtree(folder)


def _wait_for(bench: Bench, job: Job, folder: Path, step: int) -> None:
    if not job.until(lambda: bench.begun(folder)[1] >= step):
        raise Failed(f"it ended before step {step}; {job.end()}")


def nan(bench: Bench, strategy: str) -> None:
    """One step's gradient, or the loss that it is of, is not finite on one rank."""
    for what in ("gradient", "loss"):
        with bench.row("nan", strategy, what) as found:
            step, folder = bench.drawn(what, strategy).randint(1, STEPS - 2), bench.folder("nan", what, strategy)
            with bench.job(strategy, folder, callbacks=[callback(Breaks, step=step, what=what)]) as job:
                job.ended()
            found["step"] = step
            counted = [float(value) for _, value in logged(folder, "train/skipped_steps")]
            if counted != [float(number >= step) for number in range(STEPS)]:
                raise Failed(f"train/skipped_steps are {counted}")
            weights = read_checkpoint(_newest(folder))["state_dict"]
            if not all(torch.isfinite(weight).all() for weight in weights.values()):
                raise Failed("weights are not finite")
            file = folder / "skipped.jsonl"
            found["recorded"] = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
            packs = list(range(step * RANKS, (step + 1) * RANKS))  # of all ranks: their gradients were added up
            if found["recorded"] != [{"step": step, "packs": packs}]:
                raise Failed(f"skipped.jsonl should name step {step} and the packs {packs}")


def hang(bench: Bench, strategy: str) -> None:
    """The last rank never comes back from a step."""
    with bench.row("hang", strategy, f"{HANG_MINUTES * 60:.0f} s are set") as found:
        step, folder = bench.drawn("hang", strategy).randint(EVERY + 1, STEPS - 2), bench.folder("hang", strategy)
        guard, sleeps = f"--guard.hang_minutes={HANG_MINUTES}", callback(Sleeps, step=step)
        with bench.job(strategy, folder, guard, callbacks=[sleeps]) as job:
            _wait_for(bench, job, folder, step + 1)
            hung = job.seconds
            job.until(limit_s=hung + HANG_MINUTES * 60 + HANG_MARGIN_S)
            found |= {"step": step, "ended_s": round(job.seconds - hung, 1), "codes": job.codes}
        stacks = sorted(path for path in (folder / "stacks").glob("*") if path.is_file())
        where = re.compile(r'faults\.py", line \d+ in on_train_batch_start')
        asleep = [path.name for path in stacks if where.search(path.read_text(errors="replace"))]
        found |= {"stacks": [path.name for path in stacks], "asleep": asleep}
        if 0 in job.codes or len(stacks) < RANKS or not asleep:
            raise Failed(f"no stack of every rank, or an end that looks well; {job.end()}")
        bench.take_up(strategy, folder, found)


# --- the table --------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """A line for every fault and strategy: how many cases held, and what was measured."""
    lines = ["| fault | strategy | held | measured |", "|---|---|---|---|"]
    for fault in FAULTS:
        for strategy in STRATEGIES:
            mine = [row for row in rows if (row["fault"], row["strategy"]) == (fault, strategy)]
            if not mine:
                continue
            ran = [row for row in mine if row["held"] is not None]
            held = f"{sum(row['held'] for row in ran)} of {len(ran)}" if ran else "not run"
            told = (
                [_told(fault, [row["found"] for row in ran if row["held"]])] if any(row["held"] for row in ran) else []
            )
            why = sorted({row["why"] for row in mine if row["held"] is None})
            told += [f"{len(mine) - len(ran)} not run: {', '.join(why)}"] if why else []
            lines.append(f"| {fault} | {strategy} | {held} | {'; '.join(told)} |")
    return "\n".join(lines)


def _told(fault: str, found: list[dict[str, Any]]) -> str:
    def span(name: str) -> str:
        values = sorted({row[name] for row in found if row.get(name) is not None})
        return f"{values[0]:g} to {values[-1]:g}" if len(values) > 1 else f"{values[0]:g}" if values else "none"

    if fault.startswith("kill"):
        half, anew = (sum(bool(row.get(name)) for row in found) for name in ("half", "anew"))
        again = [row["step"] - row["from"] for row in found if not row["anew"] and row["from"] is not None]
        return (f"killed in steps {span('step')}, {half} with a checkpoint half written; {anew} begun anew, "
                f"{max(again, default=0)} steps at most done again by the others")  # fmt: skip
    if fault == "damage":
        return f"the file named, gone on from step {span('from')}"
    if fault == "disk":
        return (
            f"disk of {span('disk_kib')} KiB, checkpoint of {span('checkpoint_kib')}: trained on, saved {span('from')}"
        )
    if fault == "sigterm":
        late = max(row["from"] - row["step"] for row in found)
        return f"in steps {span('step')}, saved at most {late} later; ended after {span('ended_s')} s"
    if fault == "nan":
        return f"steps {span('step')} skipped, counted and recorded"
    return f"ended after {span('ended_s')} s of {HANG_MINUTES * 60:.0f} set, with {RANKS} stacks"


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="Of all but kills."
    )
    parser.add_argument("--trials", type=int, default=20, help="Kills for each strategy.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--table", action="store_true", help="Measure nothing: print the table of faults.json.")
    given = parser.parse_args()
    work = given.work.resolve()
    file = work / "faults.json"
    before = json.loads(file.read_text())["rows"] if file.is_file() else []
    if given.table:
        print(table(before))
        return
    os.environ["MSA_TRAIN_CACHE"] = str(work / "cache")
    import_all()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what was started ends with this

    def again(row: dict[str, Any]) -> bool:
        return row["fault"] in given.only and (row["fault"].startswith("kill") or row["strategy"] in given.strategies)

    bench = Bench(work, given.seed, [row for row in before if not again(row)])
    for fault in given.only:
        if fault.startswith("kill"):
            kill(bench, fault.partition("-")[2], given.trials)
        else:
            for strategy in given.strategies:
                {"damage": damage, "disk": disk, "sigterm": sigterm, "nan": nan, "hang": hang}[fault](bench, strategy)
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        seconds = {name: round(took, 2) for name, (_, took) in bench.uninterrupted.items()}
        result = {
            "machine": machine, "torch": torch.__version__, "lightning": L.__version__, "ranks": RANKS, "steps": STEPS,
            "every": EVERY, "seed": given.seed, "trials": given.trials, "uninterrupted_s": seconds, "rows": bench.rows,
        }  # fmt: skip
        text = json.dumps(result, indent=1).replace(f"{ROOT}/", "").replace(str(work), "WORK")
        file.write_text(text + "\n")
    print(table(bench.rows))
    if any(row["held"] is False for row in bench.rows):
        sys.exit(1)


def import_all() -> None:
    """What a run imports, before the first fork."""
    for name in ("deepspeed", "torch.utils.tensorboard", "transformers.models.qwen3.modeling_qwen3",
                 "benchmarks.faults", "datamodules", "callbacks", "msa_train.cli"):  # fmt: skip
        importlib.import_module(name)


if __name__ == "__main__":
    main()
