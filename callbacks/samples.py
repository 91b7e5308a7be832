"""Samples: what the model says, beside what it should have said, while it trains.

A few held-out questions are asked over the documents of their packs, encoded with the weights of the moment, as
`msa-train ask` would ask them of a bank. The invariant: text of documents, questions and answers is data. What is
written to TensorBoard shows its characters and obeys none of them, and the run goes on as if nobody had asked.
"""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.parts import packed_memory, parts, undisturbed, whole
from datamodules import PackedMemory
from datamodules.collection import Collection
from msa_train.commands import printable
from msa_train.errors import UserError
from msa_train.findings import Finding
from msa_train.generation import Answer, Answerer, AskConfig
from msa_train.memory import Encoder, Passage
from msa_train.module import MemorySparseModule
from msa_train.runs import layer_shares

FILE = "samples.jsonl"
SHOWN = 400  # characters of a question or an answer in the table; the file has all of them


@dataclass(frozen=True)
class Examination:
    """Questions over the documents of one pack.

    Args:
        documents: Rows of the documents, in the pack's order; document i has the number i + 1.
        queries: Rows of the queries, whose documents are all among them.
    """

    documents: list[int]
    queries: list[int]


class Samples(L.Callback):
    """Answers a few held-out questions at every validation and at the end.

    Question, expected answer, answer, and the documents retrieved, with their scores and whether they are right: as
    TensorBoard's text `samples/{split}`, and as `samples.jsonl` in the run's folder. The first rank asks, while the
    others wait; with ZeRO stage 3 it gets a copy of all weights for that time.

    Args:
        questions: Questions of every split; the same ones each time.
        ask: How they are answered. Few tokens by default, for training waits.
    """

    def __init__(self, questions: int = 4, ask: AskConfig = AskConfig(max_steps=2, max_new_tokens=32)) -> None:
        if questions < 1:
            raise UserError(f"Samples: questions is {questions}: give at least 1")
        self.questions, self.ask = questions, ask
        self.chosen: dict[str, list[Examination]] = {}
        self.asked_at = -1
        self.continued = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Chooses the questions."""
        self.examine(parts(trainer, pl_module, self)[0])

    def examine(self, data: Any) -> list[Finding]:
        """What the doctor says of it.

        Raises:
            UserError: The data is of another class than datamodules.PackedMemory, or there is nothing to ask.
        """
        data = packed_memory(data, self)
        if not data.val_splits:
            raise UserError("Samples needs a split in data.val_splits")
        if data.data is not None:  # the doctor may come here with data that could not be opened
            self.chosen = {split: choose(data, split, self.questions) for split in data.val_splits}
        told = (
            f"{self.questions} questions of {', '.join(data.val_splits)}, answers of {self.ask.max_new_tokens} tokens"
        )
        return [Finding("run", "samples", told)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew."""
        self.continued = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._ask(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks, unless the last step was validated."""
        if self.asked_at != trainer.global_step:
            self._ask(trainer, pl_module)

    def _ask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.asked_at = trainer.global_step
        data, module = parts(trainer, pl_module, self)
        with whole(module, trainer.is_global_zero):
            if trainer.is_global_zero:
                self._ask_alone(trainer, data, module)

    def _ask_alone(self, trainer: L.Trainer, data: PackedMemory, module: MemorySparseModule) -> None:
        """Nothing in here may be waited for by another rank: they are not here."""
        step = self.asked_at
        with undisturbed(trainer, module):
            found = {split: self._answers(data, module, chosen) for split, chosen in self.chosen.items()}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for split, samples in found.items():
                    logger.experiment.add_text(f"samples/{split}", table(samples), step)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rows = [{"step": step, "split": split, **sample} for split in found for sample in found[split]]
            self._write(Path(trainer.default_root_dir) / FILE, step, rows)

    def _answers(
        self, data: PackedMemory, module: MemorySparseModule, chosen: Sequence[Examination]
    ) -> list[dict[str, Any]]:
        assert data.data is not None
        collection, recall = data.data, module.layer_recall
        encoder = Encoder(module.net, data.protocol, precision="float32")
        weights = layer_shares([recall[layer] for layer in module.net.routed_layers]) if recall else None
        samples = []
        for one in chosen:
            passages = [
                Passage(collection.document_id(row), collection.document_text(row), collection.document(row))
                for row in one.documents
            ]
            answerer = Answerer(module.net, data.protocol, encoder.bank(passages), weights, self.ask)
            answers = answerer.ask([collection.query(query, "text") for query in one.queries])
            samples += [
                _sample(collection, one.documents, query, answer)
                for query, answer in zip(one.queries, answers, strict=True)
            ]
        return samples

    def _write(self, file: Path, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Adds rows; the first ones take the place of what an interrupted run wrote from their step on."""
        if not self.continued and file.is_file():
            kept = [line for line in file.read_text(encoding="utf-8").splitlines() if _step(line) < step]
            file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.continued = True
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))


