"""Shares of a pack add up to the pack: its tensors, its losses and gradients, its runs, whatever is recomputed."""

from __future__ import annotations

import csv
import datetime
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

import msa_train.model as model_file
from datamodules import PackedMemory
from msa_train import cli
from msa_train.errors import UserError
from msa_train.losses import global_mean, routing_loss
from msa_train.operations import PackSizes
from msa_train.pack import Contexts, Documents, MemoryPack, Shares
from msa_train.sharing import cuts, gather, share
from tests.conftest import HEAD, newest, tiny_context, tiny_model, tiny_pack, tokens
from tests.test_jobs import examine
from tests.test_training import losses, start

Arguments = Callable[..., list[str]]


def same(one: Any, other: Any) -> bool:
    """Whether all fields are equal, in values, shapes and dtypes."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return one == other


# --- what each rank holds ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data())
def test_every_document_and_context_is_in_one_share_as_if_it_were_built_of_it(data: st.DataObject) -> None:
    ranks, dealt = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    lengths = data.draw(st.lists(st.integers(1, 19), min_size=ranks, max_size=9))
    asked = data.draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=6))
    marks = st.lists(st.sampled_from("+x-"), min_size=len(lengths), max_size=len(lengths))
    rows = [data.draw(marks) for _ in asked]
    pack = replace(
        tiny_pack(lengths, asked, chunk_size=4),
        positive_QD=torch.tensor([[mark == "+" for mark in row] for row in rows]),
        excluded_QD=torch.tensor([[mark == "x" for mark in row] for row in rows]),
        query_steps=tuple(range(len(asked))),
        asked=sum("+" in row for row in rows),
        step_labels=1000,
        step_queries=77,
        index=5,
    )
    texts = [tokens(length, number) for number, length in enumerate(lengths)]
    contexts = [tiny_context(*sizes, 100 + number) for number, sizes in enumerate(asked)]
    shares = [share(pack, rank, ranks, dealt) for rank in range(ranks)]
    document, query = 0, 0
    for rank, one in enumerate(shares):
        held = len(one.documents.lengths)
        assert held and same(one.documents, Documents.build(texts[document : document + held], 4))
        document += held
        assert one.shares is not None and one.shares.rank == rank
        assert same(one.chunks, pack.documents.chunks) and one.document_ids == pack.document_ids
        assert one.shares.chunk_counts == tuple(len(part.documents.chunk_offsets_C) - 1 for part in shares)
        assert (one.shares.tokens, one.shares.queries) == (pack.tokens, len(asked))
        assert (one.index, one.step_labels, one.step_queries) == (5, 1000, 77)
        number = one.queries
        if query == len(asked):  # nothing is left: it repeats, and says nothing
            query -= number
            assert number == 1 and one.asked == len(one.contexts.label_index_N) == int(one.positive_QD.sum()) == 0
            wanted = Contexts.build(HEAD, contexts[query:])
            assert torch.equal(one.contexts.tokens_A, wanted.tokens_A)
        else:
            wanted = Contexts.build(HEAD, contexts[query : query + number])
            assert same(one.contexts, wanted)
            assert torch.equal(one.positive_QD, pack.positive_QD[query : query + number])
            assert one.asked == sum("+" in row for row in rows[query : query + number])
        assert torch.equal(one.excluded_QD, pack.excluded_QD[query : query + number])
        assert one.query_ids == pack.query_ids[query : query + number]
        assert one.query_steps == pack.query_steps[query : query + number]
        query += number
    assert document == len(lengths) and query == len(asked)
    assert sum(one.asked for one in shares) == pack.asked
    if not dealt:
        assert shares[0].queries == len(asked)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.data())
def test_runs_differ_by_no_more_than_the_longest_of_a_row(lengths: list[int], data: st.DataObject) -> None:
    runs = data.draw(st.integers(1, len(lengths)))
    found = cuts(lengths, runs)
    assert found[0] == 0 and found[-1] == len(lengths) and len(found) == runs + 1
    sums = [sum(lengths[first:last]) for first, last in zip(found, found[1:], strict=False)]
    assert min(sums) > 0 and max(sums) <= sum(lengths) / runs + max(lengths)


def test_a_share_travels_as_bytes_and_arrives_whole() -> None:
    one = share(tiny_pack(), 1, 2)
    there = pickle.loads(bytes(ForkingPickler.dumps(one)))  # noqa: S301
    assert same(one, there) and isinstance(there.shares, Shares)
    moved = one.to("meta")
    assert moved.shares is not None and moved.shares.chunks.offsets_D.is_meta


def test_shares_of_another_pack_are_refused() -> None:
    one = share(tiny_pack(), 1, 2)
    with pytest.raises(ValueError, match=r"the shares have \(.*\) of 11 chunks, but rank 1 has"):
        replace(one, documents=tiny_pack().documents)


def test_operations_of_all_shares_are_those_of_the_pack() -> None:
    """But for the head, which every rank reads."""
    pack = tiny_pack()
    whole = PackSizes.of(pack, 4, 2)
    parts = [PackSizes.of(share(pack, rank, 3), 4, 2) for rank in range(3)]
    for name in ("documents", "chunks", "routing", "labels"):
        assert sum(getattr(part, name) for part in parts) == getattr(whole, name) > 0, name
    assert sum(part.routing * (part.chunks + part.others) for part in parts) == whole.routing * whole.chunks
    assert sum(part.chunk_pairs for part in parts) == pytest.approx(whole.chunk_pairs)
    assert sum(part.contexts for part in parts) == whole.contexts + 2 * len(HEAD)


# --- the gather --------------------------------------------------------------------------------------------------


def meet(rank: int, ranks: int, place: Path) -> None:
    torch.set_num_threads(1)
    # short, so that a rank that is left waiting fails the test
    patience = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=ranks, timeout=patience)


def leave() -> None:
    dist.barrier()
    dist.destroy_process_group()


COUNTS = (2, 5, 1)  # chunks of each rank


def rows_of(rank: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    shapes, dtypes = ((2, 3), (2, 3), (7,)), (torch.bfloat16, torch.float32, torch.float32)
    return [
        torch.randn(count, *shape, generator=generator).to(kind) for shape, kind in zip(shapes, dtypes, strict=True)
    ]


def weights_of(rank: int, whole: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a rank's loss multiplies the gathered rows with; halves, so that bfloat16 adds them up exactly."""
    generator = torch.Generator().manual_seed(50 + rank)
    return [torch.randint(-4, 5, rows.shape, generator=generator) / 2 for rows in whole]


