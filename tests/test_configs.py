"""Every shipped config is found, composes as its first line says, and builds its model (large ones on no device)."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from msa_train.cli import build
from msa_train.lora import ADAPTER

ROOT = Path(__file__).parent.parent
CORPORA = sorted((ROOT / "configs" / "corpora").glob("*.yaml"))
EVALUATIONS = sorted((ROOT / "configs" / "evaluation").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*CORPORA, *EVALUATIONS})
STAND_INS = {
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3_4b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2_135m",
    "corpora/SmolLM2-135M-Instruct": "smollm2_135m",
}
RUNS = {
    "checkpoints/quickstart/config.yaml": "configs/quickstart.yaml",
    "checkpoints/smollm2_memory/config.yaml": "configs/smollm2_135m/memory.yaml",
}
SIZES = {"qwen3_4b": 4_022_468_096, "smollm2_135m": 134_515_008, "tiny_qwen3": 3_146_000}


def test_the_ladder_is_complete() -> None:
    names = {str(path.relative_to(ROOT / "configs")) for path in CONFIGS}
    assert names >= {
        "quickstart.yaml", "debug/fast_dev_run.yaml", "debug/overfit.yaml", "debug/two_ranks.yaml",
        "smollm2_135m/pretrain.yaml", "qwen3_4b/pretrain.yaml", "qwen3_4b/sft_8k.yaml", "qwen3_4b/sft_64k.yaml",
        "qwen3_4b/routers_only.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config_builds(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = path.read_text().partition("\n")[0]
    assert command.startswith("# msa-train fit "), "the first line says how to run it"
    assert str(path.relative_to(ROOT)) in command
    (tmp_path / "start.ckpt").touch()
    words = [
        {"CORPUS": "python-docs"}.get(word, str(tmp_path / "start.ckpt") if word.endswith(".ckpt") else word)
        for word in shlex.split(command)[2:]
    ]
    hardware = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", f"--runs={tmp_path}"]
    cli = build([*words, *hardware, "--trainer.precision=32-true"], run=False)

    name = cli.model.blueprint.backbone
    stand_in = STAND_INS.get(name, Path(name).stem)
    shape = str(ROOT / "configs" / "backbones" / f"{stand_in}.json")
    cli.model.blueprint = replace(cli.model.blueprint, backbone=shape)
    cli.model.init_from = None
    cli.model.trainer = cli.trainer
    with torch.device("meta"):
        cli.model.configure_model()
    model = cli.model.net
    backbone = sum(weight.numel() for name, weight in model.backbone_parameters() if ADAPTER not in name)
    assert backbone == pytest.approx(SIZES[stand_in], rel=0.01)
    layers = AutoConfig.from_pretrained(shape).num_hidden_layers
    assert model.routed_layers == tuple(range(layers // 2, layers))
    assert cli.datamodule.packing.chunk_size == cli.model.msa.chunk_size
    assert cli.trainer.max_steps == (1 if cli.trainer.fast_dev_run else cli.model.timeline.steps)
    only_routers = all(phase.trainable == "routers" for phase in cli.model.timeline.phases)
    assert only_routers == (not any(weight.requires_grad for _, weight in model.backbone_parameters()))


def test_qwen3_4b_routers_have_the_published_shapes() -> None:
    from msa_train.backbone import open_backbone
    from msa_train.config import MSAConfig
    from msa_train.model import MemorySparseModel

    with torch.device("meta"):
        backbone = open_backbone(str(ROOT / "configs/backbones/qwen3_4b.json"), torch.bfloat16)
        model = MemorySparseModel(backbone, MSAConfig())
    shapes = {name.removeprefix("backbone."): tuple(weight.shape) for name, weight in model.router_parameters()}
    wanted = {}
    for layer in range(18, 36):
        wanted[f"model.layers.{layer}.self_attn.router_q_proj.0.weight"] = (4096, 2560)
        wanted[f"model.layers.{layer}.self_attn.router_k_proj.0.weight"] = (1024, 2560)
    assert shapes == wanted
    assert sum(a * b for a, b in shapes.values()) == pytest.approx(235.9e6, rel=1e-3)


def test_quick_start_says_what_it_measures() -> None:
    text = (ROOT / "configs/quickstart.yaml").read_text()
    assert "callbacks.BeforeAfterReport" in text and "callbacks.ExtrapolationEvaluation" in text
    assert json.loads((ROOT / "configs/backbones/tiny_qwen3.json").read_text())["model_type"] == "qwen3"
    assert re.search(r"val_splits: \[by_name, by_summary\]", text)


@pytest.mark.parametrize("path", CORPORA, ids=lambda path: path.stem)
def test_corpus_names_its_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = path.read_text().partition("\n")[0]
    assert command == f"# msa-train pack --data.corpus {path.relative_to(ROOT)} --data.tokenizer TOKENIZER"
    cli = build(shlex.split(command)[2:], run=False)
    assert list(cli.datamodule.corpora) == [str(path.relative_to(ROOT))]


@pytest.mark.parametrize("path", EVALUATIONS, ids=lambda path: path.stem)
def test_evaluation_builds_over_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = path.read_text().partition("\n")[0]
    assert command.startswith("# msa-train test ") and str(path.relative_to(ROOT)) in command
    words = [RUNS.get(word, word) for word in shlex.split(command)[2:]]
    cli = build([*words, "--trainer.accelerator=cpu", "--trainer.precision=32-true"], run=False)
    (callback,) = (one for one in cli.trainer.callbacks if type(one).__name__ == "ExtrapolationEvaluation")
    assert callback.tasks and callback.baselines
