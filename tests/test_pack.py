"""Packs between processes and devices."""

from __future__ import annotations

import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from tests.conftest import tiny_pack


def test_a_pack_travels_as_bytes_and_arrives_whole() -> None:
    pack = replace(tiny_pack(), query_steps=(0, 2, 1), index=7)
    sent = bytes(ForkingPickler.dumps(pack))  # what a loader's worker does
    there = pickle.loads(sent)  # noqa: S301
    assert b"rebuild_storage" not in sent and b"rebuild_tensor" not in sent
    assert b"rebuild" in bytes(ForkingPickler.dumps(pack.positive_QD)), "a bare tensor is a shared file"
    assert there.document_ids == pack.document_ids and there.query_steps == (0, 2, 1) and there.index == 7
    for ours, theirs in ((pack, there), (pack.documents, there.documents), (pack.contexts, there.contexts)):
        for name, value in vars(ours).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, getattr(theirs, name)) and value.dtype == getattr(theirs, name).dtype
    assert there.documents.chunks.largest_sums == pack.documents.chunks.largest_sums
    there.documents.tokens_T.add_(1)  # its own memory, writable


def test_counts_of_a_step_that_were_never_set_are_refused() -> None:
    pack = tiny_pack()
    pack.check_counts()
    for name, own in (("step_labels", 11), ("step_queries", 3)):
        with pytest.raises(ValueError, match=f"{name} is 0, but pack 0 alone has {own}"):
            replace(pack, **{name: 0}).check_counts()


def test_masks_of_another_shape_are_refused() -> None:
    pack = tiny_pack()
    for name in ("positive_QD", "excluded_QD"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            replace(pack, **{name: torch.zeros(1, 2, dtype=torch.bool)})