def gather_on(rank: int, place: Path) -> None:
    meet(rank, len(COUNTS), place)
    shares = Shares(tiny_pack().documents.chunks, COUNTS, rank, 0, 0)
    whole = [torch.cat(rows) for rows in zip(*(rows_of(*one) for one in enumerate(COUNTS)), strict=True)]
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    everyone = [weights_of(other, whole) for other in range(len(COUNTS))]
    for trained in ((True, True, True), (False, False, True)):
        own = [rows.requires_grad_(want) for rows, want in zip(rows_of(rank, COUNTS[rank]), trained, strict=True)]
        found = gather(shares, *own)
        for rows, wanted, want in zip(found, whole, trained, strict=True):
            assert rows.dtype == wanted.dtype and torch.equal(rows, wanted) and rows.requires_grad == want
        sum((rows * weight).sum() for rows, weight in zip(found, everyone[rank], strict=True)).backward()
        for number, (rows, want) in enumerate(zip(own, trained, strict=True)):
            if want:
                wanted = torch.stack([weights[number][mine] for weights in everyone]).sum(0)
                assert rows.grad is not None and torch.equal(rows.grad, wanted.to(rows.dtype)) and wanted.any()
            else:
                assert rows.grad is None
    place.with_suffix(f".{rank}").touch()
    leave()


