"""Cutting is blind to needles and loses nothing: against a flat text that is made in the slowest way."""

from __future__ import annotations

import re
from itertools import chain, cycle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.tasks.cutting import CutText, Inserted
from msa_train.evaluation.prompts import piece

SEPARATORS = (" ", "\n")


class Words:
    """A tokenizer of words and line breaks."""

    def texts(self, texts: list[str]) -> list[list[int]]:
        return [[len(word) for word in re.findall(r"\S+|\n", text)] for text in texts]

    def text(self, text: str) -> list[int]:
        return self.texts([text])[0]


class Spaced(Words):
    """One that has a token for a space before the first word, so that the first document is shorter."""

    def texts(self, texts: list[str]) -> list[list[int]]:
        return [[len(word) for word in re.findall(r"^ |\S+|\n", text)] for text in texts]


def cut(sentences: list[str], separator: str, limit: int, protocol: Any = Words()) -> CutText:
    return CutText("t", cycle(sentences), separator, limit, protocol)


def documents(text: CutText, inserted: Inserted) -> list[str]:
    return [text.text(inserted, number) for number in range(1, inserted.last + 1)]


def test_documents_are_filled_with_whole_sentences() -> None:
    text = cut(["a b c.", "d e.", "f g h i.", "j."], " ", limit=6)
    text.grow(units=21)
    assert [document.text for document in text.documents][:4] == [
        "a b c. d e.",
        "f g h i. j.",
        "a b c. d e.",
        "f g h i. j.",
    ]
    assert text.begins[:3] == [0, 5, 10] and text.sentences[:5] == [0, 3, 5, 9, 10]


def test_a_sentence_that_is_too_long_is_cut_between_words_and_a_word_never() -> None:
    text = cut(["a b c d e f g.", "h."], " ", limit=3)
    text.grow(units=9)
    assert [document.text for document in text.documents][:4] == ["a b c", "d e f", "g. h.", "a b c"]
    assert text.sentences[:3] == [0, 7, 8], "its parts begin no sentence"
    lines = cut(["a line of words", "another"], "\n", limit=2)
    lines.grow(units=4)
    assert [document.text for document in lines.documents][:3] == ["a line of words", "another", "a line of words"]


def test_a_needle_at_a_boundary_goes_to_the_following_document_and_at_the_end_to_the_last() -> None:
    text = cut(["a b.", "c d."], " ", limit=4)
    text.grow(units=20)
    inside = text.insert(10, [(0, "N0"), (4, "N4"), (10, "N10")])
    assert documents(text, inside) == ["N0 a b. c d.", "N4 a b. c d.", "a b. N10"]
    assert (inside.whole, inside.last, inside.holders) == (2, 3, (1, 2, 3))
    ending = text.insert(8, [(8, "N8")])
    assert documents(text, ending) == ["a b. c d.", "a b. c d. N8"]
    assert (ending.whole, ending.last, ending.holders, sorted(ending.changed)) == (2, 2, (2,), [2])
    assert text.insert(8, [(1, "N1")]).changed == {1: "a N1 b. c d."}, "nothing is cut short here"


def test_needles_before_the_same_word_keep_their_order() -> None:
    text = cut(["a b."], " ", limit=4)
    text.grow(units=4)
    assert documents(text, text.insert(3, [(2, "N1"), (2, "N2"), (3, "N3")])) == ["a b. N1 N2 a N3"]


sentences = st.lists(st.integers(1, 9), min_size=1, max_size=7).map(
    lambda sizes: [" ".join(f"w{place}{n}" for n in range(size)) + "." for place, size in enumerate(sizes)]
)


@settings(max_examples=150, deadline=None)
@given(sentences, st.sampled_from(SEPARATORS), st.integers(1, 12), st.data())
def test_documents_are_the_flat_text(some: list[str], separator: str, limit: int, data: st.DataObject) -> None:
    text = cut(some, separator, limit)
    units = data.draw(st.integers(1, 60), label="units")
    places = sorted(data.draw(st.lists(st.integers(0, units), max_size=5), label="places"))
    needles = [(place, f"NEEDLE {number} !") for number, place in enumerate(places)]
    text.grow(units=units)
    inserted = text.insert(units, needles)

    atoms = list(chain.from_iterable(sentence.split(separator) for sentence in some * 61))[:units]
    flat = []  # the slow reference: walk over the units
    for place in range(units + 1):
        flat += [needle for where, needle in needles if where == place]
        flat += atoms[place : place + 1]
    assert separator.join(documents(text, inserted)) == separator.join(flat)

    for (_, needle), holder in zip(needles, inserted.holders, strict=True):
        assert [needle in document for document in documents(text, inserted)].count(True) == 1
        assert needle in text.text(inserted, holder)
    assert set(inserted.changed) - {inserted.last} <= set(inserted.holders)
    assert list(inserted.changed) == sorted(inserted.changed)
    for number, document in enumerate(documents(text, inserted), start=1):
        blind = re.sub(r"NEEDLE \d+ !\s?", "", document).strip()
        whole = text.documents[number - 1].text
        assert blind == whole if number <= inserted.whole else whole.startswith(blind), "boundaries know no needle"


@settings(max_examples=100, deadline=None)
@given(sentences, st.sampled_from(SEPARATORS), st.integers(1, 12), st.integers(1, 60))
def test_documents_are_as_full_as_sentences_allow(some: list[str], separator: str, limit: int, units: int) -> None:
    text = cut(some, separator, limit)
    text.grow(units=units)
    protocol, begins = Words(), set(text.sentences)
    sizes = [len(protocol.text(piece(document.text, separator, False, False))) for document in text.documents]
    for number, size in enumerate(sizes[:-1]):
        one_unit = text.begins[number + 1] - text.begins[number] == 1
        assert size <= limit or one_unit
        following = text.documents[number + 1].text.split(separator)
        end = next(
            n for n in range(1, len(following) + 1) if text.begins[number + 1] + n in begins or n == len(following)
        )
        more = len(protocol.text(piece(separator.join(following[:end]), separator, False, False)))
        assert size + more > limit, "the next sentence would not have fitted"


@settings(max_examples=100, deadline=None)
@given(sentences, st.sampled_from(SEPARATORS), st.integers(1, 12), st.integers(1, 60), st.data())
def test_tokens_are_counted_as_the_flat_prompt_has_them(
    some: list[str], separator: str, limit: int, units: int, data: st.DataObject
) -> None:
    text = cut(some, separator, limit, Spaced())
    text.grow(units=units)
    places = sorted(data.draw(st.lists(st.integers(0, units), max_size=4)))
    inserted = text.insert(units, [(place, "a needle here") for place in places])
    found = documents(text, inserted)
    pieces = [piece(one, separator, n == 0, n == len(found) - 1) for n, one in enumerate(found)]
    assert "".join(pieces) == separator.join(found) + "\n"
    assert text.tokens(inserted) == sum(map(len, Spaced().texts(pieces)))


@pytest.mark.parametrize("separator", SEPARATORS)
def test_no_more_is_cut_than_was_asked_for(separator: str) -> None:
    read = []

    def counted() -> Any:
        for number in range(10**9):
            read.append(number)
            yield f"sentence number {number} of many"

    protocol: Any = Words()
    text = CutText("t", counted(), separator, 10, protocol)
    assert not read
    text.grow(units=5)
    once = len(read)
    assert 0 < once < 1000
    text.grow(tokens=40)
    assert len(read) == once, "there is enough already"
    assert text.within(40) == next(n for n, tokens in enumerate(text.flat) if tokens >= 40)
