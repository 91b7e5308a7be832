"""Retriever: what a baseline ranks a memory's texts with.

The invariant: equal scores go to the lower place, and an index stays as it is, whatever is indexed later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Index(Protocol):
    """Texts that questions are held against."""

    def best(self, question: str, k: int) -> list[int]:
        """Places of the best texts, counted from 0.

        Args:
            question: What is asked.
            k: Texts at most; where there are fewer, all of them.

        Returns:
            Best first; equal ones in the order of their places.
        """
        ...


class Retriever(Protocol):
    """Makes an index of a memory's texts.

    Memories share most of their texts. A retriever may keep what it worked out about a text, as long as that is bounded
    in size and the scores are those that it would work out anew.
    """

    name: str
    """Names it in tables and TensorBoard."""

    def index(self, texts: Sequence[str]) -> Index:
        """An index of these texts."""
        ...


def best_places(scores: NDArray[np.floating], k: int) -> list[int]:
    """Places of the k best scores, best first; equal ones in the order of their places.

    >>> best_places(np.array([0.5, 2.0, -1.0, 2.0]), 3)
    [1, 3, 0]
    """
    return np.argsort(-scores, kind="stable")[:k].tolist()
