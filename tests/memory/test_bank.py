"""A memory bank against a bank encoded anew, a loop over its documents, and a dict of what should be in it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from msa_train.decoding import begin
from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision
from msa_train.memory import BankFolder, Encoder, MemoryBank, Passage, Tiers, blocks, encoding
from msa_train.memory.segment import Segment
from msa_train.model import MemorySparseModel
from msa_train.pack import Contexts
from msa_train.protocol import Protocol
from tests.memory.banks import (
    HEADS,
    PRECISIONS,
    K,
    assert_same,
    assert_same_answers,
    assert_same_contents,
    assert_same_found,
    contents,
    encoded_anew,
    queries,
    slow_search,
)
from tests.memory.conftest import TEXTS, model_for, passages, protocol_with

Op = tuple[str, list[int]]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.fixture(scope="module")
def bank(encoder: Encoder, protocol: Protocol) -> MemoryBank:
    """Nineteen documents in several segments. Nobody changes it."""
    return cut_bank(encoder, passages(protocol, range(19)), 6000)


def cut_bank(encoder: Encoder, documents: list[Passage], segment_bytes: int) -> MemoryBank:
    """A bank of segments of at least so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "SEGMENT_BYTES", segment_bytes)
        return encoder.bank(documents)


def copy_of(bank: MemoryBank) -> MemoryBank:
    return MemoryBank(bank.shape, bank.segments, bank.device, bank.tiers, bank.next_number)


# --- changing it ------------------------------------------------------------------------------------------------------

a_few = st.lists(st.integers(0, 11), min_size=1, max_size=5, unique=True)
operations = st.lists(st.tuples(st.sampled_from(["add", "remove", "replace"]), a_few), min_size=1, max_size=7)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=operations)
def test_any_sequence_of_changes_gives_the_bank_that_is_encoded_anew(
    encoder: Encoder, protocol: Protocol, precision: Precision, ops: list[Op]
) -> None:
    """Against a dict from names to numbers and documents. The encoder's own precision is another one."""
    bank = MemoryBank(replace(encoder.shape, precision=precision))
    there: dict[str, tuple[int, Passage]] = {}
    given_numbers: list[int] = []
    for turn, (name, chosen) in enumerate(ops):
        documents = passages(protocol, chosen, changed=f" Again, {turn}." * turn)
        known = [document for document in documents if document.id in there]
        if name == "add":
            fresh = [document for document in documents if document.id not in there]
            encoder.add(bank, fresh)
            for document in fresh:
                number = len(given_numbers) + 1
                assert number not in given_numbers and bank.number(document.id) == number
                given_numbers.append(number)
                there[document.id] = (number, document)
        elif name == "remove":
            bank.remove(document.id for document in known)
            for document in known:
                del there[document.id]
        else:
            encoder.replace(bank, known)
            there.update({document.id: (there[document.id][0], document) for document in known})
    assert bank.next_number == len(given_numbers) + 1
    assert not any(bank.has(f"d{number}") for number in range(12) if f"d{number}" not in there)
    assert_same(bank, encoded_anew(encoder, there.values(), precision))


def test_a_number_is_never_given_again(encoder: Encoder, protocol: Protocol) -> None:
    bank = encoder.bank(passages(protocol, range(3)))
    bank.remove(["d2", "d1"])
    encoder.add(bank, passages(protocol, [2]))
    assert bank.numbers() == [1, 4] and bank.number("d2") == 4
    bank.remove(["d0", "d2"])
    encoder.add(bank, passages(protocol, [0]))
    assert bank.numbers() == [5] and bank.next_number == 6
    encoder.add(bank, passages(protocol, [7, 8]))
    encoder.replace(bank, passages(protocol, [0], changed=" Anew."))
    assert bank.next_number == 8 and bank.number("d0") == 5


def test_documents_that_are_ranked_among_some_come_once(bank: MemoryBank) -> None:
    query_LXR, offsets_Q = queries(bank)
    once, twice = (bank.rank(query_LXR, offsets_Q, [1, 2], HEADS, K, among=among) for among in ([3, 8], [8, 3, 8, 8]))
    assert_same_found(twice, once)
    assert twice.number_QK[:, 2:].max() == -1


