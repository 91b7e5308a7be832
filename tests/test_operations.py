"""Operations are those that PyTorch runs: every part against its counter, pairs against a loop over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamodules import PackedMemory
from msa_train.backbone import open_config
from msa_train.losses import routing_loss
from msa_train.model import MemorySparseModel
from msa_train.operations import ROUTERS, ModelSizes, PackSizes, forward_operations, training_operations
from msa_train.pack import MemoryPack
from tests.conftest import tiny_model, tiny_pack

UNEVEN = tiny_pack()
EVEN = tiny_pack(lengths=(8,) * 5, contexts=((5, 4),) * 3)  # five documents of two chunks, three contexts of 11 tokens
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QWEN3_4B = ModelSizes(36, tuple(range(18, 36)), 2560, 9728, 32, 8, 128, 151_936)  # Qwen3-4B


def run(model: MemorySparseModel, pack: MemoryPack, backward: bool = False) -> dict[str, dict[str, int]]:
    """Operations that PyTorch counts, per module and kind of product; attention as plain batched products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, depth=99) as counter:
        output = model(pack)
        loss = model.label_loss(output, pack.contexts) + routing_loss(output.doc_score_LQD, pack.positive_QD).sum()
        if backward:
            loss.backward()
    counts = counter.get_flop_counts()
    return {module: {str(kind): number for kind, number in kinds.items()} for module, kinds in counts.items()}


def products(counts: dict[str, dict[str, int]], *names: str) -> int:
    """Those of the modules of these names."""
    return sum(sum(kinds.values()) for module, kinds in counts.items() if module.rpartition(".")[2] in names)


