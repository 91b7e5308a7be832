"""Memory Parallel: a bank shared out over the ranks of a torch.distributed group (paper, section 3.4).

Every rank holds its share of the documents. The first one asks: it sends its queries to all, each searches its share,
and of what all found the best are kept; then the pooled keys and values of the selected documents come to the asker
from whoever holds them. The others serve until the asker is done. The invariant: answers are those of the whole bank on
one rank, since a document's score is its own and a candidate sorts alike wherever it was found; and every rank takes
part in every exchange, whatever fails on it, so that none waits for one that left.

Shapes: as in bank.py.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.errors import UserError
from msa_train.memory.bank import MemoryBank, unknown
from msa_train.memory.layer import BankLayer
from msa_train.search import Found, candidates


@dataclass(frozen=True)
class _Failure:
    """What went wrong on a rank.

    Args:
        text: The user's mistake, or a traceback.
        mistake: Whether it is one.
    """

    text: str
    mistake: bool


class ParallelBank:
    """A bank over ranks, with the face of a `MemoryBank` on the first of them.

    Every rank makes one, together. The first asks inside a `with`; the others call `serve`, and wait for a question as
    long as the group's timeout lets them.

        with ParallelBank(share) as bank: Answerer(model, protocol, bank).ask(...)     on the first rank
        ParallelBank(share).serve()                                                    on the others

    Several can be asked side by side: each has its place among them, and the others `serve_all` of them.

    Args:
        bank: This rank's share (`MemoryBank.share`, or what this rank encoded): no document is in two of them.
        group: The ranks; all of them by default.
        place: Its place among the banks that are served together.
    """

    def __init__(self, bank: MemoryBank, group: dist.ProcessGroup | None = None, place: int = 0) -> None:
        self.bank, self.group, self.shape, self.place = bank, group, bank.shape, place
        self.asker = 0 if group is None else dist.get_global_rank(group, 0)
        sizes: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(sizes, len(bank), group)
        self._documents = sum(sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(None)

    def serve(self) -> None:
        """Searches and reads for the asker until it is done."""
        serve_all([self])

    def __len__(self) -> int:
        return self._documents

    def __contains__(self, number: int) -> bool:
        return any(self._everywhere("holds", number))

    def id(self, number: int) -> str:
        """Name of the document with this number."""
        return self._one("id", number)

    def text(self, number: int) -> str:
        """Words of the document with this number."""
        return self._one("text", number)

    def layers(self, excluded: Sequence[Sequence[int]] | None = None) -> list[BankLayer]:
        """The bank as every routed layer sees it; see `MemoryBank.layers`."""
        return [BankLayer(self, layer, excluded) for layer in range(len(self.shape.layers))]

    def search(
        self,
        layer: int,
        query_XR: Tensor,
        offsets_Q: Tensor,
        heads: int,
        k: int,
        excluded: Sequence[Sequence[int]] | None = None,
    ) -> Found:
        """The k best documents of all ranks in one layer; see `MemoryBank.search`."""
        return self._best(k, "search", layer, query_XR.cpu(), offsets_Q.cpu(), heads, k, excluded)

    def rank(
        self,
        query_LXR: Sequence[Tensor],
        offsets_Q: Tensor,
        weights: Sequence[float],
        heads: int,
        k: int,
        excluded: Sequence[Sequence[int]] | None = None,
        among: Sequence[int] | None = None,
    ) -> Found:
        """The k best documents of all ranks over layers; see `MemoryBank.rank`."""
        for number in among or []:
            if number not in self:
                raise unknown(number)
        queries = [query_XR.cpu() for query_XR in query_LXR]
        return self._best(k, "rank", queries, offsets_Q.cpu(), weights, heads, k, excluded, among)

    def read(self, layer: int, numbers: Sequence[int]) -> tuple[list[int], Tensor, Tensor]:
        """Pooled keys and values of documents, wherever they are; see `MemoryBank.read`."""
        where: dict[int, tuple[Tensor, Tensor]] = {}
        for held, counts, key_CGW, value_CGW in self._everywhere("read", layer, list(numbers)):
            where.update(zip(held, zip(key_CGW.split(counts), value_CGW.split(counts), strict=True), strict=True))
        for number in numbers:
            if number not in where:
                raise unknown(number)
        nothing = torch.empty(0, self.shape.groups, self.shape.width, dtype=self.shape.torch_dtype)
        key_CGW = torch.cat([nothing, *(where[number][0] for number in numbers)])
        value_CGW = torch.cat([nothing, *(where[number][1] for number in numbers)])
        device = self.bank.device
        return [len(where[number][0]) for number in numbers], key_CGW.to(device), value_CGW.to(device)

    # --- on every rank ------------------------------------------------------------------------------------------

    def _holds(self, number: int) -> bool:
        return number in self.bank

    def _id(self, number: int) -> str | None:
        return self.bank.id(number) if number in self.bank else None

    def _text(self, number: int) -> str | None:
        return self.bank.text(number) if number in self.bank else None

    def _search(self, layer: int, query_XR: Tensor, offsets_Q: Tensor, *rest: Any) -> Found:
        device = self.bank.device
        return self.bank.search(layer, query_XR.to(device), offsets_Q.to(device), *rest).to("cpu")

    def _rank(
        self, queries: Sequence[Tensor], offsets_Q: Tensor, weights: Sequence[float], heads: int, k: int,
        excluded: Sequence[Sequence[int]] | None, among: Sequence[int] | None,
    ) -> Found:  # fmt: skip
        device = self.bank.device
        mine = None if among is None else [number for number in among if number in self.bank]
        query_LXR = [query_XR.to(device) for query_XR in queries]
        return self.bank.rank(query_LXR, offsets_Q.to(device), weights, heads, k, excluded, mine).to("cpu")

    def _read(self, layer: int, numbers: Sequence[int]) -> tuple[list[int], list[int], Tensor, Tensor]:
        held = [number for number in numbers if number in self.bank]
        counts, key_CGW, value_CGW = self.bank.read(layer, held)
        return held, counts, key_CGW.cpu(), value_CGW.cpu()

    # --- between ranks ------------------------------------------------------------------------------------------

    def _best(self, k: int, name: str, *arguments: Any) -> Found:
        founds = self._everywhere(name, *arguments)
        number_QK = torch.cat([found.number_QK for found in founds], 1)
        score_QK = torch.cat([found.score_QK for found in founds], 1)
        best_QK = candidates(score_QK, number_QK.clamp_min(1)).argsort(1, descending=True)[:, :k]
        return Found(number_QK.gather(1, best_QK), score_QK.gather(1, best_QK)).to(self.bank.device)

    def _one(self, name: str, number: int) -> str:
        for answer in self._everywhere(name, number):
            if answer is not None:
                return answer
        raise unknown(number)

    def _everywhere(self, name: str, *arguments: Any) -> list[Any]:
        """Has every rank do something; returns what each of them answers."""
        self._tell((self.place, name, arguments))
        return self._collect(name, arguments)

    def _tell(self, task: Any) -> Any:
        message = [task]  # pickled between the processes of one job; nothing of a bank's files is
        dist.broadcast_object_list(message, self.asker, self.group)
        return message[0]

    def _collect(self, name: str, arguments: tuple[Any, ...]) -> list[Any]:
        tasks: dict[str, Any] = {"holds": self._holds, "id": self._id, "text": self._text, "search": self._search,
                 "rank": self._rank, "read": self._read}  # fmt: skip
        answer: Any
        try:
            answer = tasks[name](*arguments)
        except Exception as error:
            mistake = isinstance(error, UserError)
            answer = _Failure(str(error) if mistake else traceback.format_exc(), mistake)
        asking = dist.get_rank() == self.asker
        answers: list[Any] = [None] * dist.get_world_size(self.group)
        dist.gather_object(answer, answers if asking else None, self.asker, self.group)
        for rank, found in enumerate(answers):
            if isinstance(found, _Failure):
                raise UserError(found.text) if found.mistake else RuntimeError(f"rank {rank}: {found.text}")
        return answers


def serve_all(banks: Sequence[ParallelBank]) -> None:
    """Searches and reads for the asker of any of these banks until one of them is done.

    Args:
        banks: All in their places, of one group.
    """
    assert [bank.place for bank in banks] == list(range(len(banks)))
    while (task := banks[0]._tell(None)) is not None:
        place, name, arguments = task
        banks[place]._collect(name, arguments)