def test_a_document_under_a_number_that_was_given_is_our_fault(encoder: Encoder, protocol: Protocol) -> None:
    bank = encoder.bank(passages(protocol, range(3)))
    with pytest.raises(AssertionError, match="given once"):
        bank.add(encoder.segments(passages(protocol, [7]), first=3))
    assert bank.numbers() == [1, 2, 3]


def test_a_bank_knows_of_which_document_each_is_a_part(encoder: Encoder, protocol: Protocol) -> None:
    """Whatever its name looks like."""
    text, tokens = "The red fox.", protocol.text(" The red fox.")
    parts = [Passage(f"é#1#{number}", text, tokens, "é#1") for number in (1, 2)]
    bank = encoder.bank([Passage("é#3", text, tokens), *parts, Passage("x", text, tokens, "x")])
    assert [bank.source(number) for number in bank.numbers()] == ["é#3", "é#1", "é#1", "x"]


# --- names that clash, documents that are not there -------------------------------------------------------------------


@pytest.mark.parametrize(("names", "match"), [([5, 3, 5], "two documents are named 'd5'"), ([5, 1], "'d1' is in the")])
def test_a_name_is_one_documents(encoder: Encoder, protocol: Protocol, names: list[int], match: str) -> None:
    bank = encoder.bank(passages(protocol, range(3)))
    before = contents(bank)
    with pytest.raises(UserError, match=match):
        encoder.add(bank, passages(protocol, names))
    assert contents(bank).keys() == before.keys() and bank.next_number == 4 and not bank.has("d5")


def test_a_new_bank_holds_no_name_twice(encoder: Encoder, protocol: Protocol) -> None:
    with pytest.raises(UserError, match="two documents are named 'd4'"):
        encoder.bank(passages(protocol, [4, 2, 4]))
    first, second = encoder.segments(passages(protocol, [4])), encoder.segments(passages(protocol, [4]), first=9)
    with pytest.raises(UserError, match="'d4' is in the bank already"):
        MemoryBank(encoder.shape).add([*first, *second])


def test_of_an_unknown_name_nothing_is_removed_or_replaced(encoder: Encoder, protocol: Protocol) -> None:
    bank = encoder.bank(passages(protocol, range(3)))
    wanted = encoder.bank(passages(protocol, range(3)))
    with pytest.raises(UserError, match="no document 'd7'"):
        bank.remove(["d1", "d7"])
    with pytest.raises(UserError, match="no document 'd7'"):
        encoder.replace(bank, passages(protocol, [1, 7], changed=" New."))
    with pytest.raises(UserError, match="two documents are named 'd1'"):
        encoder.replace(bank, passages(protocol, [1, 2, 1], changed=" New."))
    assert_same(bank, wanted)


@pytest.mark.parametrize("number", [0, 20, 4, -1, 2**40])
def test_an_unknown_number_is_named(bank: MemoryBank, number: int) -> None:
    less = copy_of(bank)
    less.remove(["d3"])
    assert number not in less
    query_LXR, offsets_Q = queries(less)
    for ask in (
        lambda: less.id(number),
        lambda: less.text(number),
        lambda: less.read(0, [2, number]),
        lambda: less.rank(query_LXR, offsets_Q, [1, 1], HEADS, K, among=[2, number]),
    ):
        with pytest.raises(UserError, match=f"no document with the number {number}"):
            ask()


