"""Banks in a folder: of nineteen documents, in several files."""

from __future__ import annotations

from pathlib import Path

import pytest

from msa_train.memory import BankFolder, Encoder, MemoryBank, encoding
from msa_train.protocol import Protocol
from tests.memory.conftest import passages


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SEGMENT_BYTES", 6000)


@pytest.fixture
def folder(tmp_path: Path, encoder: Encoder, protocol: Protocol) -> BankFolder:
    """A bank of nineteen documents in several files."""
    folder = BankFolder(tmp_path / "bank")
    folder.encode(encoder, passages(protocol, range(19)), corpus="animals")
    return folder


@pytest.fixture
def wanted(encoder: Encoder, protocol: Protocol) -> MemoryBank:
    """What that folder holds."""
    return encoder.bank(passages(protocol, range(19)))


@pytest.fixture
def shard(folder: BankFolder) -> Path:
    """The second file."""
    return folder.path / folder.manifest()["segments"][1]["file"]