def test_gathered_rows_are_exact_and_gradients_add_up(tmp_path: Path) -> None:
    mp.spawn(gather_on, args=(tmp_path / "meet",), nprocs=len(COUNTS))
    assert all((tmp_path / f"meet.{rank}").exists() for rank in range(len(COUNTS)))


# --- losses and gradients ----------------------------------------------------------------------------------------


def packs() -> dict[str, MemoryPack]:
    plain = tiny_pack()
    excluded = torch.zeros_like(plain.positive_QD)
    excluded[0, [1, 4]], excluded[1, 3], excluded[2] = True, True, True  # the last is an instruction
    positive = plain.positive_QD.clone()
    positive[2] = False
    two = [tokens(n, 9) for n in (6, 9)]
    tied = Documents.build([two[0], two[1], two[0], two[1], two[0]], 4)
    return {
        "three queries": plain,
        "one query": tiny_pack(contexts=((5, 4),)),
        "excluded": replace(plain, excluded_QD=excluded, positive_QD=positive, asked=2, step_queries=2),
        "tied": replace(plain, documents=tied),
    }


WAYS = ("none", "layers", "documents")
CASES = [
    *((name, recompute, "all") for name in ("three queries", "one query") for recompute in WAYS),
    ("excluded", "none", "all"), ("excluded", "documents", "all"), ("tied", "layers", "all"),
    ("three queries", "none", "routers"), ("one query", "layers", "routers"), ("three queries", "documents", "routers"),
]  # fmt: skip


