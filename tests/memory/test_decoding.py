"""One function for training and inference: a bank read, and extended, gives the training forward."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msa_train import decoding
from msa_train.decoding import Decoding, begin, extend
from msa_train.memory import Encoder, MemoryBank
from msa_train.model import MemorySparseModel
from msa_train.pack import Context, Contexts, Documents, MemoryPack
from msa_train.protocol import Protocol, Source
from tests.memory.conftest import TEXTS, model_for, passages

QUESTIONS = ("Where does the red fox live?", "What of the ivory hare by river 79?", "teal?")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@contextmanager
def layer_outputs(model: MemorySparseModel) -> Iterator[list[torch.Tensor]]:
    """What every layer's MLP gives, in the order of calls: it depends on all that the layer did before."""
    seen: list[torch.Tensor] = []
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for layer in model.backbone.model.layers
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def asking(protocol: Protocol, question: str, further: list[int]) -> Context:
    """A question with tokens behind it that neither route nor are labelled."""
    context = protocol.asking(protocol.text(question))
    tokens = [*context.tokens, *further]
    return Context(tokens, [False] * len(tokens), context.routing)


def pack_of(protocol: Protocol, documents: list[int], contexts: list[Context], chunk_size: int) -> MemoryPack:
    texts = [
        protocol.document(Source(place, protocol.text(f" {TEXTS[name]}")))
        for place, name in enumerate(documents, start=1)
    ]
    none = torch.zeros(len(contexts), len(documents), dtype=torch.bool)
    ids = tuple(f"d{name}" for name in documents)
    built = Contexts.build(protocol.head(), contexts)
    return MemoryPack(
        Documents.build(texts, chunk_size), built, none, none, ids, tuple(map(str, range(len(contexts)))), asked=0
    )


@pytest.fixture(scope="module")
def bank(encoder: Encoder, protocol: Protocol) -> MemoryBank:
    return encoder.bank(passages(protocol, range(17)))


