"""Retraced: passages in a stream, of which the first may have been encoded already.

An encoding that was broken off goes on with the same stream from its beginning; what was encoded then is passed over
if it is the same, passage for passage. The invariant: passages come out in their order, whatever was passed over.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from msa_train.memory.segment import Passage


class Retraced:
    """Numbered passages, with a digest of those that went by.

    Args:
        numbered: Numbers and passages.
    """

    def __init__(self, numbered: Iterable[tuple[int, Passage]]) -> None:
        self._further = iter(numbered)
        self._back: deque[tuple[int, Passage]] = deque()
        self._digests: deque[bytes] = deque()

    def __iter__(self) -> Iterator[tuple[int, Passage]]:
        return self

    def __next__(self) -> tuple[int, Passage]:
        number, passage = self._back.popleft() if self._back else next(self._further)
        self._digests.append(_digest(passage))
        return number, passage

    def digest(self, count: int) -> str:
        """Digest of the `count` passages that went by first since it was asked for last."""
        return hashlib.sha256(b"".join(self._digests.popleft() for _ in range(count))).hexdigest()

    def skip(self, count: int, digest: str) -> bool:
        """Passes over the next `count` passages if this is their digest; leaves them where they are if not.

        Args:
            count: Passages.
            digest: What `digest` said of them.
        """
        taken = list(islice(self, count))
        if len(taken) == count and self.digest(count) == digest:
            return True
        self._back.extendleft(reversed(taken))
        self._digests.clear()
        return False


def _digest(passage: Passage) -> bytes:
    digest = hashlib.sha256(repr((passage.id, passage.source, passage.text)).encode())
    digest.update(np.asarray(passage.tokens, dtype=np.int64).tobytes())
    return digest.digest()
