"""BM25 by bm25s, with its own tokenizer and defaults: the baseline, and a miner of negatives."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msa_train.evaluation.retrieval import best_places

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s starts jax where that is installed, which takes a GPU's memory
import bm25s
from bm25s.tokenization import Tokenized


class Words:
    """The words of texts, which are remembered, since memories share most of their texts.

    Args:
        kept: Texts that are remembered, in host memory; the longest unused go first. One of 512 tokens takes about
            4 KiB, itself included.
    """

    def __init__(self, kept: int = 1 << 17) -> None:
        self.kept = kept
        self._words: dict[str, list[str]] = {}  # of texts, in the order of their last use

    def of(self, texts: Sequence[str]) -> Tokenized:
        """Words of every text, numbered in the order in which they come."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._words]
        if missing:
            for text, words in zip(missing, split(missing), strict=True):
                self._words[text] = [sys.intern(word) for word in words]  # one of each word, not one of each place
        number: dict[str, int] = {}
        found = [[number.setdefault(word, len(number)) for word in self._words[text]] for text in texts]
        for text in dict.fromkeys(texts):
            self._words[text] = self._words.pop(text)
        for text in list(self._words)[: max(len(self._words) - self.kept, 0)]:
            del self._words[text]
        return Tokenized(found, number)


class LexicalIndex:
    """Scores texts against a query.

    Args:
        texts: The texts. None at all, or nothing but stop words, scores 0 everywhere.
        words: Knows the words of texts that came before; new ones are remembered.
    """

    def __init__(self, texts: Sequence[str], words: Words | None = None) -> None:
        self.size = len(texts)
        tokens = (words or Words(0)).of(texts)
        self.index = None
        if any(tokens.ids):
            self.index = bm25s.BM25()
            self.index.index(tokens, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """One score per text."""
        (words,) = split([query])
        if self.index is None or not words:
            return np.zeros(self.size, np.float32)
        return self.index.get_scores(words)

    def best(self, question: str, k: int) -> list[int]:
        """Places of the k best texts, best first; equal ones in the order of their places."""
        return best_places(self.scores(question), k)


class BM25Retriever:
    """Ranks texts by BM25."""

    name = "BM25"

    def __init__(self) -> None:
        self._words = Words()

    def index(self, texts: Sequence[str]) -> LexicalIndex:
        """An index of these texts."""
        return LexicalIndex(texts, self._words)


def split(texts: Sequence[str]) -> list[list[str]]:
    """Words of every text: two letters at least, in lower case, without English stop words."""
    return bm25s.tokenize(list(texts), return_ids=False, show_progress=False)