def test_a_document_that_outgrows_the_model_is_named(encoder: Encoder, protocol: Protocol) -> None:
    bank = encoder.bank(passages(protocol, range(3)))
    long = Passage("long", "x", [11] * (4096 - protocol.wrapping(2) + 1))
    fits = Passage("fits", "x", [11] * (4096 - protocol.wrapping(2)))
    assert encoder.size([fits], first=2).tokens == 4096
    stand_in = Passage("d1", "x", long.tokens)
    for act in (
        lambda: encoder.size([long], first=2),
        lambda: list(encoder.segments([long], first=2)),
        lambda: encoder.add(bank, [fits, long]),
        lambda: encoder.replace(bank, [stand_in]),
    ):
        with pytest.raises(UserError, match=r"'(long|d1)' has 4,\d\d\d tokens, the model has 4,096 positions: split"):
            act()
    assert bank.numbers() == [1, 2, 3] and bank.text(2) == TEXTS[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "other"}, "other weights"),
        ({"text": "other"}, "another tokenizer"),
        ({"chunk_size": 9}, r"chunks of another size \(9; the model has 5\)"),
        ({"layers": (1, 3)}, "other routed layers"),
        ({"dtype": "bfloat16"}, r"another precision \(bfloat16; the model has float32\)"),
        ({"groups": 4, "width": 4}, "other heads"),
    ],
)
def test_a_bank_of_another_model_is_refused(
    encoder: Encoder, protocol: Protocol, change: dict[str, object], match: str
) -> None:
    bank = MemoryBank(replace(encoder.shape, **change))
    for act in (
        lambda: encoder.check(bank),
        lambda: encoder.add(bank, passages(protocol, [1])),
        lambda: encoder.replace(bank, []),
    ):
        with pytest.raises(UserError, match=match):
            act()


def test_a_fingerprint_tells_models_and_tokenizers_apart(
    encoder: Encoder, model: MemorySparseModel, protocol: Protocol, tmp_path: Path
) -> None:
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.attention[3].modules.router_k_proj[0].weight[0, 0] += 0.25
    assert Encoder(trained, protocol).shape.model != encoder.shape.model
    assert Encoder(copy.deepcopy(model).bfloat16(), protocol).shape.model == encoder.shape.model
    assert Encoder(model_for(protocol, layers=6), protocol).shape.model != encoder.shape.model
    assert Encoder(model, protocol_with("prompt", tmp_path)).shape.text == encoder.shape.text


# --- how it is cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("segment_bytes", "least", "most"), [(1, 13, 13), (4000, 4, 8), (1 << 30, 1, 1)])
def test_what_is_found_does_not_depend_on_how_a_bank_is_cut(
    model: MemorySparseModel, protocol: Protocol, monkeypatch: pytest.MonkeyPatch, precision: Precision,
    segment_bytes: int, least: int, most: int,
) -> None:  # fmt: skip
    """Into segments, in any order, and into tiles; against a loop."""
    encoder = Encoder(model, protocol, precision)
    whole = encoder.bank(passages(protocol, range(13)))
    cut = cut_bank(encoder, passages(protocol, range(13)), segment_bytes)
    assert least <= len(cut.segments) <= most
    shuffled = MemoryBank(cut.shape, [*cut.segments[1::2], *cut.segments[::2]])
    query_LXR, offsets_Q = queries(whole)
    wanted_L = [slow_search(whole, layer, query_XR, offsets_Q, k=15) for layer, query_XR in enumerate(query_LXR)]
    assert all(wanted.number_QK[:, 12].min() > 0 and wanted.number_QK[:, 13].max() == -1 for wanted in wanted_L)
    for tile in (1, 7, 16_384):
        monkeypatch.setitem(blocks.TILE, "cpu", tile)
        for bank in (cut, shuffled):
            assert_same(bank, whole)
            for layer, wanted in enumerate(wanted_L):
                assert_same_found(bank.search(layer, query_LXR[layer], offsets_Q, HEADS, 15), wanted)


def test_segments_have_the_size_that_is_asked_for(encoder: Encoder, protocol: Protocol) -> None:
    documents = passages(protocol, range(19))
    assert len(cut_bank(encoder, documents, 1).segments) == 19
    assert len(cut_bank(encoder, documents, 1 << 30).segments) == 1
    for segment in cut_bank(encoder, documents, 9000).segments[:-1]:
        last = int(segment.chunk_offsets_D.diff()[-1])
        size, without = (
            encoder.shape.key_bytes(chunks) + encoder.shape.value_bytes(chunks)
            for chunks in (segment.chunks, segment.chunks - last)
        )
        assert without < 9000 <= size


