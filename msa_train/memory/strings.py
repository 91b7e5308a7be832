"""Strings: texts end to end as bytes, so that a memory map holds them and only those that are asked for are read.

Shapes: D texts, B bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msa_train.errors import UserError


class Strings:
    """Texts.

    >>> words = Strings.of(["fox", "", "héron"])
    >>> len(words), words[2], words.bytes_B.numel()
    (3, 'héron', 9)

    Args:
        bytes_B: UTF-8, uint8.
        offsets_D: Where each text begins, D + 1 values, int64.
        file: Where they come from, which an error names.
    """

    def __init__(self, bytes_B: Tensor, offsets_D: Tensor, file: str = "") -> None:
        self.bytes_B, self.offsets_D, self.file = bytes_B, offsets_D, file

    @staticmethod
    def of(texts: Sequence[str]) -> Strings:
        """Encodes texts."""
        encoded = [text.encode() for text in texts]
        joined = torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8)
        offsets_D = offsets_of(torch.tensor([len(one) for one in encoded], dtype=torch.int64))
        return Strings(joined[: int(offsets_D[-1])], offsets_D)

    @staticmethod
    def join(parts: Sequence[Strings]) -> Strings:
        """The texts of several, in order."""
        lengths = torch.cat([part.offsets_D.diff() for part in parts])
        return Strings(torch.cat([part.bytes_B for part in parts]), offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets_D) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> str:
        first, last = self.offsets_D[row : row + 2].tolist()
        try:
            return bytes(self.bytes_B[first:last].numpy()).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file}: damaged: a text in it is no UTF-8; encode the bank again") from error

    def slice(self, first: int, last: int) -> Strings:
        """Texts `first .. last - 1`, without a copy."""
        offsets = self.offsets_D[first : last + 1]
        return Strings(self.bytes_B[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0], self.file)

    def pick(self, keep_D: Tensor) -> Strings:
        """Those marked True."""
        lengths = self.offsets_D.diff()
        return Strings(self.bytes_B[keep_D.repeat_interleave(lengths)], offsets_of(lengths[keep_D]), self.file)


def offsets_of(lengths: Tensor) -> Tensor:
    """Where each of consecutive runs begins, and where the last ends.

    >>> offsets_of(torch.tensor([2, 0, 3]))
    tensor([0, 2, 2, 5])
    """
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
