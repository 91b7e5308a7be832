"""The tokenizer and encoder of the memory's tests, and a model whose answers differ with what it reads."""

from __future__ import annotations

import pytest
import torch

from msa_train.config import MSAConfig
from msa_train.model import MemorySparseModel
from msa_train.protocol import Protocol
from tests.conftest import tiny_backbone
from tests.memory.conftest import encoder, protocol

__all__ = ["encoder", "model", "protocol"]


@pytest.fixture(scope="session")
def model(protocol: Protocol) -> MemorySparseModel:
    """Weights as wide as 1: with the usual ones an untrained model says one thing to everything."""
    backbone = tiny_backbone(
        "qwen3", vocab_size=len(protocol.tokenizer), max_position_embeddings=4096, tie_word_embeddings=False
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in backbone.parameters():
            if weight.dim() == 2:
                weight.normal_(generator=generator)
    torch.manual_seed(1)
    return MemorySparseModel(backbone, MSAConfig(chunk_size=5, top_k=3)).eval()
