"""NeedleTask: RULER's needle-in-a-haystack tasks for a memory of documents.

A sample is one flat text first, haystack and needles, exactly as long as RULER's rule allows; then it is documents,
cut blind to the needles (cutting.py). The invariants: documents joined by the separator are the flat text; the flat
prompt and room for the answer are never longer than the length asked for; and a sample is a pure function of
(seed, task, length, sample), so shards and subsets agree.
"""

from __future__ import annotations

import importlib.metadata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, repeat
from random import Random
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np

from datamodules.tasks.cutting import CutText, Inserted
from datamodules.tasks.haystacks import prose_of, shipped_prose
from datamodules.tasks.ruler import ANSWER_TOKENS, DEPTHS, NOISE, SETTINGS, Drawn, Half, Name, draw, lines
from msa_train.errors import UserError
from msa_train.evaluation.prompts import flat_prompt
from msa_train.evaluation.scores import containment
from msa_train.evaluation.task import Asked, Task, Trial
from msa_train.memory import Passage
from msa_train.protocol import Protocol
from msa_train.source import PackSource

AnswerPrefix = Literal["ruler", "none"]
SHORT = 4096  # RULER drops fewer lines below this length
# What tokenizers have cut, by the pool's name: five tasks have one haystack, which only grows.
_CUT: WeakKeyDictionary[Protocol, dict[str, CutText]] = WeakKeyDictionary()