@pytest.mark.parametrize("pack", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("routed", [(), (1,), (0, 2)], ids=str)
def test_every_linear_part_is_what_pytorch_runs(pack: MemoryPack, routed: tuple[int, ...]) -> None:
    model = tiny_model(routed_layers=routed).train()
    counts = run(model, pack)
    found = forward_operations(ModelSizes.of(model), PackSizes.of(pack, 4, 2))
    assert found["documents"] + found["contexts"] == products(counts, *LINEAR) > 10**6
    assert found["router_keys"] == products(counts, "router_k_proj") > 0
    assert found["router_queries"] == products(counts, "router_q_proj") > 0
    assert found["head"] == products(counts, "lm_head") > 0
    outside = counts["Global"]["aten.mm"] - products(counts, *LINEAR, "router_k_proj", "router_q_proj", "lm_head")
    assert found["scores"] == outside > 0


def test_attention_is_what_pytorch_runs_but_for_the_masked_half() -> None:
    """The counter counts whole squares; a causal sequence of n tokens has n(n-1)/2 masked pairs in it."""
    model = tiny_model().train()
    found = forward_operations(ModelSizes.of(model), PackSizes.of(EVEN, 4, 2))
    whole = run(model, EVEN)["Global"]["aten.bmm"]
    documents, head, context = 5 * 8 * 7 // 2, 3, 11
    masked = 3 * documents + 4 * (head * (head - 1) // 2 + 3 * context * (context - 1) // 2)
    assert found["document_pairs"] + found["context_pairs"] == whole - masked * 4 * 4 * 8


@pytest.mark.parametrize("trains_backbone", [True, False])
def test_backward_takes_what_pytorch_runs(trains_backbone: bool) -> None:
    """All but attention, which is uneven here: its backward is twice its forward, or nothing."""
    model = tiny_model().train()
    for _, weight in model.backbone_parameters():
        weight.requires_grad_(trains_backbone)
    sizes, pack = ModelSizes.of(model), PackSizes.of(UNEVEN, 4, 2)
    forward = forward_operations(sizes, pack)
    attention = forward["document_pairs"] + forward["context_pairs"]
    ran = run(model, UNEVEN, backward=True)["Global"]["aten.mm"]
    assert training_operations(sizes, pack, trains_backbone) == ran + (3 if trains_backbone else 1) * attention


def test_recomputation_is_not_counted_as_useful() -> None:
    plain, recomputing = tiny_model().train(), tiny_model(recompute="layers").train()
    pack = PackSizes.of(EVEN, 4, 2)
    assert ModelSizes.of(plain) == ModelSizes.of(recomputing)
    useful = training_operations(ModelSizes.of(recomputing), pack, True)
    ran = run(recomputing, EVEN, backward=True)["Global"]
    assert sum(run(plain, EVEN, backward=True)["Global"].values()) < 1.2 * useful < sum(ran.values())


def test_pairs_are_those_of_a_loop_over_tokens() -> None:
    """Where documents fill their last chunks alike and contexts are equally long, nothing is left to likelihood."""
    pack = tiny_pack(lengths=(7, 3, 11, 3), contexts=((5, 4),) * 3)
    excluded = torch.zeros_like(pack.positive_QD)
    excluded[2] = True
    pack = replace(pack, excluded_QD=excluded, asked=2)  # the third context is an instruction
    documents = sum(place + 1 for length in (7, 3, 11, 3) for place in range(length))
    contexts = sum(place + 1 for place in range(3)) + 3 * sum(3 + place + 1 for place in range(11))
    mean_chunks = (2 + 1 + 3 + 1) / 4
    sizes = PackSizes.of(pack, chunk_size=4, top_k=2)
    assert (sizes.document_pairs, sizes.context_pairs) == (documents, contexts)
    assert sizes.chunk_pairs == pytest.approx(2 * 11 * 2 * mean_chunks)
    assert PackSizes.of(pack, chunk_size=4, top_k=9).chunk_pairs == pytest.approx(2 * 11 * (2 + 1 + 3 + 1))
    assert (sizes.documents, sizes.chunks, sizes.contexts, sizes.routing, sizes.labels) == (24, 7, 36, 15, 12)


def test_no_tensor_is_read() -> None:
    """On the meta device there is nothing to read: a look at a value would be an error, as on a GPU a wait."""
    assert PackSizes.of(UNEVEN.to("meta"), 4, 2) == PackSizes.of(UNEVEN, 4, 2)
    assert ModelSizes.of(tiny_model().to("meta")) == ModelSizes.of(tiny_model())


def test_hand_worked_operations_of_the_published_size() -> None:
    """One document token of Qwen3-4B: 17 whole layers of 202M, keys and values of the last."""
    linear = 2 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
    assert linear == 201_850_880
    one = PackSizes(
        documents=1, document_pairs=1, chunks=0, contexts=0, context_pairs=0, chunk_pairs=0, routing=0, labels=0
    )
    found = forward_operations(QWEN3_4B, one)
    assert found["documents"] == 35 * linear + 4 * 2560 * 1024
    assert found["document_pairs"] == 35 * 4 * 4096
    label = replace(one, documents=0, document_pairs=0, labels=1)
    assert sum(forward_operations(QWEN3_4B, label).values()) == 2 * 2560 * 151_936
    assert training_operations(QWEN3_4B, label, trains_backbone=True) == 6 * 2560 * 151_936
    assert training_operations(QWEN3_4B, label, trains_backbone=False) == 2 * 2560 * 151_936


def test_a_frozen_backbone_costs_its_forward_pass_alone() -> None:
    sizes, pack = ModelSizes.of(tiny_model()), PackSizes.of(UNEVEN, 4, 2)
    forward = forward_operations(sizes, pack)
    routers = sum(forward[part] for part in ROUTERS)
    frozen = training_operations(sizes, pack, trains_backbone=False)
    assert frozen == sum(forward.values()) + routers + 2 * forward["scores"]
    assert frozen < training_operations(sizes, pack, trains_backbone=True) == 3 * sum(forward.values())


def test_what_the_host_does_not_know_hardly_matters(corpus_folder: Path) -> None:
    """Likely pairs against those of the real lengths, on packs of a corpus."""
    data = PackedMemory(str(corpus_folder), vocab_size=400, document_tokens=512, queries_per_pack=3, chunk_size=8)
    data.setup()
    config = open_config(str(Path(__file__).parent.parent / "configs/backbones/tiny_qwen3.json"))
    sizes = replace(
        QWEN3_4B, layers=config.num_hidden_layers, routed=(2, 3), hidden=config.hidden_size,
        feed_forward=config.intermediate_size, heads=config.num_attention_heads,
        groups=config.num_key_value_heads, width=config.head_dim, vocabulary=config.vocab_size,
    )  # fmt: skip
    for index in range(5):
        pack = data.stages[0].pack(index)
        likely = PackSizes.of(pack, 8, 2)
        head, *contexts = pack.contexts.offsets_Q.diff().tolist()
        exact = replace(
            likely,
            document_pairs=triangles(pack.documents.offsets_D.diff().tolist()),
            context_pairs=triangles([head, *contexts]) + head * sum(contexts),
        )
        assert exact != likely
        left_out = training_operations(sizes, likely, True) / training_operations(sizes, exact, True) - 1
        assert abs(left_out) < 0.015


def triangles(lengths: Sequence[int]) -> int:
    """Pairs of causal sequences."""
    return sum(length * (length + 1) // 2 for length in lengths)
