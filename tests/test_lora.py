"""Adapters are in the forward pass, alone are trained of the backbone, and merge into a plain decoder."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from msa_train import cli, model
from msa_train.checkpoints import newest_checkpoint, read_checkpoint
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.estimate.sizes import Model
from msa_train.export import export_run
from msa_train.lora import LoRA, adapt, adapters_of, check_adapters_in, merge, own_weights, restore_adapters
from msa_train.model import MemorySparseModel, Recompute
from msa_train.module import parameter_groups
from msa_train.runs import open_run
from tests.conftest import tiny_backbone, tiny_pack

Arguments = Callable[..., list[str]]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32: B A x summed up is rounded elsewhere than (W + B A) x
LORA = {"model.lora": json.dumps({"rank": 3, "alpha": 7, "dropout": 0.25, "targets": ["q_proj", "v_proj", "up_proj"]})}
PHASE: dict[str, Any] = {"routing_weight": 1.0, "backbone_lr": 3e-2, "router_lr": 3e-3, "schedule": "constant"}


def adapted(lora: LoRA, model_type: str = "qwen3", recompute: Recompute = "none", trained: bool = True) -> Any:
    """The tiny model with adapters, as drawn or as if they had been trained."""
    backbone = tiny_backbone(model_type)
    torch.manual_seed(2)
    adapt(backbone, lora)
    if trained:
        with torch.no_grad():
            for name, weight in backbone.named_parameters():
                if ".lora_B." in name:
                    weight.normal_(std=0.1)
    torch.manual_seed(1)
    return MemorySparseModel(backbone, MSAConfig(chunk_size=4, top_k=2), recompute=recompute).eval()


@torch.no_grad()
def computed(net: MemorySparseModel) -> list[torch.Tensor]:
    """What documents, contexts and the plain decoder make of the weights."""
    output = net(tiny_pack())
    return [output.doc_score_LQD, net.logits(output.hidden_AM), net.backbone(torch.arange(33)[None]).logits]


# --- in the decoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_input_is_copied_to_another_precision_for_the_adapters(dtype: torch.dtype) -> None:
    """Under autocast they compute as the layers beside them do, and in a decoder of any precision they have its own."""
    backbone = tiny_backbone("llama").to(dtype)
    adapt(backbone, LoRA(rank=3, alpha=7, targets=("q_proj",)))
    layer = backbone.get_submodule("model.layers.0.self_attn.q_proj")
    adapters = [weight for name, weight in layer.named_parameters() if name.startswith("lora_")]
    assert [weight.dtype for weight in adapters] == [dtype, dtype]
    for weight in adapters:
        weight.data.normal_()
    given: list[torch.dtype] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].dtype))
    states = torch.randn(5, layer.in_features, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(states)
        low, high = (weight.bfloat16() for weight in adapters)
        wanted = layer.base_layer(states) + (states @ low.T @ high.T) * (7 / 3)
    assert given == [torch.bfloat16] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("model_type", model.SUPPORTED)
def test_adapters_are_in_the_forward_pass_and_merge_into_the_weights(model_type: str) -> None:
    plain = adapted(LoRA(), model_type, trained=False)
    before = computed(plain)
    merge(plain.backbone)
    for found, wanted in zip(computed(plain), before, strict=True):
        assert torch.equal(found, wanted), "B is 0 at first"
    net = adapted(LoRA(rank=3, alpha=5.0), model_type)
    with_adapters = computed(net)
    for found, wanted in zip(with_adapters, before, strict=True):
        assert (found - wanted).abs().max() > 1e-2
    merge(net.backbone)
    for found, wanted in zip(computed(net), with_adapters, strict=True):
        torch.testing.assert_close(found, wanted, **TOLERANCE)
    ordinary = MemorySparseModel(tiny_backbone(model_type), MSAConfig(chunk_size=4, top_k=2)).state_dict()
    assert {name: weight.shape for name, weight in net.state_dict().items()} == {
        name: weight.shape for name, weight in ordinary.items()
    }
    assert not hasattr(net.backbone, "peft_config")
    assert all(weight.requires_grad for weight in net.parameters()), "adapters had frozen them"


@pytest.mark.parametrize("target", LoRA().targets)
def test_each_target_is_heard_alone(target: str) -> None:
    lora = LoRA(rank=2, targets=(target,))  # type: ignore[arg-type]
    net = adapted(lora)
    names = [name for name, _ in net.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * 4 and all(f".{target}.lora_" in name for name in names)
    silent = computed(adapted(lora, trained=False))
    assert all((found - wanted).abs().max() > 1e-4 for found, wanted in zip(computed(net), silent, strict=True))


def test_a_merged_weight_is_the_sum_rounded_once() -> None:
    net = adapted(LoRA(rank=3, alpha=5.0)).to(torch.bfloat16)
    layer = net.backbone.model.layers[1].mlp.up_proj
    parts = (layer.base_layer, layer.lora_A.default, layer.lora_B.default)
    base, first, second = (part.weight.float() for part in parts)
    wanted = (base + second @ first * (5.0 / 3)).to(torch.bfloat16)
    merge(net.backbone)
    assert torch.equal(net.backbone.model.layers[1].mlp.up_proj.weight, wanted) and wanted.shape == (40, 24)


def test_every_trained_weight_is_in_one_group_and_no_other_in_any() -> None:
    net = adapted(LoRA())
    groups = {group["name"]: group for group in parameter_groups(net, 0.5)}
    names = ["model." + name for name, _ in net.named_parameters()]
    found = {group: sorted(name for name, _ in groups[group]["params"]) for group in groups}
    assert groups.keys() == {"routers", "backbone"} and groups["backbone"]["weight_decay"] == 0.5
    assert found["routers"] == sorted(name for name in names if ".router_" in name)
    assert found["backbone"] == sorted(name for name in names if ".lora_" in name)
    assert len(found["backbone"]) == 4 * 7 * 2 and len(found["routers"]) == 2 * 2


@pytest.mark.parametrize("model_type", model.SUPPORTED)
def test_adapters_apart_from_a_decoder_are_restored_in_another(model_type: str, tmp_path: Path) -> None:
    lora, file = LoRA(rank=3, alpha=5.0), tmp_path / "adapters.safetensors"
    net = adapted(lora, model_type)
    adapters, plain = adapters_of(net.backbone), tiny_backbone(model_type)
    assert len(adapters) == 4 * 7 * 2 and not adapters_of(plain)
    weights = own_weights(plain)
    assert len(weights) > 20
    assert {name: weight for name, weight in own_weights(net.backbone).items() if ".router_" not in name}.keys() == (
        weights.keys()
    )
    assert all(torch.equal(own_weights(net.backbone)[name], weight) for name, weight in weights.items())
    save_file({**adapters, "another": torch.zeros(2)}, file)
    for decoder in (plain, net.backbone):
        check_adapters_in(file, decoder, lora)
        for other in (LoRA(rank=4), LoRA(rank=3, targets=("q_proj",)), None):
            with pytest.raises(UserError, match=r"'model.layers.0.* is .*by its config.json it must be"):
                check_adapters_in(file, decoder, other)
    restore_adapters(file, plain, lora)
    assert adapters_of(plain).keys() == adapters.keys()
    assert all(torch.equal(adapters_of(plain)[name], weight) for name, weight in adapters.items())
    save_file({"another": torch.zeros(2)}, file)
    restore_adapters(file, bare := tiny_backbone(model_type), None)
    assert own_weights(bare).keys() == weights.keys()


@pytest.mark.parametrize("recompute", ["layers", "documents"])
def test_what_is_recomputed_drops_the_same(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        net = adapted(LoRA(rank=3, dropout=0.5), recompute=recompute).train()
        torch.manual_seed(5)
        pack = tiny_pack()
        output = net(pack)
        (net.label_loss(output, pack.contexts) + output.doc_score_LQD.sum()).backward()
        return {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}

    found = gradients()
    monkeypatch.setattr(model, "checkpoint", lambda function, *given, **_: function(*given))
    wanted = gradients()
    assert found.keys() == wanted.keys() and sum(".lora_" in name for name in found) == 4 * 7 * 2
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


# --- in a run ---------------------------------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return read_checkpoint(checkpoint)["state_dict"]


def test_a_run_trains_adapters_and_routers_and_exports_a_plain_decoder(tiny_run: Arguments, tmp_path: Path) -> None:
    phases = json.dumps([{"name": "all", "steps": 3, **PHASE}])
    fitted = cli.build(["fit", *tiny_run(tmp_path, **LORA, **{"model.phases": phases})])
    start = fitted.model.untrained().state_dict()
    trained = weights_of(tmp_path / "tiny")
    changed = {name for name in start if not torch.equal(start[name], trained["model." + name])}
    assert changed == {name for name in start if ".lora_" in name or ".router_" in name}
    assert len(changed) == 2 * 3 * 2 + 2

    net, run = fitted.model.net.eval(), open_run(tmp_path / "tiny")
    with torch.no_grad():
        wanted, found = (one(tiny_pack(chunk_size=8)) for one in (net, run.model))
    torch.testing.assert_close(found.doc_score_LQD, wanted.doc_score_LQD, **TOLERANCE)
    folder = export_run(tmp_path / "tiny", tmp_path / "exported")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(301, (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = [one(tokens).logits for one in (plain, run.model.backbone, net.backbone)]
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[0], logits[2], **TOLERANCE)

    cli.build(["fit", *tiny_run(tmp_path, steps=1, name="without")])
    without = load_file(export_run(tmp_path / "without", tmp_path / "other") / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert {name: weight.shape for name, weight in weights.items()} == {n: w.shape for n, w in without.items()}
    with pytest.raises(UserError, match="its backbone had random weights.*export the whole, without --only"):
        export_run(tmp_path / "tiny", tmp_path / "alone", only="routers")


@pytest.mark.parametrize(("kept", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_an_export_in_another_precision_merges_in_it(
    kept: str, wanted: str, tiny_run: Arguments, tmp_path: Path
) -> None:
    phases = json.dumps([{"name": "all", "steps": 2, **PHASE}])
    cli.build(["fit", *tiny_run(tmp_path, **LORA, **{"model.phases": phases, "model.weights": kept})])
    trained, dtype = weights_of(tmp_path / "tiny"), getattr(torch, wanted)
    place = "model.backbone.model.layers.1.mlp.up_proj."
    names = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    base, first, second = (trained[place + name].to(dtype).float() for name in names)
    weights = load_file(export_run(tmp_path / "tiny", tmp_path / "out", wanted) / "model.safetensors")  # type: ignore[arg-type]
    found = weights["model.layers.1.mlp.up_proj.weight"]
    assert second.any() and torch.equal(found, (base + second @ first * (7 / 3)).to(dtype)) and found.dtype == dtype


def test_a_resumed_run_drops_what_it_would_have_dropped(tiny_run: Arguments, tmp_path: Path) -> None:
    """Through a phase of routers alone, in which adapters stay as they are."""
    phases = json.dumps(
        [{"name": "warm", "steps": 2, "trainable": "routers", **PHASE}, {"name": "all", "steps": 4, **PHASE}]
    )
    flags = {**LORA, "model.phases": phases, "model.recompute": "layers"}
    cli.build(["fit", *tiny_run(tmp_path, name="whole", **flags)])
    for limit in (2, 4, 6):
        resume = {} if limit == 2 else {"ckpt_path": "last"}
        cli.build(["fit", *tiny_run(tmp_path, name="parts", **flags, **resume, **{"trainer.max_steps": limit})])
        silent = [not weight.any() for name, weight in weights_of(tmp_path / "parts").items() if ".lora_B." in name]
        assert len(silent) == 2 * 3 and all(silent) == (limit == 2)
    whole, parts = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
    tested = cli.build(["test", *tiny_run(tmp_path, name="whole", **flags, ckpt_path="last")])
    assert 0 <= tested.trainer.callback_metrics["routing/recall@1/test"] <= 1


def test_a_checkpoint_with_other_adapters_is_refused(tiny_run: Arguments, tmp_path: Path) -> None:
    cli.build(["fit", *tiny_run(tmp_path, steps=1, **LORA)])
    last = newest_checkpoint(tmp_path / "tiny")
    other = {"model.lora": json.dumps({"rank": 3, "alpha": 8, "targets": ["q_proj", "v_proj", "up_proj"]})}
    for flags, here in (({}, "null"), (other, '"alpha": 8')):
        for way in ("model.init_from", "ckpt_path"):
            with pytest.raises(UserError, match=f'"alpha": 7.*this run has .*{here}.*start from that folder') as told:
                cli.build(["fit", *tiny_run(tmp_path, steps=1, name="other", **flags, **{way: last})])
            assert "\n" not in str(told.value)
    assert not (tmp_path / "other").exists()
    told = {"model.lora": json.dumps({**json.loads(LORA["model.lora"]), "dropout": 0.0})}
    cli.build(["fit", *tiny_run(tmp_path, steps=1, name="next", **told, **{"model.init_from": last})])


def test_an_estimate_counts_what_is_trained() -> None:
    net, plain = adapted(LoRA(rank=3)), MemorySparseModel(tiny_backbone(), MSAConfig(chunk_size=4, top_k=2))
    adapters = sum(weight.numel() for name, weight in net.named_parameters() if ".lora_" in name)
    # per layer: q 24 -> 32, k and v 24 -> 16, o 32 -> 24, gate and up 24 -> 40, down 40 -> 24
    assert adapters == 4 * 3 * (56 + 2 * 40 + 56 + 2 * 64 + 64)
    found, wanted = Model.of(net), Model.of(plain)
    assert (
        found.weights == wanted.weights + adapters and found.trained(False) == wanted.trained(False) == wanted.routers
    )
    assert found.trained(True) == adapters + wanted.routers and wanted.trained(True) == wanted.weights


def test_doctor_and_estimate_know_adapters(tiny_run: Arguments, tmp_path: Path, capsys: Any) -> None:
    said: dict[str, list[str]] = {}
    for job in ("doctor", "estimate"):
        for flags in ({}, LORA, {"model.lora": "{}"}):
            cli.build([job, *tiny_run(tmp_path, **flags)])
            said.setdefault(job, []).append(re.sub(r"\s+", " ", capsys.readouterr().out))
    assert all("ready to train" in words for words in said["doctor"])
    assert ["adapters: time" in words for words in said["estimate"]] == [False, True, True]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank is 0: give at least 1"),
        ({"alpha": 0}, "alpha is 0.*: give a number above 0"),
        ({"dropout": 1.0}, "dropout is 1.0: give a share"),
        ({"targets": []}, r"targets is \[\]: give some of q_proj, k_proj"),
        ({"targets": ["router_q_proj"]}, "router_q_proj"),
    ],
)
def test_a_wrong_setting_is_named(given: dict[str, Any], message: str, tiny_run: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        cli.build(["fit", *tiny_run(tmp_path, **{"model.lora": json.dumps(given)})])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"adapters .model.lora. need peft: pip install 'msa-train\[lora\]'"):
        adapt(tiny_backbone(), LoRA())


def test_facts_that_say_nothing_are_refused() -> None:
    lora = LoRA(rank=3, alpha=7, targets=("v_proj", "q_proj"))
    assert LoRA.of(json.loads(json.dumps(lora.facts)), "x") == LoRA(3, 7.0, 0.0, ("q_proj", "v_proj"))
    for facts in ({}, [], {**lora.facts, "rank": "many"}, {**lora.facts, "targets": ["lm_head"]}):
        with pytest.raises(UserError, match="x: its facts say nothing readable of its adapters"):
            LoRA.of(facts, "x")
