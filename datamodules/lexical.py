"""BM25 by bm25s, with its own tokenizer and defaults: the baseline, and a miner of negatives."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msa_train.evaluation.retrieval import best_places

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # bm25s starts jax where that is installed, which takes a GPU's memory
import bm25s


class LexicalIndex:
    """Scores texts against a query.

    Args:
        texts: The texts. None at all, or nothing but stop words, scores 0 everywhere.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.size = len(texts)
        tokens = bm25s.tokenize(list(texts), show_progress=False) if self.size else None
        self.index = None
        if tokens is not None and tokens.vocab:
            self.index = bm25s.BM25()
            self.index.index(tokens, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float32]:
        """One score per text."""
        words = bm25s.tokenize([query], show_progress=False, return_ids=False)[0]
        if self.index is None or not words:
            return np.zeros(self.size, np.float32)
        return self.index.get_scores(words)

    def best(self, question: str, k: int) -> list[int]:
        """Places of the k best texts, best first; equal ones in the order of their places."""
        return best_places(self.scores(question), k)


class BM25Retriever:
    """Ranks texts by BM25."""

    name = "BM25"

    def index(self, texts: Sequence[str]) -> LexicalIndex:
        """An index of these texts."""
        return LexicalIndex(texts)
