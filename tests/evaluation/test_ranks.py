"""An evaluation over ranks: the same rows and records as on one, and whatever fails where, no rank is left waiting."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from msa_train.errors import UserError
from msa_train.evaluation import ranks as ranks_module
from msa_train.evaluation.evaluate import Evaluator, Record, Row
from msa_train.evaluation.methods import Method, Reply, Routed
from msa_train.evaluation.ranks import Ranks
from msa_train.evaluation.task import Asked, Memory, Task, Trial
from msa_train.generation import AskConfig
from msa_train.memory import Passage
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from tests.evaluation.by_hand import Clock, HandTask, ToldMethod, pool, trial, untimed

# short, so that a rank that is left waiting fails the test
PATIENCE = datetime.timedelta(seconds=30)
ASK = AskConfig(documents=2, max_steps=2, max_new_tokens=5)


class OnFirst(ToldMethod):
    """A baseline: the first rank alone works."""

    def __init__(self, ranks: Ranks, **given: Any) -> None:
        super().__init__(lambda memory, asked: Reply(f"by river {len(memory.numbers)}", None), "first", **given)
        self.ranks = ranks

    def replies(self, memories: Sequence[Memory]) -> list[list[Any]]:
        return [] if self.ranks.rank else super().replies(memories)

    def rank(self, task: Task, memories: Sequence[Memory], k: int) -> list[list[list[int]]]:
        return [] if self.ranks.rank else [[memory.numbers[::-1]] * len(memory.trial.asked) for memory in memories]


def tasks(protocol: Protocol) -> list[HandTask]:
    """Pools of 1, 2 and 11 documents, so that a rank may have none of the pool, or of a trial's own, or of both."""
    listed = {
        10: [trial(protocol, 1, {3: 0})],
        20: [trial(protocol, 2, {}), trial(protocol, 2, {1: 3, 2: 4}), trial(protocol, 0, {1: 5})],
        40: [trial(protocol, 11, {9: 0, 3: 9, 1: 14}), trial(protocol, 7, {7: 12})],
    }
    plain = Asked("plain", "Which of them?", (2,), ("river 31",))
    listed[20][0] = replace(listed[20][0], asked=(plain,))
    return [HandTask(pool(protocol), listed), HandTask(pool(protocol), listed, "finding", answers=False)]


def evaluated(model: MemorySparseModel, protocol: Protocol, ranks: Ranks) -> tuple[list[Row], list[Record]]:
    methods = {
        "router": lambda: Routed("router", model, protocol, ASK, [1.0, 3.0], "float32", ranks),
        "first": lambda: OnFirst(ranks),
    }
    return Evaluator(tasks(protocol), (10, 20, 40), 3, 1e6, ranks=ranks, clock=Clock()).run(methods)


def plain(found: tuple[list[Row], list[Record]]) -> Any:
    return json.loads(json.dumps([[asdict(one) for one in part] for part in found]))


# --- on every rank -----------------------------------------------------------------------------------------------


