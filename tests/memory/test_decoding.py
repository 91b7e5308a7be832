"""One function for training and inference: a bank read, and extended, gives the training forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from msa_train.decoding import Decoding, begin, extend
from msa_train.memory import Encoder, MemoryBank
from msa_train.model import MemorySparseModel
from msa_train.pack import Context, Contexts, Documents, MemoryPack
from msa_train.protocol import Protocol, Source
from tests.memory.conftest import TEXTS, passages

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
