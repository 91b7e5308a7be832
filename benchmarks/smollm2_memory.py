"""configs/smollm2_135m/memory.yaml in many variants: three seeds, and what becomes of it without each of its parts.

    python benchmarks/smollm2_memory.py WORK [--only headline seeds baselines ablations NAME ...]
        [--config MORE.yaml ...] [--evaluation FILE.yaml ...] [--gpus 0 1] [--per-gpu 1] [--steps-factor 1.0]
        [--minutes M] [--resume]
    python benchmarks/smollm2_memory.py WORK --table | --figure FILE.png

Reads the corpora that parts 1 and 2 of examples/smollm2_memory.py make. Every variant (benchmarks/smollm2_variants.py)
is trained and evaluated by `msa-train` in processes of its own, each of which sees one GPU: runs lie in WORK/runs/NAME,
what they print in WORK/NAME.log, how they ended in WORK/NAME.json. The first, seed0, is killed half-way and resumed,
and lends its weights to the variants that are evaluated alone; baselines are asked without any. After each part
WORK/smollm2_memory.json is gathered anew (benchmarks/smollm2_results.py), of whatever is there.

A training has its GPU to itself, as has full attention, and trainings come first. Other evaluations leave a GPU idle
while they ask one question after another, so --per-gpu of them may share one, and where --evaluation gives several
files, each is a part of its own: runs and logs are those of NAME, NAME-2 and so on, and their rows are gathered as one
report. Tasks that have a mean, as the needles do, belong in one file.

--minutes ends every training by the clock: its learning rate has not come to its end then, and seed0 is killed only if
half of its steps fit. --resume leaves out what has its report, and goes on with what has a checkpoint; without it the
chosen variants are done anew, and others stay. Ctrl-C, or `timeout 25m` before the command, lets trainings save their
step first, and evaluations report what they have; --resume asks those anew. Where the campaign itself is killed, what
it had started goes on: end that first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder's names

from benchmarks.smollm2_results import (  # noqa: E402
    RESULT,
    dumped,
    figure,
    gathered,
    joined,
    read_record,
    run_of,
    runs_of,
    tables,
)
from benchmarks.smollm2_variants import GROUPS, SEEDS, VARIANTS, chosen, evaluation, overlay, tasks_of  # noqa: E402
from examples.smollm2_memory import EVALUATION, RECIPE, half_way, saved_step  # noqa: E402
from msa_train.evaluation.report import FILE as REPORT  # noqa: E402
from msa_train.folders import LINK  # noqa: E402
from msa_train.runs import RECALL  # noqa: E402

MSA_TRAIN = (sys.executable, "-m", "msa_train")
TRAINING, EVALUATING = "training", "evaluation"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_S = 1.0
TOLD = 15  # lines of a log


# --- the queue --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """The training of a variant, or one of its evaluations.

    Args:
        name: The variant.
        kind: Which of both.
        weights: Whose weights.
        number: Of the evaluation, from 1.
    """

    name: str
    kind: str
    weights: str
    number: int = 1

    @property
    def run(self) -> str:
        """The name of its run: a training's is that of the first evaluation."""
        return run_of(self.name, self.number)

    @property
    def alone(self) -> bool:
        """Whether it needs the GPU to itself, for its time or for its memory."""
        return self.kind == TRAINING or VARIANTS[self.name].baseline == "full_attention_beyond"


