"""Routers alone, with the backbone that they were trained on, are the run bit by bit, adapters beside them included;
with another one they are not."""

from __future__ import annotations

import filecmp
import importlib.util
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
from msa_train.lora import LoRA
from msa_train.module import MemorySparseModule
from msa_train.phases import Phase
from msa_train.runs import open_run
from tests.conftest import TINY_BACKBONE, tiny_pack

Arguments = Callable[..., list[str]]
SIZES = {"model.msa.routed_layers": "[0, 1]", "model.msa.chunk_size": 8, "model.msa.top_k": 2}
ROUTERS = json.dumps(
    [{"name": "warm", "steps": 2, "router_lr": 3e-3, "routing_weight": 1.0, "trainable": "routers", "top_k": 1},
     {"name": "on", "steps": 1, "router_lr": 3e-3, "routing_weight": 1.0, "trainable": "routers"}]
)  # fmt: skip
BOTH = json.dumps(
    [{"name": "warm", "steps": 1, "router_lr": 3e-3, "routing_weight": 1.0, "trainable": "routers", "top_k": 1},
     {"name": "all", "steps": 2, "router_lr": 3e-3, "routing_weight": 1.0, "backbone_lr": 3e-2, "schedule": "constant"}]
)  # fmt: skip
LORA = {"rank": 3, "alpha": 7, "dropout": 0.25, "targets": ["q_proj", "v_proj", "up_proj"]}
STILL = json.dumps([{"name": "still", "steps": 1, "router_lr": 0.0, "trainable": "routers"}])
# the tokenizer has 366 tokens: the first grows its embeddings by 65 rows, tied, the second by 37, untied
KINDS: dict[str, dict[str, Any]] = {
    "grown": {"vocab_size": 301},
    "untied": {"vocab_size": 329, "tie_word_embeddings": False, "model_type": "llama",
               "rope_parameters": {"rope_type": "llama3", "rope_theta": 900.0, "factor": 4.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 3.0, "original_max_position_embeddings": 128}},
    "bfloat16": {"vocab_size": 411},
}  # fmt: skip
ADAPTED: dict[str, dict[str, Any]] = {"adapted": {"vocab_size": 301}, "adapted bfloat16": {"vocab_size": 411}}
DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PUBLISHED = {
    f"model.layers.{layer}.self_attn.router_{kind}_proj.0.weight": (width, 32)
    for layer in (0, 1)
    for kind, width in (("q", 32), ("k", 16))
}
ADAPTERS = {
    f"model.layers.{layer}.{name}.lora_{half}.default.weight": shape
    for layer in (0, 1)
    for name, width in (("self_attn.q_proj", 32), ("self_attn.v_proj", 16), ("mlp.up_proj", 48))
    for half, shape in (("A", (3, 32)), ("B", (width, 3)))
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
        backbone, weights = root / f"{kind} backbone", "bfloat16" if "bfloat16" in kind else "float32"
        if not backbone.exists():
            write_backbone(backbone, dtype=DTYPE[weights], **{**KINDS, **ADAPTED}[kind])
            flags = {
                **SIZES, "model.backbone": backbone, "model.weights": weights, "model.temperature": 0.07,
                "model.phases": ROUTERS, "model.routing_words": "prompt", "data.max_document_tokens": 77,
                "trainer.limit_val_batches": 1.0, "trainer.val_check_interval": 3,
                **({"model.phases": BOTH, "model.lora": json.dumps(LORA)} if kind in ADAPTED else {}),
            }  # fmt: skip
            cli.build(["fit", *tiny_run(root, name=kind, **flags)])
        return backbone, root / kind

    return made


@pytest.fixture
def alone(trained: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return export_run(trained()[1], tmp_path / "alone", only="routers")


@pytest.fixture
def adapted(trained: Callable[..., tuple[Path, Path]], tmp_path: Path) -> Path:
    return export_run(trained("adapted")[1], tmp_path / "adapted", only="routers")


def module_of(backbone: Path, **given: Any) -> MemorySparseModule:
    """A run's module, not built."""
    sizes = MSAConfig(chunk_size=8, top_k=2, routed_layers=(0, 1))
    return MemorySparseModule(str(backbone), [Phase("only", 1)], sizes, **given)


def start(backbone: Path) -> Any:
    """What a run that starts from a folder starts from."""
    return module_of(backbone).untrained().eval()


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


@pytest.mark.parametrize("kind", ["grown", "adapted"])
def test_a_run_and_its_config_test_the_folder(
    kind: str, trained: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """By the run's own config.yaml, without its checkpoint: as many documents are selected as in the last phase."""
    run = trained(kind)[1]
    folder = export_run(run, tmp_path / "alone", only="routers")
    flags = ["test", "--config", str(run / "config.yaml")]
    found = []
    for way in (["--ckpt_path", "last"], ["--model.init_from", str(folder)], []):
        tested = cli.build([*flags, *way])
        found.append({name: float(value) for name, value in tested.trainer.callback_metrics.items()})
    assert found[0] == found[1] and len(found[0]) > 10
    assert found[0] != found[2], "which is not trained"


# --- with adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_and_routers_and_their_backbone_are_the_merged_export(
    kind: str, dtype: Any, trained: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    backbone, run = trained(kind)
    whole = export_run(run, tmp_path / "whole", dtype)
    alone = export_run(run, tmp_path / "alone", dtype, only="routers")
    assert [file.name for file in alone.glob("*.safetensors")] == ["routers.safetensors"]
    weights = load_file(alone / "routers.safetensors")
    shapes = {name: tuple(weight.shape) for name, weight in weights.items() if not name.endswith(".grown")}
    assert shapes == {**PUBLISHED, **ADAPTERS} and len(ADAPTERS) == 12
    assert len(weights) == len(shapes) + (kind == "adapted")
    kept = DTYPE[dtype or ("bfloat16" if "bfloat16" in kind else "float32")]
    assert {weight.dtype for weight in weights.values()} == {kept}
    facts = json.loads((alone / "config.json").read_text())["msa_train"]["lora"]
    assert facts == {"rank": 3, "alpha": 7.0, "targets": ["q_proj", "up_proj", "v_proj"]}

    found, wanted = open_run(alone), open_run(whole)
    assert_alike(found.model, wanted.model, kept)
    assert found.layer_weights == wanted.layer_weights and found.lora is not None and wanted.lora is None
    if dtype is None:
        assert_alike(found.model, open_run(run).model, kept)
    if kept == torch.float32:
        assert_alike(start(alone), wanted.model)
    # and they were trained: without them it is another decoder
    plain = dict(AutoModelForCausalLM.from_pretrained(backbone, dtype=kept).named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(dict(found.model.backbone.named_parameters())[name], plain[name])
    again = export_run(alone, tmp_path / "again")
    assert filecmp.cmp(again / "model.safetensors", whole / "model.safetensors", shallow=False)
    back = export_run(alone, tmp_path / "back", only="routers")
    for file in ("routers.safetensors", "config.json"):
        assert (back / file).read_bytes() == (alone / file).read_bytes()


def test_a_bank_and_an_answer_are_the_merged_exports(
    trained: Callable[..., tuple[Path, Path]], corpus_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Through the command line, and wherever the backbone is."""
    backbone, run = trained("adapted")
    moved = shutil.copytree(backbone, tmp_path / "moved")
    cli.build(["export", str(run), "--out", str(tmp_path / "whole")])
    cli.build(["export", str(run), "--out", str(tmp_path / "alone"), "--only", "routers"])
    edit(tmp_path / "alone", lambda values: values["msa_train"].update(backbone=str(tmp_path / "gone")))
    said = []
    for number, model in enumerate(([tmp_path / "whole"], [tmp_path / "alone", "--backbone", moved])):
        opened = ["--model", *map(str, model)]
        out = tmp_path / f"bank{number}"
        cli.build(["encode", *opened, "--corpus", str(corpus_folder), "--out", str(out)])
        capsys.readouterr()
        asked = ["--bank", str(tmp_path / "bank0"), "--max_new_tokens=6", "Where does the red fox live?"]
        cli.build(["ask", *opened, *asked])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "[" in said[0]
    segments = [sorted(file.name for file in (tmp_path / f"bank{n}").glob("*.safetensors")) for n in (0, 1)]
    assert segments[0] == segments[1] != [], "named by their content"


def test_a_run_with_the_same_adapters_trains_them_on(
    trained: Callable[..., tuple[Path, Path]], adapted: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    backbone, _ = trained("adapted")
    shared = {
        **SIZES, "model.backbone": backbone, "model.init_from": adapted, "model.routing_words": "prompt",
        "model.temperature": 0.07, "model.lora": json.dumps({**LORA, "dropout": 0.5}), "data.max_document_tokens": 77,
    }  # fmt: skip
    for name, phases in (("still", STILL), ("on", BOTH)):
        cli.build(["fit", *tiny_run(tmp_path / "runs", name=name, **{**shared, "model.phases": phases})])
        export_run(tmp_path / "runs" / name, tmp_path / name, only="routers")
    for file in ("routers.safetensors", "config.json"):
        assert (tmp_path / "still" / file).read_bytes() == (adapted / file).read_bytes(), "nothing was merged"
    before, after = (load_file(folder / "routers.safetensors") for folder in (adapted, tmp_path / "on"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == PUBLISHED.keys() | ADAPTERS.keys()
    built = module_of(backbone, lora=LoRA(3, 7.0, 0.5, ("q_proj", "v_proj", "up_proj")))._started(str(adapted))
    drops = [part.p for part in built.modules() if isinstance(part, torch.nn.Dropout)]
    assert drops == [0.5] * 6, "the run's own"
    frozen = {name for name, weight in built.backbone_parameters() if not weight.requires_grad}
    assert {name for name, _ in built.backbone_parameters()} - frozen == {f"backbone.{name}" for name in ADAPTERS}


@pytest.mark.parametrize("way", ["backbone", "init_from"])
def test_a_run_without_adapters_trains_what_they_are_merged_into(
    way: str, trained: Callable[..., tuple[Path, Path]], adapted: Path, tiny_run: Arguments, tmp_path: Path
) -> None:
    backbone, _ = trained("adapted")
    given = {"backbone": {"model.backbone": adapted}, "init_from": {"model.backbone": backbone}}[way]
    flags = {**SIZES, **given, **({"model.init_from": adapted} if way == "init_from" else {})}
    fitted = cli.build(["fit", *tiny_run(tmp_path / "runs", steps=1, name="on", **flags)])
    merged = dict(open_run(adapted).model.named_parameters())
    after = dict(fitted.model.net.named_parameters())
    assert after.keys() == merged.keys() and len(after) > 20
    assert not [name for name, weight in after.items() if torch.equal(weight, merged[name])], "all of it is trained"
    flags["model.phases"] = STILL
    cli.build(["fit", *tiny_run(tmp_path / "runs", name="still", **flags)])
    assert_alike(open_run(tmp_path / "runs" / "still").model, open_run(adapted).model)
    message = {"backbone": f"had the adapters of '{adapted}' merged", "init_from": "or adapters were merged into it"}
    with pytest.raises(UserError, match=f"{message[way]}.*export the whole, without --only"):
        export_run(tmp_path / "runs" / "still", tmp_path / "out", only="routers")


def test_they_are_tested_merged_in_a_run_without_adapters(
    trained: Callable[..., tuple[Path, Path]], adapted: Path, tmp_path: Path
) -> None:
    backbone, run = trained("adapted")
    whole = export_run(run, tmp_path / "whole")
    flags = ["test", "--config", str(run / "config.yaml"), "--model.lora", "null"]
    found = []
    for way in (
        ["--model.backbone", str(whole)],
        ["--model.backbone", str(adapted)],
        ["--model.init_from", str(adapted)],
        ["--model.backbone", str(backbone)],
    ):
        tested = cli.build([*flags, *way])
        found.append({name: float(value) for name, value in tested.trainer.callback_metrics.items()})
    assert found[0] == found[1] == found[2] != found[3] and len(found[0]) > 10


def test_other_adapters_than_the_runs_are_refused(trained: Callable[..., tuple[Path, Path]], adapted: Path) -> None:
    other = module_of(trained("adapted")[0], init_from=str(adapted), lora=LoRA(rank=5))
    for opening in (lambda: other.preflight(None, None), lambda: other._started(str(adapted))):
        with pytest.raises(UserError, match='"rank": 3.*this run has .*"rank": 5.*give the same .*, none ') as told:
            opening()
        assert "\n" not in str(told.value)
    assert isinstance(module_of(adapted, lora=LoRA(rank=5)).untrained(), torch.nn.Module), "new ones beside the merged"


def test_the_card_tells_of_adapters(trained: Callable[..., tuple[Path, Path]], adapted: Path, tmp_path: Path) -> None:
    card = (adapted / "README.md").read_text()
    numbers = 2 * 3 * (32 + 32 + 32 + 16 + 32 + 48)
    assert f"| adapters | LoRA of rank 3, alpha 7, on q_proj, up_proj, v_proj; {numbers:,} parameters |" in card
    plain = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(trained("adapted")[0]).parameters())
    assert f"| backbone | qwen3, {plain + 65 * 32:,} parameters, float32 |" in card and "peft" in card
    whole = (export_run(trained("adapted")[1], tmp_path / "whole") / "README.md").read_text()
    assert "on q_proj, up_proj, v_proj; merged into the backbone |" in whole
    none = (export_run(trained()[1], tmp_path / "none", only="routers") / "README.md").read_text()
    assert "adapters" not in none and "peft" not in none and "{" not in card + whole + none


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
    further = module_of(other, init_from=str(alone))
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


def reweigh(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "routers.safetensors")
        change(weights)
        save_file(weights, folder / "routers.safetensors")

    return damage


def recount(**facts: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, lambda values: values["msa_train"]["lora"].update(facts))


A, B = "model.layers.1.mlp.up_proj.lora_A.default.weight", "model.layers.1.mlp.up_proj.lora_B.default.weight"
AGAIN = ".*export.* again"
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one is missing": (reweigh(lambda w: w.pop(B)), rf"'{B}' is missing, by its config.json it must be \(48, 3\)"),
    "all are missing": (reweigh(lambda w: [w.pop(name) for name in ADAPTERS]), "lora_A.default.weight' is missing"),
    "another rank": (
        reweigh(lambda w: w.update({A: torch.zeros(5, 32), B: torch.zeros(48, 5)})),
        rf"'{A}' is \(5, 32\), by its config.json it must be \(3, 32\)",
    ),
    "another rank by the config": (recount(rank=2**62), r"is \(3, 32\), by its config.json it must be \(4611686018"),
    "another layer's": (reweigh(lambda w: w.update({B: w[B][:32].clone()})), r"is \(32, 3\), .* must be \(48, 3\)"),
    "more than is told": (recount(targets=["q_proj", "v_proj"]), "up_proj.lora_A.default.weight' is .* must be absent"),
    "nothing is told": (
        lambda folder: edit(folder, lambda values: values["msa_train"].pop("lora")), "is .* must be absent"
    ),
    "what is told is unreadable": (recount(rank="many"), "its facts say nothing readable of its adapters"),
    "too much is told": (recount(rank=float("inf")), "its facts say nothing readable of its adapters"),
    "cut": (lambda folder: (folder / "routers.safetensors").write_bytes(b"1234567"), "not readable weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_adapters_that_are_not_what_they_should_be_are_refused(
    case: str, adapted: Path, trained: Callable[..., tuple[Path, Path]]
) -> None:
    """When the folder is opened, and before a run that would open it makes anything."""
    damage, message = WRONG[case]
    damage(adapted)
    started = module_of(trained("adapted")[0], init_from=str(adapted))
    for opening in (
        lambda: open_run(adapted),
        lambda: export_run(adapted, adapted.parent / "out"),
        lambda: started.preflight(None, None),
        lambda: module_of(adapted).preflight(None, None),
    ):
        with pytest.raises(UserError, match=message + AGAIN) as told:
            opening()
        assert "\n" not in str(told.value)


def test_adapters_without_their_library_are_refused(
    adapted: Path, alone: Path, trained: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else find(name, *more))
    started = module_of(trained("adapted")[0], init_from=str(adapted))
    for opening in (lambda: open_run(adapted), lambda: started.preflight(None, None)):
        with pytest.raises(UserError, match=r"need peft: pip install 'msa-train\[lora\]'"):
            opening()
    assert open_run(alone).lora is None, "which has none"


@pytest.mark.parametrize("case", ["sizes", "weights"])
def test_adapters_with_another_backbone_are_refused(case: str, adapted: Path, tmp_path: Path) -> None:
    make, message = OTHER[case]
    other = make(tmp_path / "other")
    started = module_of(other, init_from=str(adapted))
    for opening in (lambda: open_run(adapted, str(other)), lambda: started._started(str(adapted))):
        with pytest.raises(UserError, match=message):
            opening()


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
