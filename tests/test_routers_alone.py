"""Routers alone, with the backbone that they were trained on, are the run bit by bit; with another one they are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from msa_train import cli
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.export import export_run
from msa_train.module import MemorySparseModule
from msa_train.phases import Phase
from msa_train.runs import open_run
from tests.conftest import TINY_BACKBONE, tiny_pack

Arguments = Callable[..., list[str]]
SIZES = {"model.msa.routed_layers": "[0, 1]", "model.msa.chunk_size": 8, "model.msa.top_k": 2}
ROUTERS = json.dumps(
    [{"name": "warm", "steps": 2, "router_lr": 3e-3, "routing_weight": 1.0, "trainable": "routers"},
     {"name": "on", "steps": 1, "router_lr": 3e-3, "routing_weight": 1.0, "trainable": "routers"}]
)  # fmt: skip
STILL = json.dumps([{"name": "still", "steps": 1, "router_lr": 0.0, "trainable": "routers"}])
# the tokenizer has 366 tokens: the first grows its embeddings by 65 rows, tied, the second by 37, untied
KINDS: dict[str, dict[str, Any]] = {
    "grown": {"vocab_size": 301},
    "untied": {"vocab_size": 329, "tie_word_embeddings": False, "model_type": "llama",
               "rope_parameters": {"rope_type": "llama3", "rope_theta": 900.0, "factor": 4.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 3.0, "original_max_position_embeddings": 128}},
    "bfloat16": {"vocab_size": 411},
}  # fmt: skip
PUBLISHED = {
    f"model.layers.{layer}.self_attn.router_{kind}_proj.0.weight": (width, 32)
    for layer in (0, 1)
    for kind, width in (("q", 32), ("k", 16))
}


def write_backbone(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A backbone with weights of its own, as a hub has one."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**TINY_BACKBONE, **changes})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_run: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A backbone and a validated run that trained routers on it, made once of a kind."""
    root = tmp_path_factory.mktemp("alone")

    def made(kind: str = "grown") -> tuple[Path, Path]:
        backbone, weights = root / f"{kind} backbone", "bfloat16" if kind == "bfloat16" else "float32"
        if not backbone.exists():
            write_backbone(backbone, dtype=getattr(torch, weights), **KINDS[kind])
            flags = {
                **SIZES, "model.backbone": backbone, "model.weights": weights, "model.temperature": 0.07,
                "model.phases": ROUTERS, "model.routing_words": "prompt", "data.max_document_tokens": 77,
                "trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 3,
            }  # fmt: skip
            cli.build(["fit", *tiny_run(root, name=kind, **flags)])
        return backbone, root / kind

    return made