class Queue:
    """Parts in their order, trainings first; the invariants: what needs its GPU alone shares it with nothing, and
    weights are there before they are evaluated.

    Args:
        parts: All that is to be done.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.waiting = sorted(parts, key=lambda part: part.kind != TRAINING)
        self.untrained = {part.name for part in parts if part.kind == TRAINING}
        self.running: dict[str, list[Part]] = {}
        self.turn = threading.Condition()

    def take(self, gpu: str) -> Part | None:
        """The next part for a GPU; None when there is no more. Waits while what is left may not begin there."""
        with self.turn:
            beside = self.running.setdefault(gpu, [])
            while self.waiting:
                part = next((one for one in self.waiting if self._may_begin(one, beside)), None)
                if part is not None:
                    self.waiting.remove(part)
                    beside.append(part)
                    return part
                self.turn.wait()
            return None

    def _may_begin(self, part: Part, beside: Sequence[Part]) -> bool:
        ready = part.kind == TRAINING or part.weights not in self.untrained
        return ready and (not beside if part.alone else not any(one.alone for one in beside))

    def done(self, part: Part, gpu: str, well: bool) -> list[Part]:
        """A part has ended on a GPU: the others that fall with it."""
        with self.turn:
            self.running[gpu].remove(part)
            fallen = [] if well else [one for one in self.waiting if part.kind == TRAINING and one.weights == part.name]
            self.waiting = [one for one in self.waiting if one not in fallen]
            self.untrained -= {part.name}
            self.turn.notify_all()
            return fallen

    def close(self) -> None:
        """Nothing more is begun."""
        with self.turn:
            self.waiting.clear()
            self.turn.notify_all()


class Campaign:
    """Variants in one folder.

    Args:
        work: The folder.
        given: What the command line said.
    """

    def __init__(self, work: Path, given: argparse.Namespace) -> None:
        self.work, self.runs, self.given = work, work / "runs", given
        self.configs = [ROOT / RECIPE, *(Path(file).resolve() for file in given.config)]
        self.evaluations = [Path(file).resolve() for file in given.evaluation] or [ROOT / EVALUATION]
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.training: set[str] = set()  # their folders change, and may not be read
        self.failed: list[str] = []
        self.stopped = False

    # --- before it starts ---------------------------------------------------------------------------------------

    def parts(self, names: Sequence[str]) -> list[Part]:
        """What is to be done for these variants; clears away what is done anew.

        Raises:
            SystemExit: Weights are missing that no chosen variant trains.
        """
        for name in names:
            over = VARIANTS[name].over
            if over is not None and over not in names and not self._trained(over):
                raise SystemExit(f"{name} is evaluated over {over}, which is not trained in {self.work}: choose it too")
        asked = {name: self._asked(name) for name in names}
        parts = []
        for name in names:
            variant = VARIANTS[name]
            self._clear(name, asked[name])
            left = [number for number, run in enumerate(asked[name], 1) if not self._reported(run)]
            if not left:
                print(f"{name}: its report is there", flush=True)
                continue
            self._configure(name, asked[name])
            if variant.trained and not self._trained(name):
                parts.append(Part(name, TRAINING, name))
            parts += [Part(name, EVALUATING, variant.over or name, number) for number in left]
        return parts

    def _asked(self, name: str) -> dict[str, str]:
        """The evaluations of a variant: the config of each by its run.

        Raises:
            SystemExit: A file is none, or two ask the same.
        """
        configs = [evaluation(file, VARIANTS[name]) for file in self.evaluations]
        told = [task for config in configs for task in tasks_of(config)]
        twice = {task for task in told if told.count(task) > 1}
        if twice:
            raise SystemExit(f"--evaluation: {', '.join(sorted(twice))} in several files, whose rows become one report")
        texts = (yaml.safe_dump(config, sort_keys=False) for config in configs)
        return {run_of(name, number): text for number, text in enumerate(texts, 1)}

    def _clear(self, name: str, asked: Mapping[str, str]) -> None:
        """Clears away what is done anew; where this goes on, what was asked otherwise."""
        if not self.given.resume:
            (self.work / f"{name}.json").unlink(missing_ok=True)
        for run in {*asked, *(path.name for path in runs_of(self.runs / name))}:
            folder, config, log = self.runs / run, self._config_of(run), self.work / f"{run}.log"
            if not self.given.resume or run not in asked:
                config.unlink(missing_ok=True)
                log.unlink(missing_ok=True)
                if folder.exists():
                    shutil.rmtree(folder)
            elif not config.is_file() or config.read_text() != asked[run]:
                (folder / REPORT).unlink(missing_ok=True)

    def _config_of(self, run: str) -> Path:
        """The file of what a run is asked."""
        return self.work / f"{run}.evaluation.yaml"

    def _reported(self, run: str) -> bool:
        """Whether a run has a report that was not cut short."""
        file = self.runs / run / REPORT
        return file.is_file() and not joined([json.loads(file.read_text())])["cut"]

    def _trained(self, name: str) -> bool:
        calls = read_record(self.work, name).get(TRAINING, [])
        return bool(calls) and calls[-1]["code"] == 0

    def _configure(self, name: str, asked: Mapping[str, str]) -> None:
        """Writes a variant's configs, and down what it is."""
        variant, record = VARIANTS[name], read_record(self.work, name)
        for run, text in asked.items():
            self._config_of(run).write_text(text)
        record |= {"over": variant.over, "ask": dict(variant.ask), "failed": None}
        if variant.alike:
            record["layers"] = "alike"
        if variant.trained:
            config = overlay(self.configs, variant, self.given.steps_factor, self.given.minutes)
            (self.work / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            elsewhere = {str(file): file.name for file in self.configs if not file.is_relative_to(ROOT)}
            words = [elsewhere.get(word, word) for word in self.fit_words(name)]
            record |= {"fit": words, "overlay": config}
        self._write(name, record)

    def fit_words(self, name: str) -> list[str]:
        """The words of a variant's training."""
        variant = VARIANTS[name]
        return [
            "fit", *self._given(name, [*self.configs, self.work / f"{name}.yaml"]),
            "--seed_everything", str(variant.seed), "--data.seed", str(variant.seed),
            "--trainer.enable_progress_bar", "false", *variant.fit,
        ]  # fmt: skip

    def test_words(self, part: Part) -> list[str]:
        """The words of an evaluation."""
        asked = self._config_of(part.run)
        if VARIANTS[part.name].baseline:
            return ["test", *self._given(part.run, [*self.configs, asked])]
        run = self.runs / part.weights
        return ["test", *self._given(part.run, [run / "config.yaml", asked]), "--ckpt_path", str(run / LINK)]

    def _given(self, run: str, configs: Sequence[Path]) -> list[str]:
        """Words that every command has."""
        files = [word for file in configs for word in ("--config", str(file))]
        return [*files, "--name", run, "--runs", str(self.runs)]

    # --- doing it -----------------------------------------------------------------------------------------------

    def work_off(self, parts: Sequence[Part]) -> None:
        """Does all parts, on every GPU one training or as many evaluations at a time as it may have."""
        queue = Queue(parts)

        def serve(gpu: str) -> None:
            while (part := queue.take(gpu)) is not None:
                well = self._do(part, gpu)
                fallen = {one.name: one for one in queue.done(part, gpu, well) if one.name != part.name}
                for one in fallen.values():
                    self._fail(one, f"{part.name} was not trained")

        slots = [gpu for _ in range(self.given.per_gpu) for gpu in self.given.gpus]
        with ThreadPoolExecutor(len(slots)) as threads:
            served = [threads.submit(serve, gpu) for gpu in slots]
            try:
                for one in wait(served, return_when=FIRST_EXCEPTION).done:
                    one.result()
            finally:  # there is something left to stop only if this was interrupted, or is itself at fault
                queue.close()
                self._stop()

    def _do(self, part: Part, gpu: str) -> bool:
        started = time.monotonic()
        code = self._train(part, gpu) if part.kind == TRAINING else self._evaluate(part, gpu)
        well = code == 0 and (part.kind == TRAINING or (self.runs / part.run / REPORT).is_file())
        if not well and not self.stopped:
            lines = (self.work / f"{part.run}.log").read_text(errors="replace").replace("\r", "\n").splitlines()
            self._fail(part, f"exit code {code}", [line for line in lines if line.strip()][-TOLD:])
        end = "" if well else ", broken off" if self.stopped else ", failed"
        self._tell(f"{part.run:<18} {part.kind:<10} GPU {gpu} {time.monotonic() - started:9,.0f} s{end}")
        self.gather()
        return well

    def _train(self, part: Part, gpu: str) -> int:
        name = part.name
        variant, run, words = VARIANTS[name], self.runs / name, self.fit_words(name)
        began = saved_step(run)
        if not began and run.exists():
            shutil.rmtree(run)  # it was killed before its first checkpoint

        resume, kill = ["--ckpt_path", "last"], partial(half_way, run, began) if variant.killed else None
        with self.lock:
            self.training.add(name)
        code = self._call(part, [*words, *(resume if began else [])], gpu, kill)
        if code == -signal.SIGKILL and kill is not None and kill():
            code = self._call(part, [*words, *resume], gpu)
        with self.lock:
            self.training.discard(name)
        return code

    def _evaluate(self, part: Part, gpu: str) -> int:
        run, recall = self.runs / part.run, self.runs / part.weights / RECALL
        run.mkdir(parents=True, exist_ok=True)
        weighs = recall.is_file() and not VARIANTS[part.name].alike
        if weighs and part.run != part.weights:  # where documents are ranked, layers weigh by it
            shutil.copy(recall, run / RECALL)
        return self._call(part, self.test_words(part), gpu)

    def _call(self, part: Part, words: Sequence[str], gpu: str, kill: Callable[[], bool] | None = None) -> int:
        """Runs `msa-train` on a GPU; its exit code.

        Args:
            part: To whose log and record it goes.
            words: Of the command.
            gpu: The one that it sees.
            kill: Whether it is time to kill it.
        """
        started = time.monotonic()
        name, kind = part.name, part.kind
        with (self.work / f"{part.run}.log").open("ab") as log:
            with self.lock:
                if self.stopped:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    [*MSA_TRAIN, *words], cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu}, stdout=log,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
                self.running.add(process)
            while process.poll() is None:
                try:
                    process.wait(POLL_S)
                except subprocess.TimeoutExpired:
                    if kill is not None and kill():
                        os.killpg(process.pid, signal.SIGKILL)
        seconds = round(time.monotonic() - started, 1)
        shared = 1 if part.alone else self.given.per_gpu
        call = {"run": part.run, "code": process.returncode, "seconds": seconds, "gpu": gpu, "per_gpu": shared}
        with self.lock:
            self.running.discard(process)
            record = read_record(self.work, name)
            self._write(name, {**record, kind: [*record.get(kind, []), call]})
        return process.returncode

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.running:
                process.terminate()  # a training saves its step then

    # --- telling ------------------------------------------------------------------------------------------------

    def _fail(self, part: Part, why: str, lines: Sequence[str] = ()) -> None:
        with self.lock:
            self.failed.append(part.name)
            self._write(part.name, {**read_record(self.work, part.name), "failed": "\n".join([why, *lines])})
        self._tell("\n    ".join([f"{part.run}: {part.kind} failed: {why}", *lines]))

    def _tell(self, text: str) -> None:
        with self.lock:
            print(text, flush=True)

    def _write(self, name: str, record: dict[str, Any]) -> None:
        (self.work / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")

    def gather(self) -> None:
        """Writes the JSON of all that is there and stands still."""
        with self.lock:
            found = gathered(self.work, [name for name in VARIANTS if name not in self.training])
            text = dumped(found).replace(str(self.work), "WORK").replace(f"{ROOT}/", "")
            (self.work / RESULT).write_text(text)


def break_off(*_: Any) -> None:
    """Has what was started end with this, once: `timeout` signals twice, and the second would leave it running."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, evaluates and gathers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*GROUPS, *VARIANTS], default=[], metavar="NAME",
                        help=f"Variants, or {', '.join(GROUPS)}; all by default.")  # fmt: skip
    parser.add_argument("--config", nargs="+", default=[], help="Further configs of every training.")
    parser.add_argument("--evaluation", nargs="+", default=[], help=f"Files in the place of {EVALUATION}.")
    parser.add_argument("--gpus", nargs="+", default=["0"], help="Each by its number.")
    parser.add_argument("--per-gpu", type=int, default=1, help="Evaluations that share a GPU at a time.")
    parser.add_argument("--steps-factor", type=float, default=1.0, help="Of the steps of every phase.")
    parser.add_argument("--minutes", type=float, help="Of every training, at most.")
    parser.add_argument("--resume", action="store_true", help="Go on with what is there.")
    parser.add_argument("--table", action="store_true", help="Do nothing: print the tables of what was gathered.")
    parser.add_argument("--figure", type=Path, help="Do nothing: draw the curves of the first seed there.")
    given = parser.parse_args(arguments)
    if given.per_gpu < 1 or given.steps_factor <= 0 or (given.minutes is not None and given.minutes <= 0):
        parser.error("give --per-gpu from 1, --steps-factor and --minutes above 0")
    work = given.work.resolve()
    if given.table or given.figure:
        if not (work / RESULT).is_file():
            parser.error(f"{work}: no {RESULT} yet")
        result = json.loads((work / RESULT).read_text())
        if given.table:
            print(tables(result))
        if given.figure and "report" not in result["variants"].get(SEEDS[0], {}):
            parser.error(f"{work}: {SEEDS[0]} was not evaluated yet")
        if given.figure:
            figure(result).savefig(given.figure, dpi=100)
        return
    for one in SIGNALS:
        signal.signal(one, break_off)
    (work / "runs").mkdir(parents=True, exist_ok=True)
    campaign = Campaign(work, given)
    try:
        campaign.work_off(campaign.parts(chosen(given.only)))
    except KeyboardInterrupt:
        raise SystemExit("broken off; --resume goes on") from None
    campaign.gather()
    print(work / RESULT)
    if campaign.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
