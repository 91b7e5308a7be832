"""BM25: its scores by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from datamodules import lexical
from datamodules.lexical import BM25Retriever, LexicalIndex, Words


def by_hand(count: int, length: int, mean: float, having: int, texts: int) -> float:
    """Lucene's BM25 of one word in one text, with k1 1.5 and b 0.75."""
    rarity = math.log(1 + (texts - having + 0.5) / (having + 0.5))
    return rarity * count / (1.5 * (0.25 + 0.75 * length / mean) + count)


@pytest.mark.parametrize("make", [LexicalIndex, BM25Retriever().index])
def test_scores_are_bm25_by_hand(make: Any) -> None:
    # stop words and words of one letter are none: 2, 3 and 1 words are left, 2 on average
    scores = make(["the heron of a river", "Heron, otter, heron!", "lynx"]).scores("heron lynx of otter heron")
    heron = [by_hand(1, 2, 2, 2, 3), by_hand(2, 3, 2, 2, 3), 0]
    lynx, otter = by_hand(1, 1, 2, 1, 3), by_hand(1, 3, 2, 1, 3)
    assert scores == pytest.approx([2 * heron[0], 2 * heron[1] + otter, lynx], rel=1e-6)


@pytest.mark.parametrize("make", [LexicalIndex, BM25Retriever().index])
@pytest.mark.parametrize("texts", [[], ["the of a", ""], ["heron", "otter"]])
def test_where_no_word_is_shared_all_score_0_and_come_in_order(make: Any, texts: list[str]) -> None:
    index = make(texts)
    assert index.scores("What of the lynx?").tolist() == [0.0] * len(texts)
    assert index.best("", 5) == list(range(len(texts)))


def test_what_came_before_changes_no_score() -> None:
    retriever = BM25Retriever()
    earlier = retriever.index(["the heron of a river", "kestrel, crane"])
    before = earlier.scores("heron crane").tolist()
    texts = ["Heron, otter, heron!", "lynx", "the heron of a river", "lynx", ""]
    for question in ("heron lynx", "otter", "kestrel", "of"):
        assert retriever.index(texts).scores(question).tolist() == LexicalIndex(texts).scores(question).tolist()
    assert earlier.scores("heron crane").tolist() == before


def test_a_text_is_split_once_and_what_was_longest_unused_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    split: list[str] = []
    original = lexical.split
    monkeypatch.setattr(lexical, "split", lambda texts: split.extend(texts) or original(texts))
    words = Words(kept=3)
    words.of(["heron", "otter", "lynx", "heron"])
    assert split == ["heron", "otter", "lynx"]
    words.of(["heron", "crane"])  # otter was used before lynx, and is forgotten
    split.clear()
    assert [len(one) for one in words.of(["lynx", "heron", "crane"]).ids] == [1, 1, 1] and split == []
    words.of(["otter"])
    assert split == ["otter"]
