"""The bench: its packs, and every measure once, on a small decoder and the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from msa_train import bench, cli
from msa_train.bench import Bench, Load
from msa_train.config import MSAConfig
from tests.conftest import tiny_backbone


def test_a_load_is_a_pack_of_its_sizes() -> None:
    pack = Load(1000, shortest=20, longest=90, queries=5, question=7, answer=3).pack(16, vocabulary=50)
    documents, contexts = pack.documents, pack.contexts
    assert sum(documents.lengths) == 1000 == len(documents.tokens_T)
    assert all(20 <= length <= 90 for length in documents.lengths[:-1]) and documents.lengths[-1] <= 90
    assert contexts.queries == 5 and len(contexts.label_target_N) == 15 and len(contexts.routing_index_X) == 35
    assert pack.positive_QD.sum(1).tolist() == [1] * 5
    again = Load(1000, shortest=20, longest=90, queries=5, question=7, answer=3).pack(16, vocabulary=50)
    assert torch.equal(again.documents.tokens_T, documents.tokens_T)


def test_every_measure_runs_and_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LENGTHS", (64, 128))
    monkeypatch.setattr(bench, "QUERIES", (1, 3))
    monkeypatch.setattr(bench, "ROUTERS", (64,))
    tiny_backbone().save_pretrained(tmp_path)
    measured = Bench(str(tmp_path / "config.json"), MSAConfig(chunk_size=4, top_k=2), device="cpu")
    lines: list[str] = []
    load = Load(96, shortest=5, longest=20, question=4, answer=2)
    taken = {name: measure(measured, load, lines.append) for name, measure in bench.MEASURES.items()}
    found = json.loads(json.dumps(taken))
    assert {row["recompute"] for row in found["step"]["rows"]} == {"layers", "documents"}
    assert found["step"]["plain_over_fast"] > 0 and found["step"]["profile"]["ms"]
    assert [row["tokens"] for row in found["lengths"]["rows"]] == [64, 128]
    assert all(row["dense"]["whole_model_s"] > 0 for row in found["lengths"]["rows"])
    assert [row["queries"] for row in found["queries"]["rows"]] == [1, 3]
    assert not any(row["trains_backbone"] for row in found["routers"]["rows"])
    assert len(lines) > 12


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "--backbone", str(tmp_path / "config.json"), "--msa.top_k", "2", "--measure", "[step]"]
    monkeypatch.setattr(sys, "argv", ["msa-train", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "msa-train estimate" in capsys.readouterr().err