def test_documents_encode_alike_in_batches(model: MemorySparseModel, protocol: Protocol) -> None:
    """Up to rounding; document by document it is bitwise, which is what a CPU does by default."""
    documents = passages(protocol, range(19))
    alone = Encoder(model, protocol, "float32").bank(documents)
    together = Encoder(model, protocol, "float32", batch_tokens=100).bank(documents)
    left, right = contents(alone), contents(together)
    assert left.keys() == right.keys()
    for number in left:
        for one, other in zip(left[number].tensors, right[number].tensors, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_encoding_streams(encoder: Encoder, protocol: Protocol, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment comes out while most of the input is still to come."""
    monkeypatch.setattr(encoding, "SEGMENT_BYTES", 6000)
    taken: list[str] = []

    def stream() -> Iterator[Passage]:
        for passage in passages(protocol, range(40)):
            taken.append(passage.id)
            yield passage

    encoded, documents = encoder.segments(stream()), 0
    assert taken == []
    for segment in encoded:
        documents += segment.documents
        assert documents <= len(taken) <= documents + 1 or documents == 40
    assert documents == 40 == len(taken)


def test_a_bank_tells_of_the_tokens_that_are_done(model: MemorySparseModel, protocol: Protocol) -> None:
    encoder, told = Encoder(model, protocol), list[int]()
    encoder.advance = told.append
    bank = encoder.bank(passages(protocol, range(5)))
    assert len(told) == 5 and sum(told) == bank.tokens == encoder.size(passages(protocol, range(5))).tokens


# --- parts of it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 8, 18, 19, 30])
def test_a_prefix_is_the_bank_encoded_of_it(
    encoder: Encoder, protocol: Protocol, bank: MemoryBank, number: int
) -> None:
    documents = passages(protocol, range(min(number, 19)))
    assert len(bank.segments) > 5
    assert_same(bank.upto(number), encoder.bank(documents))


def test_a_prefix_of_a_changed_bank(encoder: Encoder, protocol: Protocol, bank: MemoryBank) -> None:
    """A replaced document keeps its number, though it lies in the last segment."""
    changed = copy_of(bank)
    changed.remove(["d4", "d11"])
    encoder.replace(changed, passages(protocol, [16, 2, 9], changed=" It is old."))
    anew = dict(enumerate(passages(protocol, range(19)), start=1))
    anew |= {int(new.id[1:]) + 1: new for new in passages(protocol, [16, 2, 9], changed=" It is old.")}
    for last in (3, 5, 10, 12, 17):
        kept = [(number, passage) for number, passage in anew.items() if number <= last and number not in (5, 12)]
        assert_same(changed.upto(last), encoded_anew(encoder, kept, "float32"))


@pytest.mark.parametrize("numbers", [[], [7], [19, 1, 12, 11], [3, 3, 99]])
def test_a_subset_is_the_bank_encoded_of_it(
    encoder: Encoder, protocol: Protocol, bank: MemoryBank, numbers: list[int]
) -> None:
    kept = [(number, passages(protocol, [number - 1])[0]) for number in set(numbers) if number <= 19]
    assert_same(bank.only(numbers), encoded_anew(encoder, kept, "float32"))


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 9), removed=st.sets(st.integers(0, 18)), prefix=st.integers(0, 19))
def test_shares_hold_every_document_once_and_are_balanced(
    bank: MemoryBank, world: int, removed: set[int], prefix: int
) -> None:
    changed = copy_of(bank)
    changed.remove(f"d{number}" for number in removed)
    changed = changed.upto(prefix)
    shares = [changed.share(rank, world) for rank in range(world)]
    assert list(itertools.chain.from_iterable(share.numbers() for share in shares)) == changed.numbers()
    longest = max((read for number in changed.numbers() for read in changed.read(0, [number])[0]), default=0)
    assert longest <= 12
    assert all(share.chunks <= changed.chunks / world + longest for share in shares)
    everything = contents(changed)
    for share in shares:
        for number, held in contents(share).items():
            assert all(map(torch.equal, held.tensors, everything[number].tensors))


def storages(bank: MemoryBank) -> set[int]:
    """Where the large tensors lie."""
    layers = [layer for segment in bank.segments for layer in segment.layers]
    large = [tensor for layer in layers for tensor in (layer.keys.vector_CR, layer.key_CGW, layer.value_CGW)]
    large += [keys.vector_CR for block in bank.blocks for keys in block.keys_L]
    return {tensor.untyped_storage().data_ptr() for tensor in large}


def test_parts_copy_nothing_large(bank: MemoryBank) -> None:
    views = [bank.upto(12), bank.only([2, 9, 17]), bank.share(1, 3), bank.upto(12).only([4, 9]), bank.to("cpu")]
    for view in views:
        assert 0 < len(view) <= len(bank)
        assert storages(view) <= storages(bank)
    for view in views[:-1]:
        assert len(view) < len(bank)
        for tile in view.tiles(1):
            assert tile.keys.vector_CR.untyped_storage().data_ptr() in storages(bank)


def test_parts_do_not_follow_a_change_of_the_whole(encoder: Encoder, protocol: Protocol, bank: MemoryBank) -> None:
    whole = copy_of(bank)
    views = [whole.upto(12), whole.only([2, 9, 17]), whole.share(1, 3)]
    before = [copy_of_answers(view) for view in views]
    whole.remove(["d1", "d8"])
    encoder.replace(whole, passages(protocol, [16, 5], changed=" Changed."))
    encoder.add(whole, passages(protocol, [30]))
    for view, wanted in zip(views, before, strict=True):
        assert_same(view, wanted)
    views[0].remove(["d2"])
    assert 3 in whole and whole.number("d30") == 20 and 20 not in views[0]


def copy_of_answers(bank: MemoryBank) -> MemoryBank:
    """A bank of its own memory."""
    kept = [segment.compact() for segment in bank.segments]
    return MemoryBank(bank.shape, kept, next_number=bank.next_number)


def test_a_compacted_segment_holds_what_was_not_removed(bank: MemoryBank) -> None:
    gone = copy_of(bank)
    gone.remove(["d0", "d7", "d8", "d18"])
    slim = copy_of_answers(gone)
    assert all(bool(segment.live_D.all()) for segment in slim.segments)
    assert sum(segment.chunks for segment in slim.segments) == gone.chunks < bank.chunks
    assert_same(slim, gone)
    everything = Segment.join(bank.segments)
    assert_same(MemoryBank(bank.shape, [everything]), bank)


# --- where it is kept -------------------------------------------------------------------------------------------------

TIERS = [Tiers(keys, values) for keys in ("device", "host") for values in ("host", "device", "disk")]


@pytest.mark.parametrize("tiers", TIERS, ids=str)
def test_every_tier_gives_the_same_answers(bank: MemoryBank, tiers: Tiers, tmp_path: Path) -> None:
    BankFolder(tmp_path).save(copy_of(bank))
    opened = BankFolder(tmp_path).open(tiers=tiers)
    assert all(segment.mapped == (tiers.values == "disk") for segment in opened.segments)
    assert_same(opened, bank)
    assert_same(opened.share(1, 2).to("cpu", Tiers(values="host")), bank.share(1, 2))


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tiers", TIERS, ids=str)
def test_a_gpu_finds_and_reads_what_a_cpu_does(
    model: MemorySparseModel, protocol: Protocol, tiers: Tiers, precision: Precision, tmp_path: Path
) -> None:
    encoder = Encoder(model, protocol, precision)
    bank = cut_bank(encoder, passages(protocol, range(19)), 6000)
    BankFolder(tmp_path).save(copy_of(bank))
    for there in (bank.to("cuda", tiers), BankFolder(tmp_path).open("cuda", tiers)):
        for block in there.blocks:
            on_device = tiers.router_keys == "device"
            assert all(keys.vector_CR.is_cuda == on_device for keys in block.keys_L)
            assert on_device or all(keys.vector_CR.is_pinned() for keys in block.keys_L)
        assert len(there.blocks) == (1 if tiers.router_keys == "device" else len(bank.segments))
        pooled = [tensor for part in there.segments for one in part.layers for tensor in (one.key_CGW, one.value_CGW)]
        assert all(tensor.is_cuda for tensor in pooled) == (tiers.values == "device")
        assert all(tensor.is_pinned() for tensor in pooled) == (tiers.values == "host")
        assert_same(there, bank)
        there.remove(["d4", "d11"])
        less = copy_of(bank)
        less.remove(["d4", "d11"])
        assert_same(there, less)
        assert_same(there.upto(9), less.upto(9))
        assert_same(there.share(1, 3), less.share(1, 3))


@needs_cuda
def test_encoding_on_a_gpu_is_encoding_on_a_cpu_up_to_rounding(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    on_gpu = Encoder(copy.deepcopy(model).to("cuda"), protocol, "float32")
    there = on_gpu.bank(passages(protocol, range(19)))
    left, right = contents(there), contents(bank)
    assert left.keys() == right.keys() and on_gpu.shape == bank.shape
    for number in left:
        for one, other in zip(left[number].tensors, right[number].tensors, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    on_gpu.add(there, passages(protocol, [30]))
    query_LXR, offsets_Q = queries(there)
    for layer, query_XR in enumerate(query_LXR):
        found = there.search(layer, query_XR, offsets_Q, HEADS, 20)
        assert sorted(found.number_QK[0].tolist()) == there.numbers() == list(range(1, 21))


# --- an empty bank ----------------------------------------------------------------------------------------------------


def test_an_empty_bank_finds_nothing_and_reads_nothing(bank: MemoryBank) -> None:
    emptied = copy_of(bank)
    emptied.remove([f"d{number}" for number in range(19)])
    for empty in (MemoryBank(bank.shape), bank.upto(0), bank.only([]), emptied, MemoryBank(bank.shape).share(0, 2)):
        assert len(empty) == empty.chunks == empty.tokens == 0 and empty.numbers() == [] and 1 not in empty
        query_LXR, offsets_Q = queries(bank)
        for found in (
            empty.search(1, query_LXR[1], offsets_Q, HEADS, K),
            empty.rank(query_LXR, offsets_Q, [1, 2], HEADS, K, [[1], [], [2, 3]]),
            empty.rank(query_LXR, offsets_Q, [1, 2], HEADS, K, among=[]),
        ):
            assert found.number_QK.tolist() == [[-1] * K] * 3
            assert bool(found.score_QK.isneginf().all()) and found.score_QK.shape == (3, K)
        counts, key_CGW, value_CGW = empty.read(1, [])
        assert counts == [] and key_CGW.shape == value_CGW.shape == (0, 2, 8) and key_CGW.dtype == torch.float32


def test_a_model_consults_an_empty_bank_as_it_would_no_document(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    contexts = [protocol.asking(protocol.text(words)) for words in ("Where does the fox live?", "teal?")]
    layout = Contexts.build(protocol.head(), contexts)
    hidden, found_L = model.consult(layout, MemoryBank(bank.shape).layers())
    none_left = bank.layers([bank.numbers()] * 2)
    without, _ = model.consult(layout, none_left)
    with_documents, _ = model.consult(layout, bank.layers())
    torch.testing.assert_close(hidden, without)
    assert not torch.allclose(hidden, with_documents)
    assert len(found_L) == 2 and found_L[0].found.number_QK.tolist() == [[-1] * 3] * 2
    logits, decodings, _, _ = begin(model, protocol.head(), contexts, MemoryBank(bank.shape).layers())
    assert bool(logits.isfinite().all()) and len(decodings) == 2


def test_a_bank_of_fewer_documents_than_top_k_is_consulted(
    encoder: Encoder, model: MemorySparseModel, protocol: Protocol
) -> None:
    layout = Contexts.build(protocol.head(), [protocol.asking(protocol.text("Where does the fox live?"))])
    hidden, (first, *_) = model.consult(layout, encoder.bank(passages(protocol, range(2))).layers())
    assert sorted(first.found.number_QK[0].tolist()) == [-1, 1, 2] and bool(hidden.isfinite().all())


def test_queries_that_find_unlike_many_documents_read_their_own(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    """Of two, of all and of one document: together as alone."""
    contexts = [protocol.asking(protocol.text(words)) for words in ("Where does the fox live?", "teal?", "A red hare?")]
    numbers = bank.numbers()
    excluded = [numbers[2:], [], numbers[:-1]]
    together, _ = model.consult(Contexts.build(protocol.head(), contexts), bank.layers(excluded))
    place = len(protocol.head())
    for context, without in zip(contexts, excluded, strict=True):
        alone, _ = model.consult(Contexts.build(protocol.head(), [context]), bank.layers([without]))
        rows = together[place : place + len(context.tokens)]
        torch.testing.assert_close(rows, alone[len(protocol.head()) :], atol=1e-5, rtol=1e-5)
        place += len(context.tokens)
    assert place == len(together)


def test_a_consulted_bank_is_outside_the_gradient(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    """A loss on what was read reaches the model's weights."""
    layout = Contexts.build(protocol.head(), [protocol.asking(protocol.text("Where does the fox live?"))])
    hidden, _ = model.consult(layout, bank.layers())
    (gradient,) = torch.autograd.grad(hidden.sum(), model.attention[3].modules.q_proj.weight)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().sum()) > 0


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_size_is_known_before_encoding(
    model: MemorySparseModel, protocol: Protocol, precision: Precision, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Counted are routing keys and scales, pooled keys and values, words and names, and 44 bytes a document (number,
    tokens, three offsets, where the source ends in its name). Not counted, of every file: three last offsets and the
    header."""
    documents = passages(protocol, range(19))
    encoder = Encoder(copy.deepcopy(model).to(dtype), protocol, precision)
    size = encoder.size(documents)
    bank = cut_bank(encoder, documents, 6000)
    BankFolder(tmp_path).save(bank)
    counted, headers = {"keys": 0, "values": 0, "texts": 0}, 0
    files = sorted(tmp_path.glob("segment-*"))
    assert len(files) == len(bank.segments) > 1
    for file in files:
        with safe_open(file, "pt") as handle:
            sizes = {name: handle.get_tensor(name).nbytes for name in handle.keys()}
        headers += file.stat().st_size - sum(sizes.values())
        for name, bytes_ in sizes.items():
            kind = name.partition(".")[2]
            group = {"router_key": "keys", "router_scale": "keys", "key": "values", "value": "values"}.get(
                kind, "texts"
            )
            counted[group] += bytes_
    assert counted == {"keys": size.key_bytes, "values": size.value_bytes, "texts": size.text_bytes + 24 * len(files)}
    assert 0 < headers < 2000 * len(files)
    assert size.bytes == sum(file.stat().st_size for file in files) - headers - 24 * len(files)
    assert (size.documents, size.tokens, size.chunks) == (len(bank), bank.tokens, bank.chunks)


def test_a_hundred_million_tokens_take_what_the_paper_says(encoder: Encoder) -> None:
    """Paper, section 3.4: 57.6 GB each for routing keys, keys and values."""
    shape = replace(
        encoder.shape, layers=tuple(range(18, 36)), groups=8, width=128, dtype="bfloat16", precision="bfloat16"
    )
    chunks = 100_000_000 // 64
    assert shape.key_bytes(chunks) == 57_600_000_000 and shape.value_bytes(chunks) == 2 * 57_600_000_000


def test_answers_agree_with_the_training_forwards_scores(bank: MemoryBank, model: MemorySparseModel) -> None:
    """Float32 keys are the very ones that training scores with."""
    assert bank.shape.precision == "float32"
    query_LXR, offsets_Q = queries(bank, seed=5)
    for layer, query_XR in enumerate(query_LXR):
        found = bank.search(layer, query_XR, offsets_Q, HEADS, K)
        assert_same_found(found, slow_search(bank, layer, query_XR, offsets_Q, K))
    assert_same_answers(bank, bank, seed=5)
    assert_same_contents(bank, bank)
