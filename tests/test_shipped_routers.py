"""checkpoints/smollm2_135m_memory: what is shipped is what its card and the recipe say. The backbone is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "checkpoints" / "smollm2_135m_memory"
RECIPE = yaml.safe_load((ROOT / "configs/smollm2_135m/memory.yaml").read_text())
CONFIG = json.loads((FOLDER / "config.json").read_text())
CARD = (FOLDER / "README.md").read_text()


def test_weights_are_routers_and_adapters_of_the_recipe() -> None:
    with safe_open(FOLDER / "routers.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"BF16"}
    assert shapes.pop("model.embed_tokens.weight.grown") == (1, 576), "the protocol's own token"
    adapters = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    routers = {name: shape for name, shape in shapes.items() if name not in adapters}
    assert {int(re.findall(r"layers\.(\d+)\.", name)[0]) for name in routers} == set(range(15, 30))
    assert {int(re.findall(r"layers\.(\d+)\.", name)[0]) for name in adapters} == set(range(30))
    assert {min(shape) for shape in adapters.values()} == {RECIPE["model"]["lora"]["rank"]}
    numbers = [sum(a * b for a, b in part.values()) for part in (routers, adapters)]
    assert all(f"{number:,}" in CARD for number in numbers) and (FOLDER / "routers.safetensors").stat().st_size < 24e6


def test_it_belongs_to_the_recipes_backbone_and_memory() -> None:
    ours, memory = CONFIG["msa_train"], CONFIG["msa_config"]
    assert ours["backbone"] == RECIPE["model"]["backbone"] and re.fullmatch("[0-9a-f]{64}", ours["backbone_sha256"])
    assert (ours["lora"]["rank"], ours["lora"]["alpha"]) == tuple(RECIPE["model"]["lora"].values())
    assert ours["max_document_tokens"] == RECIPE["data"]["init_args"]["max_document_tokens"]
    assert memory["pooling_kernel_size"] == RECIPE["model"]["msa"]["chunk_size"]
    assert memory["top_k_docs"] == RECIPE["model"]["msa"]["top_k"]
    assert memory["infonce_loss_temp"] == RECIPE["model"]["temperature"]
    steps = sum(phase["steps"] for phase in RECIPE["model"]["phases"])
    recall = json.loads((FOLDER / "routing.json").read_text())
    assert recall["step"] == steps and f"{steps} steps" in CARD and min(recall["recall@1"].values()) > 0.75


def test_its_scores_are_those_of_the_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/smollm2_memory.json").read_text())
    seed = result["variants"]["seed0"]
    layers = seed["held_out"]["test"]["last"]["recall@1"]
    recall = json.loads((FOLDER / "routing.json").read_text())["recall@1"]
    assert {name: value for name, value in layers.items() if name != "overall"} == recall
    assert seed["report"]["step"] == sum(phase["steps"] for phase in RECIPE["model"]["phases"])
    assert [call["code"] for call in seed["training"]] == [-9, 0]
