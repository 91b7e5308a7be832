"""A model with a tokenizer of its own, and documents for its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from datamodules.tokenizer import train_tokenizer
from msa_train.config import MSAConfig
from msa_train.memory import Encoder, Passage
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol, RoutingWords
from tests.conftest import ANIMALS, COLOURS, tiny_backbone

TEXTS = [
    f"The {colour} {animal} lives by river {number}. " + "It is seen at dusk. " * (number % 4)
    for number, (colour, animal) in enumerate((colour, animal) for animal in ANIMALS for colour in COLOURS)
]
VOCABULARY = 400


@pytest.fixture(scope="session")
def protocol(tmp_path_factory: pytest.TempPathFactory) -> Protocol:
    return protocol_with("question", tmp_path_factory.mktemp("tokenizer"))


def protocol_with(words: RoutingWords, folder: Path) -> Protocol:
    sample = [*TEXTS, *(f"Where does the {animal} live?" for animal in ANIMALS)]
    return Protocol(train_tokenizer(sample, VOCABULARY, folder), words)


def model_for(
    protocol: Protocol, top_k: int = 3, chunk_size: int = 5, layers: int = 4, **sizes: int
) -> MemorySparseModel:
    """Four layers, of which two route, with as many embeddings as the tokenizer has tokens."""
    sizes = {"vocab_size": len(protocol.tokenizer), "max_position_embeddings": 4096, **sizes}
    backbone = tiny_backbone("qwen3", layers, **sizes)
    torch.manual_seed(1)
    return MemorySparseModel(backbone, MSAConfig(chunk_size=chunk_size, top_k=top_k)).eval()


@pytest.fixture(scope="session")
def model(protocol: Protocol) -> MemorySparseModel:
    return model_for(protocol)


@pytest.fixture(scope="session")
def encoder(model: MemorySparseModel, protocol: Protocol) -> Encoder:
    return Encoder(model, protocol, "float32")


def passages(protocol: Protocol, names: range | list[int], changed: str = "") -> list[Passage]:
    """Documents `d{number}` of the texts above; every third is a part of `d`."""
    texts = {number: TEXTS[number] + changed for number in names}
    return [
        Passage(f"d{number}", texts[number], protocol.text(f" {texts[number]}"), "" if number % 3 else "d")
        for number in names
    ]