@dataclass(frozen=True)
class _Sample:
    """What was drawn for a sample, and the haystack that it lies in."""

    name: str
    number: int
    drawn: Drawn
    lead: str
    text: CutText
    frame: int  # tokens of the flat prompt without its documents
    places: int  # seeds the places

    def lay(self, units: int) -> Inserted:
        """The sample in this many units of haystack."""
        return self.text.insert(units, list(zip(self._places(units), self.drawn.needles, strict=True)))

    def tokens(self, laid: Inserted) -> int:
        """Tokens of the flat prompt."""
        return self.frame + self.text.tokens(laid)

    def _places(self, units: int) -> list[int]:
        """The units before which the needles stand, ascending; equal seeds draw equal depths for any length."""
        random, count = Random(self.places), len(self.drawn.needles)
        if self.text.separator == "\n":
            return sorted(random.sample(range(units), count))
        sentences = bisect_left(self.text.sentences, units)
        chosen = [sentences * depth // 100 for depth in sorted(random.sample(DEPTHS, count))]
        return [self.text.sentences[place] if place < sentences else units for place in chosen]


class NeedleTask(Task):
    """Needles in a haystack, as RULER defines them (docs/evaluation.md says where this differs).

    Args:
        task: One of RULER's eight: niah_single_1, niah_single_2, niah_single_3, niah_multikey_1, niah_multikey_2,
            niah_multikey_3, niah_multivalue, niah_multiquery.
        samples: Memories per length; fewer are the first of more.
        document_tokens: Tokens of a document before a needle is put into it.
        haystack_path: A text file in the place of the shipped addresses, read whole by the tasks that hide needles in
            prose.
        half: The half of the shipped addresses and of the words: one is for evaluation, the other to train on.
        answer_prefix: `ruler` begins the answer with RULER's words, `none` does not. Results of the two are not
            comparable.
        seed: Of all that is drawn.

    Raises:
        UserError: An argument has no such value.
    """

    metric = "accuracy"
    group = "niah"
    answers = True

    def __init__(
        self,
        task: Name,
        samples: int = 100,
        document_tokens: int = 512,
        haystack_path: str | None = None,
        half: Half = "evaluation",
        answer_prefix: AnswerPrefix = "ruler",
        seed: int = 42,
    ) -> None:
        choices: list[tuple[str, Any, Any]] = [
            ("task", task, Name), ("half", half, Half), ("answer_prefix", answer_prefix, AnswerPrefix),
        ]  # fmt: skip
        for field, value, known in choices:
            if value not in get_args(known):
                raise UserError(f"{field} is '{value}': give one of {', '.join(get_args(known))}")
        for field, count in (("samples", samples), ("document_tokens", document_tokens)):
            if count < 1:
                raise UserError(f"{field} is {count}: give at least 1")
        if haystack_path is not None and half != "evaluation":
            raise UserError(f"half is '{half}', of the shipped text: leave it out where haystack_path is given")
        self.name: str = task
        self.setting = SETTINGS[task]
        self.samples, self.document_tokens, self.seed = samples, document_tokens, seed
        self.haystack_path, self.half, self.answer_prefix = haystack_path, half, answer_prefix
        self.separator = " " if self.setting.haystack == "essay" else "\n"

    def open(self, protocol: Protocol, data: PackSource | None = None) -> None:
        """Reads the haystack; the run's data is not asked for."""
        self._protocol = protocol
        sentences: Iterator[str] = repeat(NOISE)
        self._haystack = "noise"
        if self.setting.haystack == "essay":
            prose = shipped_prose(self.half) if self.haystack_path is None else prose_of(self.haystack_path)
            self._haystack, sentences = f"essay-{prose.digest}", cycle(prose.sentences)
        elif self.setting.haystack == "needle":
            self._haystack = f"{self.name}-{self.half}-{self.seed}"
            sentences = lines(self.setting, Random(self._haystack), self.half)
        cut = _CUT.setdefault(protocol, {})
        if self.pool_name not in cut:
            cut[self.pool_name] = CutText(self.pool_name, sentences, self.separator, self.document_tokens, protocol)
        self._text = cut[self.pool_name]

    def reach(self) -> None:
        """None: haystacks have no end."""

    @property
    def pool_name(self) -> str:
        """The same for tasks with the same haystack."""
        return f"{self._haystack}-{self.document_tokens}"

    def pool(self, length: int) -> Sequence[Passage]:
        """The haystack's documents."""
        self._text.grow(tokens=length)
        return self._text.documents[: self._text.within(length)]

    def trials(self, length: int) -> Iterator[Trial]:
        """One memory per sample, with one question."""
        first = self._sample(length, 0)
        units = self._largest(first, length)
        for number in range(self.samples):
            yield self._trial(self._sample(length, number) if number else first, length, units)

    def score(self, asked: Asked, answer: str) -> dict[str, float]:
        """Share of the right values that occur in the answer."""
        return {"accuracy": containment(answer, asked.answers)}

    def about(self) -> dict[str, str]:
        """What results must be recorded with to be comparable."""
        essay = self.setting.haystack == "essay"
        text = "public-domain" if self.haystack_path is None else "other"
        return {
            "definition": f"NIAH (RULER definition, {text} haystack)",
            "haystack": self.pool_name if essay else self.setting.haystack,
            "document_tokens": str(self.document_tokens),
            "answer_prefix": self.answer_prefix,
            "seed": str(self.seed),
            "tokenizer": self._protocol.fingerprint(),
            "wonderwords": importlib.metadata.version("wonderwords"),
        }

    # --- a sample -----------------------------------------------------------------------------------------------

    def _sample(self, length: int, number: int) -> _Sample:
        random = Random(f"{self.seed}/{self.name}/{length}/{number}")
        drawn = draw(self.setting, random, self.half)
        lead = drawn.lead if self.answer_prefix == "ruler" else ""
        frame = flat_prompt(self._protocol, drawn.preamble, [], self.separator, drawn.question, lead)
        name, places = f"{self.name}/{length}/{number}", random.getrandbits(64)
        return _Sample(name, number, drawn, lead, self._text, len(frame), places)

    def _largest(self, sample: _Sample, length: int) -> int:
        """The most units of haystack that a sample has room for."""
        room = length - ANSWER_TOKENS
        self._text.grow(units=1, tokens=length)
        low, high = 0, self._text.begins[-1]
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if sample.tokens(sample.lay(middle)) <= room else (low, middle - 1)
        if low == 0:
            needed = sample.tokens(sample.lay(1)) + ANSWER_TOKENS
            raise UserError(f"length {length}: {self.name} needs about {needed} tokens at least; give a longer one")
        return low

    def _trial(self, sample: _Sample, length: int, units: int) -> Trial:
        laid = self._fitting(sample, length, units)
        haystack, drawn = self._text.documents, sample.drawn
        own = {number: self._passage(f"{sample.name}/{number}", text) for number, text in laid.changed.items()}
        documents = [own.get(number) or haystack[number - 1] for number in range(1, laid.last + 1)]
        sizes = [len(document.tokens) for document in documents]
        holders = zip(laid.holders, drawn.wanted, strict=True)
        gold = tuple(sorted({number for number, wanted in holders if wanted}))
        depth = sum(sizes[: gold[0] - 1]) / sum(sizes)
        asked = Asked(f"{sample.number}", drawn.question, gold, drawn.answers, depth, sample.lead, drawn.preamble)
        assert laid.whole <= self._text.within(length)
        return Trial(laid.whole, own, (asked,), sum(sizes))

    def _fitting(self, sample: _Sample, length: int, units: int) -> Inserted:
        """A sample in this many units of haystack, or in as many steps fewer as it takes to fit."""
        step = 500 if self.setting.haystack == "essay" else 25 if length >= SHORT else 5
        self._text.grow(units=units)
        laid = sample.lay(units)
        while sample.tokens(laid) > length - ANSWER_TOKENS:
            if units == 1:
                raise UserError(
                    f"length {length}: {self.name} does not fit (sample {sample.number}); give a longer one"
                )
            units -= min(step, units // 2)
            laid = sample.lay(units)
        return laid

    def _passage(self, name: str, text: str) -> Passage:
        return Passage(name, text, np.asarray(self._protocol.text(f" {text}"), np.int32))
