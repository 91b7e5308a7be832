"""A text without end, cut into documents as far as it is asked for, and what becomes of them when needles go in.

The cut is blind: where documents begin is fixed on the haystack alone, by greedy filling with whole sentences, before
anything is inserted; a document that gets a needle is longer by it, and all others are those of the haystack. So the
documents are the same for every sample and length. A text is counted in units, words or lines, which the separator
joins. The invariant: documents joined by the separator are the text with its needles, character for character.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from msa_train.evaluation.prompts import piece
from msa_train.memory import Passage
from msa_train.protocol import Protocol

BATCH = 512  # sentences tokenised at once, in parallel where the tokenizer can


@dataclass(frozen=True)
class Inserted:
    """A text of some length with needles in it.

    Args:
        whole: Documents 1 to `whole` have all their units of the haystack.
        last: Number of the last document: `whole`, or the next one, of which a part is there.
        changed: Words of the documents that are not the haystack's, by number: those with a needle or cut short.
        holders: The document of every needle.
    """

    whole: int
    last: int
    changed: dict[int, str]
    holders: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    """A sentence, or a part of one that is too long for a document."""

    text: str
    units: int
    tokens: int


class CutText:
    """Documents of a text, numbered from 1.

    Args:
        name: Begins the documents' names.
        sentences: The text, without end; units of a sentence are joined by the separator.
        separator: White space between two units.
        limit: Tokens of a document's sentences together. A longer sentence is cut between units; a unit is never cut.
        protocol: Tokenises.
    """

    def __init__(self, name: str, sentences: Iterator[str], separator: str, limit: int, protocol: Protocol) -> None:
        self.name, self.separator, self.limit, self.protocol = name, separator, limit, protocol
        self.documents: list[Passage] = []
        self.begins = [0]
        """First unit of every document, and of the one to come."""
        self.flat = [0]
        """Tokens of a flat prompt before every document, and before the one to come, were all in its midst."""
        self.sentences: list[int] = []
        """First unit of every sentence."""
        self._rest, self._read = sentences, 0
        self._taken: list[_Run] = []

    def grow(self, units: int = 0, tokens: int = 0) -> None:
        """Cuts until the documents have so many units, and a flat prompt of them so many tokens."""
        while self.begins[-1] < units or self.flat[-1] < tokens:
            self._cut()

    def within(self, tokens: int) -> int:
        """The fewest documents that have this many tokens in a flat prompt."""
        return bisect_left(self.flat, tokens)

    def insert(self, units: int, needles: Sequence[tuple[int, str]]) -> Inserted:
        """The first `units` units with needles in them.

        Args:
            units: How many; as many have been cut.
            needles: The unit before which each stands, ascending, and its words. One before the first unit of a
                document is that document's; one behind all units is the last document's.
        """
        assert 0 < units <= self.begins[-1]
        last = bisect_left(self.begins, units)
        holders = tuple(min(bisect_right(self.begins, place), last) for place, _ in needles)
        whole = last if self.begins[last] == units else last - 1
        changed = {}
        for number in sorted({*holders, whole + 1} if whole < last else {*holders}):
            begin = self.begins[number - 1]
            words = self.documents[number - 1].text.split(self.separator)[: units - begin]
            for (place, needle), holder in zip(reversed(needles), reversed(holders), strict=True):
                if holder == number:
                    words.insert(place - begin, needle)
            changed[number] = self.separator.join(words)
        return Inserted(whole, last, changed, holders)

    def tokens(self, inserted: Inserted) -> int:
        """Tokens that the documents have in a flat prompt."""
        alone = {1, inserted.last, *inserted.changed}
        pieces = [
            piece(self.text(inserted, number), self.separator, number == 1, number == inserted.last)
            for number in sorted(alone)
        ]
        unchanged = sum(self.flat[number] - self.flat[number - 1] for number in alone if number <= inserted.whole)
        return self.flat[inserted.whole] - unchanged + sum(map(len, self.protocol.texts(pieces)))

    def text(self, inserted: Inserted, number: int) -> str:
        """Words of a document."""
        return inserted.changed.get(number) or self.documents[number - 1].text

    def _cut(self) -> None:
        """Reads some sentences, and makes documents of those that are full."""
        texts, units = list[str](), list[int]()
        for run in self._runs(list(islice(self._rest, BATCH))):
            if self._taken and sum(taken.tokens for taken in self._taken) + run.tokens > self.limit:
                texts.append(self.separator.join(taken.text for taken in self._taken))
                units.append(sum(taken.units for taken in self._taken))
                self._taken = []
            self._taken.append(run)
        tokens = self.protocol.texts([f" {text}" for text in texts])
        flat = list(map(len, tokens)) if self.separator == " " else self._sizes(texts)
        for place, text in enumerate(texts):
            name = f"{self.name}/{len(self.documents) + 1}"
            self.documents.append(Passage(name, text, np.asarray(tokens[place], np.int32)))
            self.begins.append(self.begins[-1] + units[place])
            self.flat.append(self.flat[-1] + flat[place])

    def _runs(self, sentences: list[str]) -> Iterator[_Run]:
        for sentence, tokens in zip(sentences, self._sizes(sentences), strict=True):
            units = sentence.split(self.separator)
            self.sentences.append(self._read)
            self._read += len(units)
            if tokens <= self.limit:
                yield _Run(sentence, len(units), tokens)
            else:
                yield from self._parts(units)

    def _parts(self, units: list[str]) -> Iterator[_Run]:
        """A sentence that is too long, as parts of as many units as go into a document."""
        begin, held = 0, 0
        for place, size in enumerate(self._sizes(units)):
            if held and held + size > self.limit:
                yield _Run(self.separator.join(units[begin:place]), place - begin, held)
                begin, held = place, 0
            held += size
        yield _Run(self.separator.join(units[begin:]), len(units) - begin, held)

    def _sizes(self, texts: list[str]) -> list[int]:
        """Tokens of each in the midst of a flat prompt."""
        return [len(ids) for ids in self.protocol.texts([piece(text, self.separator, False, False) for text in texts])]