def choose(data: PackedMemory, split: str, questions: int) -> list[Examination]:
    """The first questions of a split that can be answered from their packs.

    Args:
        data: The data, set up.
        split: A validation split.
        questions: How many at most.

    Raises:
        UserError: There is none.
    """
    assert data.data is not None
    packer, chosen, room = data.packers[split], list[Examination](), questions
    for index in range(packer.packs_per_epoch):
        plan = packer.plan(index)
        inside = set(plan.documents)
        steps = {one.query: data.data.steps(one.query) for one in plan.asked}
        whole = [query for query in steps if steps[query] and all(inside.intersection(step) for step in steps[query])]
        if whole:
            chosen.append(Examination(plan.documents, whole[:room]))
            room -= len(chosen[-1].queries)
        if not room:
            break
    if not chosen:
        raise UserError(
            f"Samples: no pack of '{split}' holds all documents of a question: raise data.answer_share or "
            "data.document_tokens, or leave callbacks.Samples out"
        )
    return chosen


def table(samples: Sequence[dict[str, Any]]) -> str:
    """Samples as a Markdown table."""
    lines = ["| question | expected | answer | documents |", "|---|---|---|---|"]
    for sample in samples:
        documents = [f"{escape(one['id'])} {one['score']:.3f} {one['relevance']}" for one in sample["documents"]]
        cells = [
            escape(sample["question"]),
            "<br>".join(escape(answer) for answer in sample["expected"]),
            escape(sample["answer"]),
            "<br>".join(documents),
        ]
        lines.append("| " + " | ".join(cell or "(none)" for cell in cells) + " |")
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text as Markdown and HTML show it and obey none of it; cut where it is long.

    Every mark of ASCII becomes its number, so nothing in it can end a cell or begin a tag, a link or emphasis.

    >>> escape("a|b\\n<i>")
    'a&#124;b ⏎ &#60;i&#62;'
    """
    cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    shown = " ⏎ ".join(map(printable, cut.splitlines())).expandtabs(1)
    return "".join(f"&#{ord(letter)};" if letter in string.punctuation else letter for letter in shown)


def _sample(data: Collection, documents: Sequence[int], query: int, answer: Answer) -> dict[str, Any]:
    return {
        "query": data.query(query, "id"),
        "question": answer.question,
        "expected": list(data.query(query, "answers") or []),
        "answer": answer.text,
        "documents": [
            {
                "id": one.id,
                "score": one.score,
                "step": one.step,
                "relevance": relevance(data, query, documents[one.number - 1]),
            }
            for one in answer.documents
        ],
        "notes": list(answer.notes),
    }


def relevance(data: Collection, query: int, document: int) -> str:
    """`right`, `wrong`, or `related`: known to be relevant, but not what is asked for. Equal texts are one document.

    Args:
        data: The corpora.
        query: Row of the query.
        document: Row of the document.
    """
    text = int(data.digest_D[document])
    if any(int(data.digest_D[row]) == text for step in data.steps(query) for row in step):
        return "right"
    return "related" if any(int(data.digest_D[row]) == text for row in data.related(query)) else "wrong"


def _step(line: str) -> float:
    """The step of a row; of half a row, as a killed run may leave it, one that is never kept."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