def evaluate_on(rank: int, place: Path, model: MemorySparseModel, protocol: Protocol) -> None:
    """All three ranks, then two of them; then everything that can fail."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=3, timeout=PATIENCE)
    ranks_module.PATIENCE = PATIENCE
    ranks = Ranks.here()
    found = {"3": plain(evaluated(model, protocol, ranks))}
    two = dist.new_group([0, 1], timeout=PATIENCE)
    if rank < 2:
        pair = Ranks(rank, 2, two)
        found["2"] = plain(evaluated(model, protocol, pair))
        for name, act in failures(model, protocol, pair).items():
            try:
                found[name] = ["nothing", plain(act())]
            except Exception as error:
                found[name] = [type(error).__name__, str(error)]
            found[name].append(pair.told(f"{name}?"))  # the next that both say to each other is the same
    ranks.close()
    place.with_suffix(f".{rank}").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


class Failing(HandTask):
    """Fails where it is told to.

    Args:
        where: Of its methods.
        error: What is raised there.
        length: From this length on.
    """

    def __init__(self, protocol: Protocol, where: str = "", error: Exception | None = None, length: int = 0) -> None:
        super().__init__(pool(protocol), tasks(protocol)[0].listed, "failing")
        self.where, self.error, self.length = where, error, length

    def fail(self, where: str, length: int = 1 << 30) -> None:
        if where == self.where and length >= self.length and self.error is not None:
            raise self.error

    def reach(self) -> int | None:
        self.fail("reach")
        return super().reach()

    def pool(self, length: int) -> Sequence[Passage]:
        self.fail("pool", length)
        return super().pool(length)

    def trials(self, length: int) -> Iterator[Trial]:
        self.fail("trials", length)
        yield from super().trials(length)
        self.fail("last trial", length)

    def score(self, asked: Asked, answer: str) -> dict[str, float]:
        self.fail("score")
        return super().score(asked, answer)


Found = tuple[list[Row], list[Record]]


def failures(model: MemorySparseModel, protocol: Protocol, ranks: Ranks) -> dict[str, Callable[[], Found]]:
    """Evaluations in which one rank fails or refuses, by what and on which."""

    def routed() -> Routed:
        return Routed("router", model, protocol, ASK, keys="float32", ranks=ranks)

    def run(task: Task, make: Callable[[], Method] = routed, **given: Any) -> Found:
        return Evaluator([task], (10, 20, 40), 3, 1e6, ranks=ranks, clock=Clock(), **given).run({"": make})

    def raising(error: Exception) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise error

        return fail

    def broken(part: str, rank: int, error: Exception) -> Callable[[], Method]:
        def make() -> Method:
            method = OnFirst(ranks) if part == "answer" else routed()
            if ranks.rank == rank:
                owner, name = (method, "replies") if isinstance(method, OnFirst) else (method.encoder, part)
                setattr(owner, name, raising(error))
            return method

        return make

    def searching(rank: int, error: Exception) -> Callable[[], Method]:
        def make() -> Method:
            method = routed()
            honest = method._overlaid

            def overlaid(*given: Any) -> Any:
                banks = honest(*given)
                if ranks.rank == rank:
                    banks[0].search = raising(error)  # type: ignore[method-assign]
                return banks

            method._overlaid = overlaid  # type: ignore[method-assign]
            return method

        return make

    def full_once(rank: int) -> Callable[[], Method]:
        """The card has no room when the pool first grows."""

        def make() -> Method:
            method = routed()
            honest = method.encoder.encode

            def encode(numbered: Any, *given: Any) -> Any:
                numbered = list(numbered)
                if ranks.rank == rank and bool(method.pools) and not tried:
                    tried.append(numbered)
                    raise memory
                return honest(numbered, *given)

            tried: list[Any] = []
            method.encoder.encode = encode  # type: ignore[method-assign]
            return method

        return make

    class Judge:
        grade = staticmethod(raising(ZeroDivisionError("a fault")))

    mistake, fault = UserError("lengths: a mistake"), ZeroDivisionError("a fault")
    memory = torch.OutOfMemoryError("CUDA out of memory")
    acts: dict[str, Callable[[], Found]] = {}
    for where in ("reach", "pool", "trials", "last trial"):
        for rank in (0, 1):
            error = mistake if where == "trials" else fault
            task = Failing(protocol, where, error if ranks.rank == rank else None, 20 if rank else 0)
            acts[f"{where} {rank}"] = lambda task=task: run(task)
    whole = Failing(protocol)
    for rank in (0, 1):
        for name, error in (("make", fault), ("room to make", memory)):
            made = raising(error) if ranks.rank == rank else routed
            acts[f"{name} {rank}"] = lambda make=made: run(whole, make)
        for name, part, error in (
            ("encode", "encode", mistake), ("apart", "apart", fault), ("room for its own", "apart", memory),
        ):  # fmt: skip
            acts[f"{name} {rank}"] = lambda part=part, rank=rank, error=error: run(whole, broken(part, rank, error))
        acts[f"room once {rank}"] = lambda rank=rank: run(whole, full_once(rank))
        acts[f"search {rank}"] = lambda rank=rank: run(whole, searching(rank, fault))
    acts["answer 0"] = lambda: run(whole, broken("answer", 0, fault))
    acts["score 0"] = lambda: run(Failing(protocol, "score", fault if ranks.rank == 0 else None))
    acts["judge 0"] = lambda: run(whole, judge=Judge() if ranks.rank == 0 else None)
    acts["tell 0"] = lambda: run(whole, tell=raising(fault))
    acts["nothing"] = lambda: run(whole)
    return acts


# --- what they found ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(
    model: MemorySparseModel, protocol: Protocol, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Of every rank."""
    place = tmp_path_factory.mktemp("ranks") / "meet"
    mp.spawn(evaluate_on, args=(place, model, protocol), nprocs=3)
    return [json.loads(place.with_suffix(f".{rank}").read_text()) for rank in range(3)]


@pytest.mark.parametrize("world", ["2", "3"])
def test_ranks_give_the_rows_and_records_of_one(
    world: str, found: list[dict[str, Any]], model: MemorySparseModel, protocol: Protocol
) -> None:
    rows, records = evaluated(model, protocol, Ranks())
    assert found[0][world] == plain(([untimed(row) for row in rows], records))
    assert len(rows) == 12 and len(records) == 2 * 2 * (1 + 4 + 4) and all(row.scores for row in rows)
    assert [found[rank][world] for rank in range(1, int(world))] == [[[], []]] * (int(world) - 1)
    assert len({record.answer for record in records if record.method == "router"}) > 5


REFUSED = ("trials", "encode", "room to make", "room for its own", "room once")


def test_whatever_fails_on_one_rank_is_raised_on_all(found: list[dict[str, Any]]) -> None:
    names = [name for name in found[0] if name not in ("2", "3", "nothing") and not name.startswith(REFUSED)]
    assert len(names) == 16 and found[0].keys() == found[1].keys()
    for name in names:
        for kind, text, told in (found[0][name], found[1][name]):
            assert kind in ("ZeroDivisionError", "RuntimeError") and "a fault" in text, (name, kind, text)
            assert told == f"{name}?", "and they still speak of the same"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_refuses_costs_its_cell_on_all(rank: int, found: list[dict[str, Any]]) -> None:
    mistake, full = "lengths: a mistake", "does not fit on the card"
    notes = {
        "trials": ["", mistake, mistake] if rank else [mistake] * 3, "encode": [mistake] * 3,
        "room to make": [full] * 3, "room for its own": [full if rank else "", full, full],
        "room once": ["", full, ""],
    }  # fmt: skip
    assert set(notes) == set(REFUSED)
    _, (whole, _), _ = found[0]["nothing"]
    for name, told in notes.items():
        (kind, (rows, records), said), other = (found[place][f"{name} {rank}"] for place in (0, 1))
        assert (kind, [row["note"] for row in rows]) == ("nothing", told), name
        assert bool(records) == ("" in told) and other == ["nothing", [[], []], said], name
        for row, alone in zip(rows, whole, strict=True):
            assert row["note"] or row == alone, "a pool that one rank could not finish is begun anew by both"


def test_ranks_that_failed_together_can_go_on(found: list[dict[str, Any]]) -> None:
    kind, (rows, _), told = found[0]["nothing"]
    assert kind == "nothing" and [bool(row["scores"]) for row in rows] == [True] * 3
    assert found[1]["nothing"] == ["nothing", [[], []], told] and told == "nothing?"