def test_a_bank_and_a_decoding_step_are_the_training_forward_in_every_layer(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    """Encode, route and one step over a bank, against one forward over the same documents."""
    answers = [[21], [33], [47]]
    contexts = [asking(protocol, question, more) for question, more in zip(QUESTIONS, answers, strict=True)]
    pack = pack_of(protocol, list(range(17)), contexts, chunk_size=5)
    with torch.no_grad(), layer_outputs(model) as both:
        forward = model(pack)
        wanted = both[::2]
    # contexts run through all layers, documents through all but the last: [ctx, doc] * 3, ctx
    assert len(both) == 7 and len(wanted) == 4
    asked = [asking(protocol, question, []) for question in QUESTIONS]
    with layer_outputs(model) as read:
        logits, decodings, recalled, _ = begin(model, protocol.head(), asked, bank.layers())
        assert len(read) == 4
        after = extend(model, decodings, answers)
    for layer, found in enumerate(recalled):
        score_QD = forward.doc_score_LQD[layer]
        best = score_QD.topk(3)
        assert torch.equal(found.found.number_QK, best.indices + 1), "the same documents, in the same order"
        torch.testing.assert_close(found.found.score_QK, best.values, **CLOSE)
    ends = pack.contexts.offsets_Q[2:].long() - 1
    starts = [rows for end, begin_ in zip(ends.tolist(), pack.contexts.offsets_Q[1:-1].tolist(), strict=True)
              for rows in range(begin_, end)]  # fmt: skip
    rows = torch.tensor([*range(pack.contexts.head), *starts])
    for layer in range(4):
        torch.testing.assert_close(read[layer], wanted[layer][rows], **CLOSE)
        torch.testing.assert_close(read[4 + layer], wanted[layer][ends], **CLOSE)
    torch.testing.assert_close(after, model.logits(forward.hidden_AM[ends]), **CLOSE)
    torch.testing.assert_close(logits, model.logits(forward.hidden_AM[ends - 1]), **CLOSE)


def test_token_by_token_is_reading_the_whole_again(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    more = [int(token) for token in torch.randint(10, 300, (11,), generator=torch.Generator().manual_seed(0))]
    _, decodings, _, _ = begin(model, protocol.head(), [asking(protocol, QUESTIONS[1], [])], bank.layers())
    for place, token in enumerate(more):
        grown = extend(model, decodings, [[token]])
        whole, _, _, _ = begin(
            model, protocol.head(), [asking(protocol, QUESTIONS[1], more[: place + 1])], bank.layers()
        )
        torch.testing.assert_close(grown, whole, **CLOSE)


def test_several_tokens_at_once_are_reading_the_whole_again(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    steps = [[[20, 21, 22], [30], [40, 41]], [[23], [31, 32, 33, 34], [42, 43]]]
    grown = [[*first, *second] for first, second in zip(*steps, strict=True)]
    _, decodings, _, _ = begin(model, protocol.head(), [asking(protocol, q, []) for q in QUESTIONS], bank.layers())
    for tokens in steps:
        logits = extend(model, decodings, tokens)
    contexts = [asking(protocol, question, more) for question, more in zip(QUESTIONS, grown, strict=True)]
    whole, again, _, _ = begin(model, protocol.head(), contexts, bank.layers())
    torch.testing.assert_close(logits, whole, **CLOSE)
    assert [one.position for one in decodings] == [one.position for one in again]


def test_a_batch_is_its_members_alone(model: MemorySparseModel, protocol: Protocol, bank: MemoryBank) -> None:
    """Contexts of different lengths, extended by different numbers of tokens; one leaves early."""
    steps = [[[20, 21, 22], [30], [40, 41]], [[23], [31, 32]]]
    contexts = [asking(protocol, question, []) for question in QUESTIONS]
    logits, together, _, _ = begin(model, protocol.head(), contexts, bank.layers())
    alone: list[list[Decoding]] = []
    for place, context in enumerate(contexts):
        single, decoding, _, _ = begin(model, protocol.head(), [context], bank.layers())
        torch.testing.assert_close(logits[place], single[0], **CLOSE)
        alone.append(decoding)
    for tokens, members in zip(steps, ([0, 1, 2], [0, 2]), strict=True):
        batch = extend(model, [together[place] for place in members], tokens)
        for row, (place, new) in enumerate(zip(members, tokens, strict=True)):
            torch.testing.assert_close(batch[row], extend(model, alone[place], [new])[0], **CLOSE)
    assert [one.position for one in together] == [decoding[0].position for decoding in alone]


def test_positions_go_on_behind_the_offset_of_top_k(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    context = asking(protocol, QUESTIONS[0], [])
    _, decodings, _, _ = begin(model, protocol.head(), [context], bank.layers())
    assert decodings[0].position == len(protocol.head()) + 3 + len(context.tokens)
    extend(model, decodings, [[9, 9]])
    assert decodings[0].position == len(protocol.head()) + 5 + len(context.tokens)


# --- where it all lies -------------------------------------------------------------------------------------------


def begun(model: MemorySparseModel, protocol: Protocol, bank: MemoryBank, questions: list[str]) -> list[Decoding]:
    asked = [asking(protocol, question, []) for question in questions]
    return begin(model, protocol.head(), asked, bank.layers())[1]


def rows_of(one: Decoding) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values that a context attends to, of every layer."""
    spans = [slice(first, first + n) for first, n in zip(one.first_L, one.length_L, strict=True)]
    return [(key[rows], value[rows]) for (key, value), rows in zip(one.caches.layers, spans, strict=True)]


@pytest.mark.parametrize("room", [0, 1, 5, 64])
def test_contexts_come_wait_and_go_at_any_time_as_if_alone(
    room: int, model: MemorySparseModel, protocol: Protocol, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random readings, and steps of random members of several readings, against every context on its own. Keys and
    values are moved, never changed: those of the steps before are bitwise what they were."""
    monkeypatch.setattr(decoding, "ROOM", room)
    draw = random.Random(room)
    live: list[tuple[Decoding, Decoding]] = []
    met = 0
    for _ in range(40):
        if len(live) < 2 or draw.random() < 0.2:
            questions = draw.choices(QUESTIONS, k=draw.randint(1, 3))
            alone = [begun(model, protocol, bank, [question])[0] for question in questions]
            live += zip(begun(model, protocol, bank, questions), alone, strict=True)
        while len(live) > 6:
            live.pop(draw.randrange(len(live)))
        pairs = draw.sample(live, k=draw.randint(1, len(live)))
        new = [draw.choices(range(10, 300), k=draw.choice([1, 1, 1, 2, 7])) for _ in pairs]
        before = {id(one): [(k.clone(), v.clone()) for k, v in rows_of(one)] for one, _ in live}
        met += len({one.caches for one, _ in pairs}) > 1
        logits_QV = extend(model, [one for one, _ in pairs], new)
        for (one, alone_), tokens, logits_V in zip(pairs, new, logits_QV, strict=True):
            torch.testing.assert_close(logits_V, extend(model, [alone_], [tokens])[0], **CLOSE)
            assert one.position == alone_.position and one.length_L.tolist() == alone_.length_L.tolist()
        for one, _ in live:
            for (key, value), (old_key, old_value) in zip(rows_of(one), before[id(one)], strict=True):
                assert torch.equal(key[: len(old_key)], old_key) and torch.equal(value[: len(old_value)], old_value)
    assert met > 4


def test_contexts_of_two_readings_meet_though_each_has_room(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    words = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[0], QUESTIONS[1]]
    apart = [begun(model, protocol, bank, [question])[0] for question in words]
    for place, one in enumerate(apart):
        extend(model, [one], [[20 + place % 2]])
    first, second, *alone = apart
    logits_QV = extend(model, [second, first], [[41], [40]])
    for logits_V, one, token in zip(logits_QV, alone[::-1], (41, 40), strict=True):
        torch.testing.assert_close(logits_V, extend(model, [one], [[token]])[0], **CLOSE)
    assert first.caches is second.caches and len({one.caches for one in apart}) == 3


def test_layers_that_chose_unlike_many_chunks_lie_apart(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    """A layer that does not route reads no chunk; the others as many as their documents have."""
    contexts = begun(model, protocol, bank, list(QUESTIONS))
    for _ in range(2):
        lengths = {tuple(one.length_L.tolist()) for one in contexts}
        assert len(lengths) == 3 and all(len(set(length)) > 1 for length in lengths)
        for place in range(len(model.attention)):
            spans = sorted((one.first_L[place], one.first_L[place] + one.length_L[place]) for one in contexts)
            assert all(end <= first for (_, end), (first, _) in zip(spans, spans[1:], strict=False))
        extend(model, contexts, [[20], [30], [40]])


def test_a_context_that_nobody_holds_loses_its_place(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "ROOM", 2)
    contexts = begun(model, protocol, bank, list(QUESTIONS))
    extend(model, contexts, [[20], [30], [40]])
    of_three = [len(key) for key, _ in contexts[0].caches.layers]
    assert of_three == sum(one.length_L + one.room for one in contexts).tolist()
    del contexts[1]
    extend(model, contexts, [[21], [41]])
    assert [len(key) for key, _ in contexts[0].caches.layers] == of_three, "there was room: nothing moved"
    waiting, extended = contexts
    extend(model, [extended], [[42, 43]])
    assert waiting.caches is extended.caches and len(waiting.caches.contexts) == 2, "what waits is moved along"
    assert [len(key) for key, _ in waiting.caches.layers] == sum(one.length_L + one.room for one in contexts).tolist()


def test_laying_out_holds_one_layer_twice_at_most(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank
) -> None:
    first, second = begun(model, protocol, bank, [QUESTIONS[0]]), begun(model, protocol, bank, [QUESTIONS[1]])
    old = [first[0].caches, second[0].caches]
    extend(model, [*first, *second], [[20], [30]])
    assert [caches.layers for caches in old] == [[], []], "what was moved is let go, also where something else holds it"


class Launches(TorchDispatchMode):
    """Counts what is launched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_launches_as_much_for_many_contexts_as_for_one(
    model: MemorySparseModel, protocol: Protocol, bank: MemoryBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And looks at no result. Attention is left out: on a CPU it sorts its sequences by length."""
    monkeypatch.setattr("msa_train.attention.varlen_attention", lambda query, *rest: query)
    counts = []
    for questions in (QUESTIONS[:1], QUESTIONS[:2], QUESTIONS * 4):
        contexts = begun(model, protocol, bank, list(questions))
        tokens = [[20 + place] for place in range(len(contexts))]
        extend(model, contexts, tokens)
        with Launches() as launches:
            extend(model, contexts, tokens)
        counts.append(launches.seen)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["aten::index_select"] >= 2 * len(model.attention) and not counts[0]["aten::_local_scalar_dense"]
    assert counts[0]["aten::cat"] <= 4 * len(model.attention), "rotary positions of a CPU's queries and keys"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_step_makes_the_host_wait(protocol: Protocol) -> None:
    """With every synchronising call turned into an error; laying out anew, and contexts of two readings included."""
    wide = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    on_gpu = model_for(protocol, **wide).to("cuda", torch.bfloat16)
    memory = Encoder(on_gpu, protocol, "float32").bank(passages(protocol, range(17)))
    contexts = begun(on_gpu, protocol, memory, list(QUESTIONS))
    extend(on_gpu, contexts, [[20], [30, 31], [40]])
    contexts += begun(on_gpu, protocol, memory, list(QUESTIONS[:2]))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            logits_QV = extend(on_gpu, contexts, [[20], [30], [40], [50], [60, 61]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(logits_QV.isfinite().all())