def trained(case: tuple[str, Any, str], rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Loss, gradients as DDP averages them, scores and selections."""
    name, recompute, trainable = case
    model = tiny_model(recompute=recompute).train()
    for _, weight in model.backbone_parameters():
        weight.requires_grad_(trainable == "all")
    pack = packs()[name]
    pack = pack if ranks == 1 else share(pack, rank, ranks)
    output = model(pack)
    assert output.hidden_AM.requires_grad == (trainable == "all"), "no graph runs through a frozen backbone"
    lm = global_mean(model.label_loss(output, pack.contexts), pack.step_labels, ranks, 1)
    per_query = routing_loss(output.doc_score_LQD, pack.positive_QD)
    routing = global_mean(per_query.mean(0).sum(), pack.step_queries, ranks, 1)
    (lm + 0.5 * routing).backward()
    found = {"lm": lm.detach(), "routing": routing.detach()}
    found |= {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    for value in found.values() if ranks > 1 else ():
        dist.all_reduce(value)
        value /= ranks
    return {**found, "scores": output.doc_score_LQD.detach(), "selected": output.selected_LQK}


def train_on(rank: int, place: Path) -> None:
    meet(rank, 2, place)
    model_file.PART_TOKENS = 14
    torch.save([trained(case, rank, 2) for case in CASES], place.with_suffix(f".{rank}"))
    leave()


def test_two_ranks_have_the_loss_and_every_gradient_of_the_whole_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "PART_TOKENS", 14)
    mp.spawn(train_on, args=(tmp_path / "meet",), nprocs=2)
    both = [torch.load(tmp_path / f"meet.{rank}", weights_only=True) for rank in (0, 1)]
    for case, first, second in zip(CASES, *both, strict=True):
        whole = trained(case)
        assert whole.keys() == first.keys() == second.keys()
        assert sum("router" in name for name in whole) == 4 and (len(whole) == 8) == (case[2] == "routers"), case
        for name, wanted in whole.items():
            queries = slice(None, wanted.shape[1]) if name in ("scores", "selected") else None
            if queries is None:
                assert torch.equal(first[name], second[name])
                torch.testing.assert_close(first[name], wanted, atol=2e-6, rtol=2e-5, msg=lambda m, n=name: f"{n} {m}")
                assert wanted.any() or name == "lm"
            else:  # a context that is repeated comes last
                found = torch.cat([first[name], second[name]], 1)[:, queries]
                if name == "selected" and case[0] == "tied":  # the last bit may tell equal documents apart
                    found, wanted = found % 2, wanted % 2
                torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_whose_ranks_share_packs_is_the_run_of_whole_packs(
    ranks: int, tiny_run: Arguments, tmp_path: Path
) -> None:
    """Two ranks share each pack: 2 ranks are one, and 4 ranks two accumulated packs."""
    shared = {
        "trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 6 * ranks // 2, "data.val_packs": 3,
        "trainer.callbacks": json.dumps([{"class_path": "callbacks.Throughput"}]),
    }  # fmt: skip
    ways = {
        "shares": {"trainer.devices": ranks, "trainer.strategy": "ddp", "data.document_parallel": 2,
                   "trainer.val_check_interval": 6},
        "packs": {"trainer.accumulate_grad_batches": ranks // 2},
    }  # fmt: skip
    said = {}
    for name, flags in ways.items():
        done = start(tiny_run(tmp_path, steps=6, name=name, **{**shared, **flags}), OMP_WAIT_POLICY="passive")
        assert done.returncode == 0, done.stderr[-2000:]
        said[name] = done.stdout
    assert "packs an epoch, 2 ranks to a pack" in said["shares"] and "to a pack" not in said["packs"]
    with (tmp_path / "shares" / "metrics.csv").open() as handle:
        logged = next(csv.reader(handle))
    evaluated = [column for column in logged if column.endswith("/test")]
    assert {"loss/lm/test", "loss/routing/test"} < {*evaluated}
    assert {f"routing/{name}/test" for name in ("recall@1", "ndcg", "margin", "entropy", "hubness", "diversity")} < {
        *evaluated
    }
    training = ("loss/total", "loss/lm", "loss/routing", "train/grad_norm", "train/recall@1")
    for column in (*training, *evaluated):
        found, wanted = (
            torch.tensor([float(value) for value in losses(tmp_path / name, column).values()]) for name in ways
        )
        assert len(found) == (1 if column in evaluated else 6), column
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, c=column: f"{c} {m}")
    states = [newest(tmp_path / name)["state_dict"] for name in ways]
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=1e-3, atol=1e-4)
    if ranks == 2:  # what is in a pack does not depend on who reads it
        for what in ("queries", "tokens"):
            found, wanted = (
                torch.tensor([float(value) for value in losses(tmp_path / name, f"speed/{what}_per_s").values()])
                / torch.tensor([float(value) for value in losses(tmp_path / name, "speed/packs_per_s").values()])
                for name in ways
            )
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_ranks_that_cannot_be_shared_out_are_told_before_training(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = tiny_run(tmp_path, **{"data.document_parallel": 3, "trainer.accumulate_grad_batches": 3})
    for devices, said in ((1, "1 rank:"), (4, "4 ranks:")):
        code, words = examine([*three, f"--trainer.devices={devices}"], capsys)
        assert code == 1 and f"document_parallel is 3, which does not divide {said}" in words
    with pytest.raises(UserError, match=r"does not divide 1 rank: change it, or trainer\.devices"):
        cli.build(["fit", *three])
    with pytest.raises(UserError, match="data.document_parallel is 0: give at least 1"):
        PackedMemory(document_parallel=0)
    with pytest.raises(UserError, match="document_parallel is 6, but pack 0 has 5 documents: let fewer ranks"):
        share(tiny_pack(), 0, 6)


def test_the_doctor_counts_packs_that_ranks_share_once(
    tiny_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"data.document_parallel": 3, "trainer.devices": 6, "trainer.accumulate_grad_batches": 5}
    code, words = examine(tiny_run(tmp_path, **flags), capsys)
    assert code == 0 and " 10 packs: " in words and "3 ranks to a pack" in words, words
