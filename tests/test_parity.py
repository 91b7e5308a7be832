"""The layer against the published one, on numbers recorded from it; and against plain attention where they meet."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

from msa_train.attention import MemorySparseAttention, PackMemory, Reading, Rope
from msa_train.kernels.rope import rotate
from msa_train.losses import RoutingLoss, routing_loss
from msa_train.pack import Context, Contexts, Documents
from msa_train.routing import router_projector
from tests.conftest import FIXTURES

FILES = sorted((FIXTURES / "attention").glob("*.safetensors"))
RELATIVE = 1e-4  # of the largest value


class Recorded:
    """A recorded layer, and its samples as packs of one query."""

    def __init__(self, path: Any) -> None:
        with safe_open(path, "pt") as file:
            self.sizes: dict[str, str] = file.metadata()
            self.numbers = {name: file.get_tensor(name) for name in file.keys()}
        config = Qwen3Config(
            hidden_size=int(self.sizes["hidden_size"]),
            num_attention_heads=int(self.sizes["num_attention_heads"]),
            num_key_value_heads=int(self.sizes["num_key_value_heads"]),
            head_dim=int(self.sizes["head_dim"]),
            rms_norm_eps=float(self.sizes["rms_norm_eps"]),
            rope_parameters={"rope_type": "default", "rope_theta": float(self.sizes["rope_theta"])},
            num_hidden_layers=1,
        )
        self.attention: Any = Qwen3Attention(config, 0)
        if self.sizes["routed"] == "True":
            self.attention.router_q_proj = router_projector(config.hidden_size, self.attention.q_proj.out_features)
            self.attention.router_k_proj = router_projector(config.hidden_size, self.attention.k_proj.out_features)
        weights = {name.removeprefix("weight."): value for name, value in self.numbers.items() if "weight." in name[:7]}
        self.attention.load_state_dict(weights)
        self.rotary = Qwen3RotaryEmbedding(config)
        self.layer = MemorySparseAttention(self.attention, int(self.sizes["top_k"]))
        self.hidden = self.numbers["hidden_states"].requires_grad_()

    def rope(self, sample: int, rows: torch.Tensor) -> Rope:
        cos, sin = self.rotary(self.hidden, self.numbers["position_ids"][sample][rows][None])
        return Rope(cos[0], sin[0])

    def run(self, sample: int) -> tuple[torch.Tensor, torch.Tensor, Reading | None]:
        """Rows of the sample that are real, their outputs, and the reading."""
        ids = self.numbers["doc_ids"][sample]
        real = self.numbers["attention_mask"][sample].bool()
        by_document = [(ids == number).nonzero().flatten() for number in range(1, int(ids.max()) + 1)]
        context = [row for row in range(len(ids)) if real[row] and ids[row] <= 0]
        routing = [place for place, row in enumerate(context) if ids[row] == 0]
        documents = Documents.build([rows.tolist() for rows in by_document], int(self.sizes["chunk_size"]))
        body = Context(context[3:], [False] * (len(context) - 3), [(routing[0] - 3, routing[-1] - 2)])
        contexts = Contexts.build(context[:3], [body])
        document_rows, context_rows = torch.cat(by_document), torch.tensor(context)
        hidden, rope = self.hidden[sample][document_rows], self.rope(sample, document_rows)
        key, value, memory = self.layer.remember(hidden, rope, documents)
        out = self.layer.attend(hidden, rope, key, value, documents)
        view = None if memory is None else PackMemory(memory, documents.chunks)
        read, reading = self.layer.read(
            self.hidden[sample][context_rows], self.rope(sample, context_rows), contexts, view
        )
        assert out is not None
        return torch.cat([document_rows, context_rows]), torch.cat([out, read]), reading


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < RELATIVE, f"{what}: relative error {error:.2e}"


def test_there_are_fixtures() -> None:
    assert len(FILES) >= 4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_layer_equals_the_published_one(path: Any) -> None:
    recorded = Recorded(path)
    loss = score_loss = torch.zeros(())
    for sample in range(len(recorded.hidden)):
        rows, out, reading = recorded.run(sample)
        assert_close(out, recorded.numbers["output"][sample][rows], "output")
        loss = loss + (out * recorded.numbers["output_cotangent"][sample][rows]).sum()
        if reading is not None:
            theirs = recorded.numbers["doc_scores"][sample]
            finite = torch.isfinite(theirs)
            assert finite.sum() == reading.doc_score_QD.shape[1]
            assert_close(reading.doc_score_QD[0], theirs[finite], "document scores")
            score_loss = score_loss + reading.doc_score_QD.square().sum()

    weights = dict(recorded.attention.named_parameters())
    plain = [name for name in weights if "router" not in name]
    gradients = torch.autograd.grad(loss, [recorded.hidden, *(weights[name] for name in plain)], retain_graph=True)
    for name, gradient in zip(["hidden_states", *plain], gradients, strict=True):
        assert_close(gradient, recorded.numbers[f"grad.{name}"], f"gradient of {name}")
    routers = [name for name in weights if "router" in name]
    assert bool(routers) == (recorded.sizes["routed"] == "True")
    if routers:
        for name, gradient in zip(
            routers, torch.autograd.grad(score_loss, [weights[name] for name in routers]), strict=True
        ):
            assert_close(gradient, recorded.numbers[f"score_grad.{name}"], f"score gradient of {name}")


@pytest.mark.parametrize("kind", ["decoupled", "coupled", "focal"])
def test_routing_losses_equal_the_published_ones(kind: RoutingLoss) -> None:
    with safe_open(FIXTURES / "routing_loss.safetensors", "pt") as file:
        temperature = float(file.metadata()["temperature"])
        cases = sorted({name.partition(".")[0] for name in file.keys()})
        assert len(cases) >= 4
        for case in cases:
            scores = file.get_tensor(f"{case}.scores").requires_grad_()
            positives = file.get_tensor(f"{case}.positives").bool()
            loss = routing_loss(scores, positives, temperature, kind)
            theirs = file.get_tensor(f"{case}.{kind}")
            assert abs(float(loss.detach() / theirs) - 1) < 1e-5
            (gradient,) = torch.autograd.grad(loss, scores)
            assert_close(gradient, file.get_tensor(f"{case}.{kind}.grad"), f"gradient of {kind}, case {case}")


def test_chunks_of_one_token_with_all_documents_are_plain_attention() -> None:
    """Hand-made dense attention: every context token sees the head, every document token, and its own past."""
    recorded = Recorded(FIXTURES / "attention" / "routed_one_sample.safetensors")
    recorded.sizes["chunk_size"] = "1"
    recorded.layer.top_k = 99
    rows, out, reading = recorded.run(0)
    assert reading is not None

    attention, ids = recorded.attention, recorded.numbers["doc_ids"][0]
    rope = recorded.rope(0, torch.arange(len(ids)))
    hidden, width = recorded.hidden[0], attention.head_dim
    query = rotate(attention.q_norm(attention.q_proj(hidden).unflatten(-1, (-1, width))), rope.cos, rope.sin)
    key = rotate(attention.k_norm(attention.k_proj(hidden).unflatten(-1, (-1, width))), rope.cos, rope.sin)
    value = attention.v_proj(hidden).unflatten(-1, (-1, width))
    repeat = query.shape[1] // key.shape[1]
    score = torch.einsum("thw,nhw->htn", query, key.repeat_interleave(repeat, 1)) / math.sqrt(width)
    place = torch.arange(len(ids))
    head = place < 3
    causal = place[:, None] >= place[None, :]
    same_document = (ids[:, None] == ids[None, :]) & (ids[:, None] > 0)
    context = (ids <= 0)[:, None] & ~head[:, None]
    allowed = torch.where(context, causal, causal & (same_document | (head[:, None] & head[None, :])))
    weight = score.masked_fill(~allowed, -torch.inf).softmax(-1)
    dense = attention.o_proj(torch.einsum("htn,nhw->thw", weight, value.repeat_interleave(repeat, 1)).flatten(1))
    torch.testing.assert_close(out, dense[rows], atol=1e-5, rtol=1e-4)
