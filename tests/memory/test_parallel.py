"""A bank over ranks, against the whole bank in one process."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from msa_train.errors import UserError
from msa_train.memory import BankFolder, Encoder, MemoryBank, ParallelBank, encoding
from msa_train.model import MemorySparseModel
from msa_train.pack import Contexts
from msa_train.protocol import Protocol
from tests.memory.banks import HEADS, K, queries
from tests.memory.conftest import passages

QUESTIONS = ("Where does the red fox live?", "What of the ivory hare by river 79?", "teal?")
EXCLUDED = [[2, 9, 18], [], [4]]
# documents of every rank: uneven, none on a rank that serves, none on the one that asks
SHARES = {
    1: [[range(1, 20)]],
    2: [[range(1, 5), range(5, 20)], [range(1, 20), range(0)], [range(0), range(1, 20)]],
    3: [[range(15, 20), range(0), range(1, 15)]],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder, protocol: Protocol) -> Path:
    """A bank of which two documents were removed."""
    path = tmp_path_factory.mktemp("parallel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SEGMENT_BYTES", 6000)
        bank = encoder.bank(passages(protocol, range(19)))
    bank.remove(["d2", "d12"])
    BankFolder(path).save(bank)
    return path


def meet(rank: int, ranks: int, place: Path) -> None:
    # short, so that a rank that is left waiting fails the test
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=ranks, timeout=patience)


def consulted(model: MemorySparseModel, protocol: Protocol, bank: MemoryBank | ParallelBank) -> torch.Tensor:
    layout = Contexts.build(protocol.head(), [protocol.asking(protocol.text(words)) for words in QUESTIONS])
    with torch.no_grad():
        return model.consult(layout, bank.layers(EXCLUDED))[0]


def raised(act: Callable[[], object]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return "nothing"


def everything(model: MemorySparseModel, protocol: Protocol, bank: MemoryBank | ParallelBank) -> dict[str, Any]:
    """All that can be asked of a bank."""
    whole = MemoryBank(bank.shape)
    query_LXR, offsets_Q = queries(whole)
    weights = [1.0, 3.0]
    found = {"len": len(bank), "in": [number in bank for number in range(25)]}
    for layer, query_XR in enumerate(query_LXR):
        for k in (3, 30):
            found[f"search {layer} {k}"] = bank.search(layer, query_XR, offsets_Q, HEADS, k, EXCLUDED)
        for numbers in ([19, 1, 8, 5], [8], []):
            found[f"read {layer} {numbers}"] = bank.read(layer, numbers)
    for among in (None, [5, 19, 1, 8, 11], [8, 8, 1], []):
        found[f"rank {among}"] = bank.rank(query_LXR, offsets_Q, weights, HEADS, K, EXCLUDED, among)
    found["ids"] = [bank.id(number) for number in (1, 8, 19)]
    found["texts"] = [bank.text(number) for number in (1, 8, 19)]
    found["hidden"] = consulted(model, protocol, bank)
    for number in (3, 13, 0, 99):
        found[f"unknown {number}"] = [
            raised(lambda number=number: bank.id(number)),
            raised(lambda number=number: bank.text(number)),
            raised(lambda number=number: bank.read(0, [1, number])),
            raised(lambda number=number: bank.rank(query_LXR, offsets_Q, weights, HEADS, K, None, [1, number])),
        ]
    found["weights"] = raised(lambda: bank.rank(query_LXR, offsets_Q, [0.0, 0.0], HEADS, K))
    return found


def ask_everything(rank: int, ranks: int, folder: Path, place: Path, model: MemorySparseModel, words: Protocol) -> None:
    torch.set_num_threads(1)
    meet(rank, ranks, place)
    answers = []
    for shares in SHARES[ranks]:
        share = BankFolder(folder).open().only(shares[rank])
        if rank == 0:
            with ParallelBank(share) as bank:
                answers.append(everything(model, words, bank))
        else:
            ParallelBank(share).serve()
    if rank == 0:
        torch.save(answers, place.with_suffix(".answers"))
    dist.barrier()
    dist.destroy_process_group()


def flat(answer: Any) -> list[Any]:
    if hasattr(answer, "number_QK"):
        return [answer.number_QK, answer.score_QK]
    return [part for one in answer for part in flat(one)] if isinstance(answer, list | tuple) else [answer]


@pytest.mark.parametrize("ranks", SHARES)
def test_a_bank_over_ranks_answers_as_the_whole_one(
    model: MemorySparseModel, protocol: Protocol, folder: Path, tmp_path: Path, ranks: int
) -> None:
    place = tmp_path / "meet"
    mp.spawn(ask_everything, args=(ranks, folder, place, model, protocol), nprocs=ranks)
    answers = torch.load(place.with_suffix(".answers"), weights_only=False)  # of this test's own making
    wanted = everything(model, protocol, BankFolder(folder).open())
    assert len(answers) == len(SHARES[ranks])
    for found in answers:
        assert_same_everything(found, wanted)


def assert_same_everything(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys() and found["len"] == 17 and found["in"][3] is False
    assert found["unknown 3"] == ["the bank has no document with the number 3"] * 4
    assert "layer weights" in found["weights"]
    seen = 0
    for name in wanted:
        left, right = flat(found[name]), flat(wanted[name])
        assert len(left) == len(right) > 0, name
        for one, other in zip(left, right, strict=True):
            if isinstance(other, torch.Tensor):
                assert one.dtype == other.dtype and one.shape == other.shape, name
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
                seen += one.numel()
            else:
                assert one == other, name
    assert seen > 1000


def ask_and_fail(share: MemoryBank, bank: MemoryBank) -> None:
    query_LXR, offsets_Q = queries(bank)
    with ParallelBank(share) as parallel:
        with pytest.raises(UserError, match="segment-1: damaged"):
            parallel.text(19)
        with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*damaged.*out of memory"):
            parallel.text(18)
        with pytest.raises(UserError, match="no document with the number 99"):
            parallel.read(0, [1, 99])
        with pytest.raises(RuntimeError, match=r"(?s)rank 0: .*IndexError"):
            parallel.search(7, query_LXR[0], offsets_Q, HEADS, K)
        assert parallel.text(17) == bank.text(17)
        raise ZeroDivisionError


def fail_while_asking(rank: int, folder: Path, place: Path) -> None:
    """The asker's own mistake, a failure on another rank alone, a fault of ours there, and an end in between."""
    meet(rank, 2, place)
    bank = BankFolder(folder).open()
    share = bank.share(rank, 2)
    if rank == 1:
        honest = share.text

        def damaged(number: int) -> str:
            if number == 19:
                raise UserError("segment-1: damaged")
            if number == 18:
                raise RuntimeError("out of memory")
            return honest(number)

        share.text = damaged  # type: ignore[method-assign]
        ParallelBank(share).serve()
    else:
        with pytest.raises(ZeroDivisionError):
            ask_and_fail(share, bank)
        place.with_suffix(".done").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_whatever_fails_no_rank_is_left_waiting(folder: Path, tmp_path: Path) -> None:
    mp.spawn(fail_while_asking, args=(folder, tmp_path / "meet"), nprocs=2)
    assert (tmp_path / "meet.done").exists()


def ask_within_a_group(rank: int, folder: Path, place: Path) -> None:
    """Ranks 1 and 2 of three share a bank; 2 is not in the first group's place."""
    meet(rank, 3, place)
    group = dist.new_group([1, 2])
    if rank > 0:
        bank = BankFolder(folder).open()
        share = bank.share(rank - 1, 2)
        if rank == 1:
            with ParallelBank(share, group) as parallel:
                assert len(parallel) == len(bank) > len(share) > 0
                assert [parallel.id(number) for number in bank.numbers()] == [bank.id(n) for n in bank.numbers()]
            place.with_suffix(".done").touch()
        else:
            ParallelBank(share, group).serve()
    dist.barrier()
    dist.destroy_process_group()


def test_a_group_of_some_ranks_shares_a_bank(folder: Path, tmp_path: Path) -> None:
    mp.spawn(ask_within_a_group, args=(folder, tmp_path / "meet"), nprocs=3)
    assert (tmp_path / "meet.done").exists()
