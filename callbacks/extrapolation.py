"""ExtrapolationEvaluation: how far the memory reaches beyond the trained length, measured while a run trains.

The largest memory is encoded once, shared out over the ranks, and every shorter one is its beginning. The invariant:
training goes on as if nothing had been; weights, optimiser, random generators, modes and memory are as they were.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich import get_console

from callbacks.figures import draw_curves, draw_depths
from callbacks.parts import packed_memory, parts, undisturbed, whole
from callbacks.throughput import Throughput
from datamodules import NeedleTask, PackedMemory
from datamodules.lexical import BM25Retriever
from msa_train.backbone import open_config
from msa_train.errors import UserError
from msa_train.evaluation import Task
from msa_train.evaluation.baselines import ENDLESS, Backbone, FullAttention, Retrieving
from msa_train.evaluation.evaluate import Evaluator, Row
from msa_train.evaluation.judge import Judge, JudgeConfig
from msa_train.evaluation.methods import ROUTER, Method, Routed
from msa_train.evaluation.ranks import Ranks
from msa_train.evaluation.report import FILE, TABLES, Evaluation, Report, label, parse_length
from msa_train.evaluation.retrieval import Retriever
from msa_train.evaluation.task import headlines, means
from msa_train.findings import Finding
from msa_train.generation import AskConfig
from msa_train.guard import Guard
from msa_train.kernels.maxsim import Precision
from msa_train.model import MemorySparseModel
from msa_train.module import MemorySparseModule
from msa_train.runs import RECALL, layer_shares, read_recall
from msa_train.source import PackSource

Baseline = Literal["untrained", "bm25", "dense", "full_attention", "full_attention_beyond"]
CUT = "told to stop: the evaluation is cut short; `msa-train test` makes it anew"
CURVES, DEPTHS, GRADES = "extrapolation.png", "depth.png", "judge.jsonl"


class ExtrapolationEvaluation(L.Callback):
    """Evaluates tasks over memories of many lengths, during training and at its end.

    Writes report.json, report.md, figures and `answers-STEP.jsonl` (every question of an evaluation, what was found and
    answered, and its scores) into the run's folder; scalars, curve, depth heat map and tables go to TensorBoard. Tables
    and figures are of the evaluation that was made last. `msa-train test` runs it alone, on a trained checkpoint; with
    `trainer.fast_dev_run` it writes nothing.

    Args:
        tasks: What is asked: datamodules.RetrievalTask, datamodules.AnswerTask, datamodules.NeedleTask.
        lengths: Tokens of the memories, ascending: 65536, 64K, 1M, or 64x the trained length.
        every_n_steps: Evaluate every so many steps; 0 for no such round.
        at_steps: Further steps to evaluate at.
        at_end: Evaluate when training ends.
        baselines: Who answers the same questions when training ends and in `msa-train test`: the `untrained` router;
            `bm25` or a `dense` retriever in front of the backbone; the backbone with `full_attention` on everything,
            as far as its positions go, or `full_attention_beyond` them.
        router: Ask the model itself. Without it `msa-train test` asks the baselines alone: no training changes their
            scores, and those of retrievers and of full attention hold for every run on the same backbone. The report
            keeps them beside the run's own evaluations, in the place of none.
        dense_model: Folder or hub name of the dense retriever's model, for sentence-transformers.
        ask: How questions are answered. Retrieving baselines read as many documents.
        keys: Precision of the routing keys.
        budget_s: Seconds for an evaluation. What would take longer is left out, the longest memories first, and the
            report says so. The model has half of it when baselines follow.
        judge: Grades answers from 0 to 5; nobody by default.
    """

    def __init__(
        self,
        tasks: list[Task],
        lengths: tuple[int | str, ...] = ("1x", "2x", "4x", "8x", "16x", "32x", "64x"),
        every_n_steps: int = 0,
        at_steps: tuple[int, ...] = (),
        at_end: bool = True,
        baselines: tuple[Baseline, ...] = ("bm25", "untrained"),
        router: bool = True,
        dense_model: str = "sentence-transformers/all-MiniLM-L6-v2",
        ask: AskConfig = AskConfig(),
        keys: Precision = "bfloat16",
        budget_s: float = 600.0,
        judge: JudgeConfig | None = None,
    ) -> None:
        names = [*(task.name for task in tasks), *means(tasks)]
        if not tasks or len(set(names)) < len(names):
            raise UserError(
                f"ExtrapolationEvaluation: tasks are {', '.join(names) or 'none'}: give at least one, each with a "
                "name of its own"
            )
        if not lengths or budget_s <= 0 or every_n_steps < 0 or len(set(baselines)) < len(baselines):
            raise UserError(
                "ExtrapolationEvaluation: give lengths, a budget_s above 0, every_n_steps from 0, each baseline once"
            )
        if not router and not baselines:
            raise UserError("ExtrapolationEvaluation: without the router there are only baselines: give some")
        self.tasks, self.given_lengths, self.baselines = list(tasks), tuple(lengths), tuple(baselines)
        self.router = router
        self.every_n_steps, self.at_steps, self.at_end = every_n_steps, tuple(at_steps), at_end
        self.dense_model, self.ask, self.keys, self.budget_s = dense_model, ask, keys, budget_s
        self.judge = judge
        self._judge: Judge | None = None
        self.report: Report | None = None
        self._opened = False

    # --- before the run -----------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Opens the tasks, so that what is wrong with them is known before anything is trained."""
        data, module = parts(trainer, pl_module, self)
        if stage == "fit" and not self.router:
            raise UserError("ExtrapolationEvaluation: router: false leaves nothing to watch in training: ask the "
                            "baselines in `msa-train test`")  # fmt: skip
        self._open(data)
        if self.router or "untrained" in self.baselines:
            self._check_documents(data, module)
        # earlier evaluations stand in the run's folder, and outlive a resume there
        folder, trained = Path(trainer.default_root_dir), data.packing.document_tokens
        earlier = Report.open(folder).evaluations if (folder / FILE).is_file() else []
        self.report = Report(trained, module.msa.top_k, earlier)
        if "dense" in self.baselines:
            self._dense("cpu")  # a package or a model that is missing is told now
        if self.judge is not None:
            trial = trainer.fast_dev_run  # type: ignore[attr-defined]
            self._judge = Judge(self.judge, Path(os.devnull) if trial else folder / GRADES)  # and so is a key

    def examine(self, data: PackSource) -> list[Finding]:
        """What the doctor says of it.

        Raises:
            UserError: A task cannot be asked.
        """
        data = packed_memory(data, self)
        if data.data is None:  # the doctor may come here with data that could not be opened
            return [Finding("run", "evaluation", ", ".join(task.name for task in self.tasks))]
        self._open(data)
        findings = []
        for task in self.tasks:
            reach = task.reach()
            longest = max((n for n in self.lengths if reach is None or n <= reach), default=0)
            told = f"{task.name} to {label(longest)}" if longest else f"{task.name}: no length is within its documents"
            if reach is None or longest == self.lengths[-1]:
                findings.append(Finding("run", "evaluation", told))
            else:
                mend = f"it has documents for {reach:,} tokens: add distractors, or leave longer memories out"
                findings.append(Finding("run", "evaluation", told, "warning", mend))
        return findings

    def _open(self, data: PackedMemory) -> None:
        if self._opened:
            return
        trained = data.packing.document_tokens
        self.lengths = sorted({parse_length(words, trained) for words in self.given_lengths})
        for task in self.tasks:
            task.open(data.protocol, data)
            next(task.trials(self.lengths[0]))  # a memory too short for what is asked is told now
        self._opened = True

    def _check_documents(self, data: PackedMemory, module: MemorySparseModule) -> None:
        """Refuses a task with a document, in its pool or its first memory, that is longer than the model's positions.

        Raises:
            UserError: Such a document, and the setting that cuts it.
        """
        positions = getattr(open_config(module.blueprint.backbone), "max_position_embeddings", ENDLESS)
        for task in self.tasks:
            # a haystack without an end is cut alike from its beginning, and to cut a long one takes a while
            pool = task.pool(self.lengths[0 if task.reach() is None else -1])
            own = next(task.trials(self.lengths[0])).own
            numbered = chain(enumerate(pool, start=1), own.items())
            number, longest = max(numbered, key=lambda one: len(one[1].tokens))
            tokens = len(longest.tokens) + data.protocol.wrapping(number)
            if tokens > positions:
                setting = "document_tokens" if isinstance(task, NeedleTask) else "data.max_document_tokens"
                raise UserError(
                    f"task '{task.name}': document '{longest.id}' has {tokens:,} tokens with its number, the model has "
                    f"{positions:,} positions: lower {setting}"
                )

    # --- when ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the evaluations of steps that are taken again: what they measured was given up."""
        _, module = parts(trainer, pl_module, self)
        assert self.report is not None
        step = module.steps_done()
        gone = [one for one in self.report.evaluations if one.step > step]
        self.report = self.report.until(step)
        if not gone or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.default_root_dir)
        files = [_answers(one) for one in gone]
        if self.report.evaluations:
            self._write(folder, self.report.latest)
        else:
            files += [FILE, TABLES, CURVES, DEPTHS]
        for name in files:
            (folder / name).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluates at its steps."""
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and self.due(trainer.global_step, trainer.max_steps):
            self._run(trainer, pl_module, ())

    def due(self, step: int, last: int) -> bool:
        """Whether it evaluates after a step that is not the end, or whose end it does not evaluate anyway."""
        wanted = step in self.at_steps or (self.every_n_steps > 0 and step % self.every_n_steps == 0)
        return wanted and not (self.at_end and step == last)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates once more, baselines included."""
        if self.at_end and self._run(trainer, pl_module, self.baselines) and trainer.is_global_zero:
            print(
                f"msa-train: {CUT}", file=sys.stderr, flush=True
            )  # training is done, and another start has nothing to do

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates what `msa-train test` opened, baselines included."""
        guard = _guard(trainer)
        if self._run(trainer, pl_module, self.baselines) and guard is not None:
            guard.leave(trainer, CUT)

    # --- what ---------------------------------------------------------------------------------------------------

    def _run(self, trainer: L.Trainer, pl_module: L.LightningModule, baselines: tuple[Baseline, ...]) -> bool:
        """Evaluates; whether it was told to stop before its end."""
        _, module = parts(trainer, pl_module, self)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.pause()
        step, started = module.steps_done(), time.monotonic()
        ranks = Ranks.here()
        assert self.report is not None
        tell = partial(_tell, step=step, metrics=headlines(self.tasks))
        lengths = self.lengths[:1] if trainer.fast_dev_run else self.lengths  # type: ignore[attr-defined]
        guard = _guard(trainer)
        evaluator = Evaluator(
            self.tasks, lengths, self.report.k, self.budget_s, self._judge, ranks, tell,
            stop=lambda: guard is not None and guard.told,
        )  # fmt: skip
        publish = partial(self._publish, trainer, evaluator, step, started)
        try:
            with whole(module), undisturbed(trainer, module):
                evaluator.run(self._methods(trainer, module, baselines, ranks))
        except Exception:  # raised on all ranks, whichever failed
            ranks.together(publish)
            raise
        else:
            ranks.together(publish)  # all wait for the first one: who leaves before it may end it
        finally:
            ranks.close()
            gc.collect()
            if module.device.type == "cuda":
                torch.cuda.empty_cache()
        return evaluator.stopped

    def _methods(
        self, trainer: L.Trainer, module: MemorySparseModule, baselines: tuple[Baseline, ...], ranks: Ranks
    ) -> dict[str, Callable[[], Method]]:
        data, _ = parts(trainer, module, self)
        protocol = data.protocol
        answers = any(task.answers for task in self.tasks)
        shares = layer_shares(read_recall(Path(trainer.default_root_dir) / RECALL, module.net.routed_layers))

        def untouched() -> MemorySparseModel:
            return module.untrained().to(module.device).eval().requires_grad_(False)

        def reader(beyond: bool = False) -> Backbone | None:
            if not answers or ranks.rank > 0:
                return None
            return Backbone(untouched().backbone, protocol, self.ask.max_new_tokens, beyond=beyond)

        makers: dict[str, Callable[[], Method]] = {
            ROUTER: lambda: Routed(ROUTER, module.net, protocol, self.ask, shares, self.keys, ranks),
            "untrained": lambda: Routed("untrained router", untouched(), protocol, self.ask, None, self.keys, ranks),
            "bm25": lambda: Retrieving(BM25Retriever(), reader(), self.ask.documents, ranks),
            "dense": lambda: Retrieving(self._dense(str(module.device)), reader(), self.ask.documents, ranks),
            "full_attention": lambda: FullAttention(reader(), ranks),
            "full_attention_beyond": lambda: FullAttention(reader(True), ranks, "full attention beyond"),
        }
        return {name: makers[name] for name in (*([ROUTER] if self.router else []), *baselines)}

    def _dense(self, device: str) -> Retriever:
        from datamodules.dense import DenseRetriever  # its package is optional

        return DenseRetriever(self.dense_model, device)

    def _settings(self) -> dict[str, Any]:
        about = {task.name: dict(task.about()) for task in self.tasks}
        for name, tasks in means(self.tasks).items():
            about[name] = {"mean of": ", ".join(task.name for task in tasks)}
        settings = {**asdict(self.ask), "keys": self.keys, "budget_s": self.budget_s, "tasks": about}
        if "dense" in self.baselines:
            settings["dense_model"] = self.dense_model
        if self._judge is not None:
            settings["judge"] = self._judge.spent.told()
        return settings

    # --- telling ------------------------------------------------------------------------------------------------

    def _publish(self, trainer: L.Trainer, evaluator: Evaluator, step: int, started: float) -> None:
        """Tells and keeps what was measured, on the first rank; what was cut short gives way to what has more."""
        if not trainer.is_global_zero:
            return
        assert self.report is not None
        seconds, metrics = time.monotonic() - started, headlines(self.tasks)
        evaluation = Evaluation(step, seconds, self._settings(), evaluator.rows, metrics, cut=not evaluator.whole)
        earlier = next((one for one in self.report.evaluations if one.name == evaluation.name), None)
        keep = earlier is not None and (not earlier.cut or earlier.measured > evaluation.measured)
        if evaluation.cut and (keep or not evaluator.records):
            return
        # the progress bar's own: what is printed beside it would be overwritten
        say = partial(get_console().print, soft_wrap=True, highlight=False)
        if self._judge is not None:
            say(self._judge.spent.told())
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.report = self.report.with_evaluation(evaluation)
        folder = Path(trainer.default_root_dir)
        curves, depths = self._write(folder, evaluation)
        with (folder / _answers(evaluation)).open("w", encoding="utf-8") as handle:
            for record in evaluator.records:
                handle.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                board = logger.experiment
                for name, value in _scalars(evaluation).items():
                    board.add_scalar(f"extrapolation/{name}", value, step)
                board.add_figure("extrapolation/curve", curves, step)
                board.add_figure("extrapolation/depth", depths, step)
                board.add_text("extrapolation/report", self.report.markdown(evaluation), step)
        for what, place in (("curves", CURVES), ("depths", DEPTHS), ("tables", TABLES), ("numbers", FILE)):
            say(f"{what:<12}{folder / place}")

    def _write(self, folder: Path, evaluation: Evaluation) -> tuple[Figure, Figure]:
        """Writes the report, with tables and figures of one evaluation; returns the figures."""
        assert self.report is not None
        self.report.save(folder, evaluation)
        curves, depths = draw_curves(self.report, evaluation), draw_depths(self.report, evaluation)
        curves.savefig(folder / CURVES, dpi=120)
        depths.savefig(folder / DEPTHS, dpi=120)
        return curves, depths


def _answers(evaluation: Evaluation) -> str:
    return f"answers-{evaluation.name}.jsonl"


def _guard(trainer: L.Trainer) -> Guard | None:
    return next((one for one in trainer.callbacks if isinstance(one, Guard)), None)  # type: ignore[attr-defined]


def _tell(row: Row, step: int, metrics: Mapping[str, str]) -> None:
    """One line per cell, as it is done."""
    name = f"{row.task:<20} {row.method:<18} {label(row.length):>6}"
    if row.scores:
        metric = metrics[row.task]
        told = f"{metric} {row.scores[metric].told()}  {row.seconds:.1f} s"
    else:
        told = row.note
    get_console().print(f"step {step:<7,} {name}  {told}", soft_wrap=True, highlight=False, markup=False)


def _scalars(evaluation: Evaluation) -> dict[str, float]:
    """What TensorBoard gets: of the model by task, of the baselines beside them."""
    values = {}
    for row in evaluation.rows:
        task = row.task if row.method == ROUTER else f"{row.task}/{row.method.replace(' ', '_')}"
        if row.scores:
            values[f"{task}/{label(row.length)}"] = row.scores[evaluation.metrics[row.task]].value
        if "gold_recall" in row.scores:
            values[f"{task}/gold_recall/{label(row.length)}"] = row.scores["gold_recall"].value
    for task in evaluation.metrics:
        lost = evaluation.lost(task, ROUTER)
        if lost is not None:
            values[f"{task}/lost_percent"] = lost
    return values
