"""A document made of the prompt's own words: found for every question where the prompt routes, and not by default.

A score is a maximum over the tokens that route. Where the words around the question are among them, as published, a
document that repeats them has an excellent match for whatever is asked. Layers are silenced here, so that a state is
its token's embedding and a score is an overlap of words: the mechanism alone. benchmarks/hub.py shows it with a
pretrained decoder.
"""

from __future__ import annotations

import pytest
import torch

from datamodules.tokenizer import train_tokenizer
from msa_train.decoding import begin
from msa_train.memory import Encoder, MemoryBank, Passage
from msa_train.model import MemorySparseModel
from msa_train.protocol import ASK, RETURN, Protocol, RoutingWords
from tests.conftest import ANIMALS, COLOURS
from tests.memory.conftest import model_for

FILLERS = ("oak", "elm", "fir", "ash", "yew", "box", "may", "sloe")
HUB = " ".join(f"{word} " * 4 for word in sorted({*ASK.split(), *RETURN.split()}))
WORDS = (*ANIMALS, *COLOURS)
SHARED = 4  # documents that a word stands in: more than are selected
TOP_K = 3


@pytest.fixture(scope="module")
def words_only(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemorySparseModel, Protocol]:
    """A model whose states are embeddings, and a tokenizer that has every word whole."""
    texts = [ASK, RETURN, f" {HUB}", *(f" {word} {word}" for word in (*WORDS, *FILLERS))] * 9
    protocol = Protocol(train_tokenizer(texts, 900, tmp_path_factory.mktemp("tokenizer")))
    model = model_for(protocol, TOP_K, chunk_size=4, hidden_size=96, head_dim=24)
    with torch.no_grad():
        for layer in model.backbone.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model, protocol


@pytest.fixture(scope="module")
def trapped(words_only: tuple[MemorySparseModel, Protocol]) -> MemoryBank:
    """Every word among three others in four documents, and the hub."""
    model, protocol = words_only
    texts = {
        f"{word} {number}": f"{word} {word} {FILLERS[number]} {FILLERS[number + 4]} " * 3
        for word in WORDS
        for number in range(SHARED)
    }
    return Encoder(model, protocol, "float32").bank(
        [Passage(name, text, protocol.text(f" {text}")) for name, text in {**texts, "hub": HUB}.items()]
    )


def selected(
    words: RoutingWords, words_only: tuple[MemorySparseModel, Protocol], bank: MemoryBank
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per question: whether some layer selects the hub, and the document that is best over layers."""
    model, protocol = words_only[0], Protocol(words_only[1].tokenizer, words)
    asked = [protocol.asking(protocol.text(f" {name}")) for name in WORDS]
    _, _, recalled, offsets = begin(model, protocol.head(), asked, bank.layers())
    best = bank.rank([one.query_XR for one in recalled], offsets, [1.0, 1.0], 4, 1)
    hub = torch.stack([(one.found.number_QK == bank.number("hub")).any(1) for one in recalled])
    return hub.any(0), best.number_QK[:, 0]


def test_by_default_the_hub_is_found_for_no_question(
    words_only: tuple[MemorySparseModel, Protocol], trapped: MemoryBank
) -> None:
    hub, best = selected("question", words_only, trapped)
    assert not hub.any()
    assert [trapped.id(number).split()[0] for number in best.tolist()] == list(WORDS), "each finds its own word"


def test_as_published_the_hub_is_found_for_every_question(
    words_only: tuple[MemorySparseModel, Protocol], trapped: MemoryBank
) -> None:
    hub, _ = selected("prompt", words_only, trapped)
    assert hub.all()