@pytest.fixture
def alone(trained: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return export_run(trained()[1], tmp_path / "alone", only="routers")


def start(backbone: Path, **msa: Any) -> Any:
    """What a run that starts from a folder starts from."""
    sizes = MSAConfig(**{"chunk_size": 8, "top_k": 2, "routed_layers": (0, 1), **msa})
    return MemorySparseModule(str(backbone), [Phase("only", 1)], sizes).untrained().eval()


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def assert_alike(found: Any, wanted: Any, dtype: torch.dtype = torch.float32) -> None:
    weights = wanted.state_dict()
    assert found.state_dict().keys() == weights.keys() and len(weights) > 20
    for name, weight in found.state_dict().items():
        assert torch.equal(weight, weights[name]) and weight.dtype == dtype, name
    pack = tiny_pack(chunk_size=8)
    assert torch.equal(found(pack).doc_score_LQD, wanted(pack).doc_score_LQD)


# --- both are the run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_routers_and_their_backbone_are_the_run(
    kind: str, trained: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    _, run = trained(kind)
    folder = export_run(run, tmp_path / "alone", only="routers")
    weights = load_file(folder / "routers.safetensors")
    routers = {name: tuple(weight.shape) for name, weight in weights.items() if not name.endswith(".grown")}
    assert routers == PUBLISHED
    rows = {name: tuple(weight.shape) for name, weight in weights.items() if name.endswith(".grown")}
    assert (
        rows
        == {
            "grown": {"model.embed_tokens.weight.grown": (65, 32)},
            "untied": {"model.embed_tokens.weight.grown": (37, 32), "lm_head.weight.grown": (37, 32)},
            "bfloat16": {},
        }[kind]
    )
    assert [file.name for file in folder.glob("*.safetensors")] == ["routers.safetensors"]
    ours, found = open_run(run), open_run(folder)
    assert_alike(found.model, ours.model, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    assert found.protocol.fingerprint() == ours.protocol.fingerprint() and found.protocol.routing_words == "prompt"
    assert found.layer_weights == ours.layer_weights and (run / "routing.json").is_file()
    assert found.max_document_tokens == 77 and found.temperature == 0.07 and found.model.config == ours.model.config
    if kind != "bfloat16":
        assert_alike(start(folder), ours.model)


def test_a_whole_export_has_the_frozen_backbone_bit_by_bit(
    trained: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    for kind in ("grown", "untied"):
        backbone, run = trained(kind)
        before = load_file(backbone / "model.safetensors")
        after = load_file(export_run(run, tmp_path / kind) / "model.safetensors")
        assert after.keys() == before.keys() | PUBLISHED.keys() and len(before) > 20
        for name, weight in before.items():
            assert torch.equal(after[name][: len(weight)], weight), name


def test_another_precision_rounds_both(trained: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    folder = export_run(trained()[1], tmp_path / "alone", "bfloat16", only="routers")
    assert {weight.dtype for weight in load_file(folder / "routers.safetensors").values()} == {torch.bfloat16}
    wanted = open_run(trained()[1]).model
    for weight in wanted.parameters():  # not buffers, RoPE's among them
        weight.data = weight.data.to(torch.bfloat16)
    assert_alike(open_run(folder).model, wanted, torch.bfloat16)


def test_a_bank_and_an_answer_are_the_runs_wherever_the_backbone_is(
    trained: Callable[..., tuple[Path, Path]], alone: Path, corpus_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    backbone, run = trained()
    moved = shutil.copytree(backbone, tmp_path / "moved")
    edit(alone, lambda values: values["msa_train"].update(backbone="nowhere"))
    with pytest.raises(UserError, match="cannot open 'nowhere'.*say where that backbone is"):
        cli.build(["ask", "--model", str(alone), "--bank", "none", "Where?"])
    said = []
    for number, model in enumerate(([str(run)], [str(alone), "--backbone", str(moved)])):
        out = tmp_path / f"bank{number}"
        cli.build(["encode", "--model", *model, "--corpus", str(corpus_folder), "--out", str(out)])
        capsys.readouterr()
        asked = ["--bank", str(tmp_path / "bank0"), "--max_new_tokens=6", "Where does the red fox live?"]
        cli.build(["ask", "--model", *model, *asked])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "[" in said[0]
    segments = [sorted(file.name for file in (tmp_path / f"bank{n}").glob("*.safetensors")) for n in (0, 1)]
    assert segments[0] == segments[1] != [], "named by their content"
    with pytest.raises(UserError, match="--backbone is for routers alone"):
        cli.build(["ask", "--model", str(run), "--backbone", str(moved), "--bank", "none", "Where?"])


def test_they_are_tested_without_training(
    trained: Callable[..., tuple[Path, Path]], alone: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    """As a backbone, and as routers for one that lies elsewhere: what the run's own checkpoint gives."""
    backbone, run = trained()
    shared = {**SIZES, "model.phases": ROUTERS, "model.routing_words": "prompt", "data.max_document_tokens": 77}
    ways: list[dict[str, Any]] = [
        {"model.backbone": backbone, "ckpt_path": "last"},
        {"model.backbone": alone},
        {"model.backbone": backbone, "model.init_from": alone},
        {"model.backbone": backbone},
    ]
    found = []
    for way in ways:
        tested = cli.build(["test", *tiny_run(run.parent, name=run.name, **shared, **way)])
        found.append({name: float(value) for name, value in tested.trainer.callback_metrics.items()})
    assert found[0] == found[1] == found[2] and len(found[0]) > 10
    assert found[0] != found[3], "whose routers are not trained"


def test_what_starts_from_them_exports_the_same_bytes(
    trained: Callable[..., tuple[Path, Path]], alone: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    backbone, _ = trained()
    for name, way in (
        ("backbone", {"model.backbone": alone}),
        ("routers", {"model.backbone": backbone, "model.init_from": alone}),
    ):
        flags = {**SIZES, **way, "model.phases": STILL, "model.routing_words": "prompt", "model.temperature": 0.07}
        cli.build(["fit", *tiny_run(tmp_path / "runs", name=name, **flags, **{"data.max_document_tokens": 77})])
        again = export_run(tmp_path / "runs" / name, tmp_path / name, only="routers")
        for file in ("routers.safetensors", "config.json"):
            assert (again / file).read_bytes() == (alone / file).read_bytes(), "the backbone's name among it"
    whole = export_run(alone, tmp_path / "whole")
    assert_alike(open_run(whole).model, open_run(alone).model)
    back = export_run(whole, tmp_path / "back", only="routers", backbone=str(backbone))
    assert (back / "routers.safetensors").read_bytes() == (alone / "routers.safetensors").read_bytes()


def test_the_card_names_the_backbone(trained: Callable[..., tuple[Path, Path]], alone: Path, tmp_path: Path) -> None:
    card = (alone / "README.md").read_text()
    assert card.count(f"`{trained()[0]}`") == 2 and "layers 0, 1 |" in card and "{" not in card
    assert "--backbone WHERE" in card and str(tmp_path) not in card


# --- nothing else is --------------------------------------------------------------------------------------------------


OTHER: dict[str, tuple[Callable[[Path], Path], str]] = {
    "sizes": (lambda out: write_backbone(out, vocab_size=301, intermediate_size=56), "intermediate_size is 56, .* 48"),
    "vocabulary": (lambda out: write_backbone(out, vocab_size=302), "vocab_size is 302, .* 301"),
    "type": (lambda out: write_backbone(out, vocab_size=301, model_type="llama"), "its model_type is llama, .* qwen3"),
    "weights": (lambda out: write_backbone(out, seed=1, vocab_size=301), "same sizes but of other weights"),
    "nothing": (lambda out: out, "cannot open"),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_backbone_is_refused(case: str, alone: Path, tmp_path: Path) -> None:
    make, message = OTHER[case]
    other = make(tmp_path / "other")
    sizes = MSAConfig(chunk_size=8, top_k=2, routed_layers=(0, 1))
    further = MemorySparseModule(str(other), [Phase("only", 1)], sizes, init_from=str(alone))
    for opening in (lambda: open_run(alone, str(other)), lambda: further._started(str(alone))):
        with pytest.raises(UserError, match=message) as told:
            opening()
        assert "\n" not in str(told.value) and str(other) in str(told.value)
    if case in ("sizes", "type", "nothing"):
        with pytest.raises(UserError, match=message):
            further.preflight(None, None)


def test_other_layers_are_refused_before_anything_is_made(alone: Path, trained: Callable[..., Any]) -> None:
    module = MemorySparseModule(str(trained()[0]), [Phase("only", 1)], MSAConfig(), init_from=str(alone))
    with pytest.raises(UserError, match=r"routed_layers are \[1\], but .* has routers in layers \[0, 1\]"):
        module.preflight(None, None)


def incomplete(folder: Path) -> None:
    weights = load_file(folder / "routers.safetensors")
    del weights["model.embed_tokens.weight.grown"]
    save_file(weights, folder / "routers.safetensors")


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no routers": (lambda folder: (folder / "routers.safetensors").unlink(), "cannot open"),
    "cut": (lambda folder: (folder / "routers.safetensors").write_bytes(b"1234567"), "not readable weights"),
    "no rows": (incomplete, "not the rows 'model.embed_tokens.weight.grown'"),
    "no sum": (lambda folder: edit(folder, lambda v: v["msa_train"].pop("backbone_sha256")), "backbone incompletely"),
    "itself": (
        lambda folder: edit(folder, lambda v: v["msa_train"].update(backbone=str(folder))), "is routers alone too"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_with_the_folder_is_one_line(case: str, alone: Path) -> None:
    damage, message = DAMAGED[case]
    damage(alone)
    with pytest.raises(UserError, match=message) as told:
        open_run(alone)
    assert "\n" not in str(told.value)


def test_a_run_that_is_more_than_its_routers_is_refused(
    trained: Callable[..., tuple[Path, Path]], tiny_run: Arguments, tmp_path: Path
) -> None:
    backbone, run = trained()
    cli.build(["fit", *tiny_run(tmp_path, steps=1, name="all", **SIZES, **{"model.backbone": backbone})])
    cli.build(["fit", *tiny_run(tmp_path, name="random", **SIZES, **{"model.phases": STILL})])
    further = {**SIZES, "model.phases": STILL, "model.backbone": backbone}
    start = {"model.init_from": tmp_path / "all" / "last.ckpt"}
    cli.build(["fit", *tiny_run(tmp_path, name="further", **further, **start)])
    whole = export_run(run, tmp_path / "whole")
    for name, message in (
        (tmp_path / "all", "phase 'only' trained the backbone too.*export the whole, without --only"),
        (tmp_path / "random", "its backbone had random weights.*export the whole"),
        (tmp_path / "further", "has another 'model.* than the run: its backbone was trained too.*export the whole"),
        (whole, "does not say what its backbone was: give the run's own, or --backbone"),
    ):
        with pytest.raises(UserError, match=message) as told:
            export_run(name, tmp_path / "out", only="routers")
        assert "\n" not in str(told.value) and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--backbone goes with --only routers"):
        export_run(run, tmp_path / "out", backbone=str(backbone))
