"""The whole model: Hugging Face's where there is no memory, isolation, and equality of its ways to run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.losses import routing_loss
from msa_train.model import SUPPORTED, DocumentMemory, MemorySparseModel, Recompute
from msa_train.pack import Context, Contexts, Documents, MemoryPack
from msa_train.routing import select_documents
from tests.conftest import HEAD, tiny_backbone, tiny_context, tiny_model, tiny_pack, tokens


def total_loss(model: MemorySparseModel, pack: MemoryPack) -> torch.Tensor:
    output = model(pack)
    return model.label_loss(output, pack.contexts) + routing_loss(output.doc_score_LQD, pack.positive_QD).mean()


# --- the backbone is still Hugging Face's ------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_documents_are_hugging_faces_own_forward(model_type: str) -> None:
    """A document attends causally to itself from position 0: what the plain decoder does with it alone."""
    backbone = tiny_backbone(model_type)
    ids = tokens(13, seed=3)
    states = backbone(torch.tensor([ids]), output_hidden_states=True).hidden_states
    model = MemorySparseModel(backbone, MSAConfig(chunk_size=1, top_k=2, routed_layers=(3,)))
    documents = Documents.build([tokens(5, seed=4), ids, tokens(2, seed=5)], 1)
    hidden, rope = model._start_documents(documents)
    for number in range(3):
        hidden, _ = model._encode_layer(number, hidden, rope, documents)
    torch.testing.assert_close(hidden[5:18], states[3][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_without_documents_the_model_is_hugging_faces(model_type: str) -> None:
    """A context that reads no document, at contiguous positions, gets the plain decoder's logits."""
    backbone = tiny_backbone(model_type)
    model = MemorySparseModel(backbone, MSAConfig(top_k=4))
    body = tokens(11, seed=1)
    contexts = Contexts.build(HEAD, [Context(body, [False] * 11, [(0, 2)])])
    ids = torch.tensor([[*HEAD, *body]])
    position = torch.tensor([[*range(3), *range(7, 18)]])  # the offset of top-k stays, so hand it over
    theirs = backbone(ids, position_ids=position).logits[0]
    hidden, rope = model._start_contexts(contexts)
    for number in range(4):
        hidden, _ = model._read_layer(number, hidden, rope, contexts, None, None)
    torch.testing.assert_close(model.logits(hidden), theirs, atol=1e-5, rtol=1e-4)


def test_saved_backbone_opens_in_transformers(tmp_path: object) -> None:
    model = tiny_model()
    ids = torch.tensor([tokens(9, seed=2)])
    before = model.backbone(ids).logits
    model.backbone.save_pretrained(str(tmp_path))
    reopened = AutoModelForCausalLM.from_pretrained(str(tmp_path), attn_implementation="eager").eval()
    torch.testing.assert_close(reopened(ids).logits, before)


def test_router_names_are_the_published_ones() -> None:
    model = tiny_model()
    names = {name.removeprefix("backbone.") for name, _ in model.router_parameters()}
    assert names == {f"model.layers.{i}.self_attn.router_{part}_proj.0.weight" for i in (2, 3) for part in "qk"}
    weights = dict(model.named_parameters())
    assert weights["backbone.model.layers.3.self_attn.router_q_proj.0.weight"].shape == (32, 24)
    assert weights["backbone.model.layers.3.self_attn.router_k_proj.0.weight"].shape == (16, 24)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_rest_of_the_call_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(UserError, match=f"rope_type '{kind}'.*supported: default, linear, yarn, llama3"):
        MemorySparseModel(tiny_backbone("llama", rope_parameters=rope), MSAConfig())


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_a_documents_keys_are_the_same_beside_a_longer_one(kind: str) -> None:
    """By hand, `dynamic` moved them by 1.2 where a document beside them was longer than the backbone's 16 positions."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # fmt: skip
    backbone = tiny_backbone("llama", max_position_embeddings=32, rope_parameters=rope)
    model = MemorySparseModel(backbone, MSAConfig(chunk_size=4, top_k=2)).eval()
    with torch.no_grad():
        alone, beside = (
            model.encode(Documents.build([tokens(11, 1), *others], 4)).layers[0].key_CGW
            for others in ((), (tokens(60, 2),))
        )
    torch.testing.assert_close(beside[: len(alone)], alone)


def test_other_decoders_are_refused() -> None:
    with pytest.raises(UserError, match="attention_dropout"):
        MemorySparseModel(tiny_backbone(attention_dropout=0.1), MSAConfig())
    with pytest.raises(UserError, match="sliding"):
        MemorySparseModel(tiny_backbone("mistral", sliding_window=8), MSAConfig())
    with pytest.raises(UserError, match="layer 4"):
        MemorySparseModel(tiny_backbone(), MSAConfig(routed_layers=(3, 4)))


# --- isolation ---------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 14), min_size=2, max_size=6), data=st.data())
def test_a_documents_memory_does_not_depend_on_its_neighbours(lengths: list[int], data: st.DataObject) -> None:
    """Added, removed, reordered, changed: the memory of a document stays, in every layer."""
    model = tiny_model()
    kept = data.draw(st.integers(0, len(lengths) - 1))
    texts = [tokens(length, seed) for seed, length in enumerate(lengths)]
    others = [text[::-1] for place, text in enumerate(texts) if place != kept]
    data.draw(st.randoms()).shuffle(others)
    position = data.draw(st.integers(0, len(others)))
    changed = [*others[:position], texts[kept], *others[position:], tokens(7, seed=77)]
    with torch.no_grad():
        before, after = (model.encode(Documents.build(group, 4)) for group in (texts, changed))
    for old, new in zip(before.layers, after.layers, strict=True):
        rows = slice(*before.chunks.offsets_D[kept : kept + 2].tolist())
        moved = slice(*after.chunks.offsets_D[position : position + 2].tolist())
        for name in ("key_CGW", "value_CGW", "router_key_CR"):
            torch.testing.assert_close(getattr(old, name)[rows], getattr(new, name)[moved], atol=1e-6, rtol=1e-5)


def test_a_query_does_not_see_the_others() -> None:
    model, pack = tiny_model(), tiny_pack()
    alone = [Contexts.build(HEAD, [tiny_context(*sizes, 100 + i)]) for i, sizes in enumerate(((5, 4), (2, 6), (7, 1)))]
    with torch.no_grad():
        memory = model.encode(pack.documents)
        together = model.read(pack.contexts, memory)
        for query, contexts in enumerate(alone):
            single = model.read(contexts, memory)
            rows = slice(*pack.contexts.offsets_Q[query + 1 : query + 3].tolist())
            torch.testing.assert_close(single.hidden_AM[3:], together.hidden_AM[rows], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(single.doc_score_LQD[:, 0], together.doc_score_LQD[:, query])


def test_documents_that_are_not_selected_do_not_move_a_query() -> None:
    """And those that are, do: the test would see a leak."""
    model, pack = tiny_model(), tiny_pack()
    with torch.no_grad():
        before = model(pack)
        chosen = set(before.selected_LQK.flatten().tolist())
        idle = next(iter(set(range(5)) - chosen), None)
        texts = [tokens(n, i) for i, n in enumerate((11, 3, 8, 1, 13))]
        if idle is not None:
            removed = Documents.build([text for place, text in enumerate(texts) if place != idle], 4)
            after = model.read(pack.contexts, model.encode(removed))
            torch.testing.assert_close(before.hidden_AM, after.hidden_AM, atol=1e-5, rtol=1e-4)
        used = before.selected_LQK[0, 0, 0]
        texts[used] = texts[used][::-1] + [11]
        assert not torch.allclose(
            before.hidden_AM, model.read(pack.contexts, model.encode(Documents.build(texts, 4))).hidden_AM
        )


def test_an_excluded_document_is_as_good_as_absent() -> None:
    """For one query it takes no part; another that may use it still does."""
    model, pack = tiny_model(top_k=4), tiny_pack()
    texts = [tokens(n, i) for i, n in enumerate((11, 3, 8, 1, 13))]
    excluded = torch.zeros_like(pack.positive_QD)
    excluded[1, [0, 2]] = True
    with torch.no_grad():
        masked = model(replace(pack, excluded_QD=excluded))
        without = model.read(pack.contexts, model.encode(Documents.build([texts[i] for i in (1, 3, 4)], 4)))
        everything = model(pack)
    rows = [slice(*pack.contexts.offsets_Q[query + 1 : query + 3].tolist()) for query in range(3)]
    torch.testing.assert_close(masked.hidden_AM[rows[1]], without.hidden_AM[rows[1]], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(masked.hidden_AM[rows[1]], everything.hidden_AM[rows[1]], atol=1e-4)
    for query in (0, 2):
        torch.testing.assert_close(masked.hidden_AM[rows[query]], everything.hidden_AM[rows[query]])
    assert masked.doc_score_LQD[:, 1, [0, 2]].isneginf().all() and masked.selected_LQK[:, 1, 3].eq(-1).all()


@pytest.mark.parametrize("recompute", ["none", "layers", "documents"])
def test_a_query_without_documents_is_the_plain_decoder_and_trains_beside_others(recompute: Recompute) -> None:
    model, pack = tiny_model(recompute=recompute).train(), tiny_pack()
    excluded, positive = torch.zeros_like(pack.positive_QD), pack.positive_QD.clone()
    excluded[2], positive[2] = True, False
    pack = replace(pack, excluded_QD=excluded, positive_QD=positive, asked=2)
    output = model(pack)
    body = pack.contexts.tokens_A[slice(*pack.contexts.offsets_Q[3:5].tolist())]
    ids, k = torch.cat([torch.tensor(HEAD), body])[None], model.config.top_k
    position = torch.tensor([[*range(3), *range(3 + k, 3 + k + len(body))]])
    theirs = model.backbone(ids, position_ids=position).logits[0, 3:]
    ours = model.logits(output.hidden_AM[slice(*pack.contexts.offsets_Q[3:5].tolist())])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    loss = routing_loss(output.doc_score_LQD, pack.positive_QD)
    assert loss[:, 2].eq(0).all() and loss[:, :2].gt(0).all()
    (loss.sum() + model.label_loss(output, pack.contexts)).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_order_of_documents_does_not_matter() -> None:
    model, pack = tiny_model(), tiny_pack()
    texts = [tokens(n, i) for i, n in enumerate((11, 3, 8, 1, 13))]
    order = [3, 0, 4, 2, 1]
    with torch.no_grad():
        before = model(pack)
        after = model.read(pack.contexts, model.encode(Documents.build([texts[place] for place in order], 4)))
    torch.testing.assert_close(before.hidden_AM, after.hidden_AM, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(before.doc_score_LQD[:, :, order], after.doc_score_LQD, atol=1e-6, rtol=1e-5)


# --- one function, several loops ---------------------------------------------------------------------------------


def test_encode_then_read_equals_forward() -> None:
    model, pack = tiny_model(), tiny_pack()
    with torch.no_grad():
        forward, memory = model(pack), model.encode(pack.documents)
        read = model.read(pack.contexts, memory)
    torch.testing.assert_close(forward.hidden_AM, read.hidden_AM, atol=0, rtol=0)
    assert torch.equal(forward.selected_LQK, read.selected_LQK)


def test_memories_joined_equal_encoding_at_once() -> None:
    model = tiny_model()
    texts = [tokens(n, i) for i, n in enumerate((11, 3, 8, 1, 13))]
    with torch.no_grad():
        whole = model.encode(Documents.build(texts, 4))
        parts = [model.encode(Documents.build(part, 4)) for part in (texts[:2], texts[2:])]
    joined = DocumentMemory.join(parts)
    assert whole.chunks.largest_sums == joined.chunks.largest_sums
    assert torch.equal(whole.chunks.offsets_D, joined.chunks.offsets_D)
    for a, b in zip(whole.layers, joined.layers, strict=True):
        torch.testing.assert_close(a.key_CGW, b.key_CGW, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(a.router_key_CR, b.router_key_CR, atol=1e-6, rtol=1e-5)


def test_selection_is_that_of_the_returned_scores() -> None:
    model, pack = tiny_model(), tiny_pack()
    output = model(pack)
    assert output.doc_score_LQD.shape == (2, 3, 5) and output.selected_LQK.shape == (2, 3, 2)
    for scores, selected in zip(output.doc_score_LQD, output.selected_LQK, strict=True):
        assert torch.equal(select_documents(scores, 2), selected)


@pytest.mark.parametrize(("recompute", "kept"), [("layers", 0), ("layers", 3), ("documents", 0)])
def test_recomputation_gives_the_same_gradients(
    recompute: Recompute, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msa_train.model.PART_TOKENS", 14)
    plain, recomputed = tiny_model(), tiny_model(recompute=recompute)
    recomputed.kept_layers = kept
    pack = tiny_pack()
    assert len(pack.documents.parts(14, 4)) == 3
    gradients = []
    for model in (plain, recomputed):
        model.train()
        loss = total_loss(model, pack)
        loss.backward()
        gradients.append({"loss": loss.detach(), **{name: weight.grad for name, weight in model.named_parameters()}})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradients[1][name], gradient, atol=4e-6, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "layers", "documents"])
def test_recomputation_keeps_no_product_of_the_mlp(recompute: Recompute) -> None:
    """Those are as wide as nothing else, and the largest part of what a layer would keep."""
    model, width = tiny_model(recompute=recompute).train(), 40
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tiny_pack())
    products = [tensor for tensor in kept if tensor.shape[-1] == width and not isinstance(tensor, torch.nn.Parameter)]
    assert model.backbone.config.intermediate_size == width and kept
    assert bool(products) == (recompute == "none")


def test_recomputation_keeps_the_first_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tie that falls the other way in the second pass must not change what was attended to."""
    calls = []

    def flipping(score_QD: torch.Tensor, k: int) -> torch.Tensor:
        calls.append(1)
        return select_documents(score_QD if len(calls) <= 2 else -score_QD, k)

    monkeypatch.setattr("msa_train.attention.select_documents", flipping)
    model, pack = tiny_model(recompute="layers").train(), tiny_pack()
    total_loss(model, pack).backward()
    assert len(calls) == 2, "one selection per routed layer, none in the recomputation"


# --- what is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "layers", "documents"])
def test_every_weight_has_a_gradient_and_every_router_moves(recompute: Recompute) -> None:
    model = tiny_model(recompute=recompute).train()
    before = {name: weight.detach().clone() for name, weight in model.router_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total_loss(model, tiny_pack()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    optimizer.step()
    assert len(before) == 4
    for name, weight in model.router_parameters():
        assert not torch.equal(before[name], weight), name


def test_frozen_backbone_has_no_gradient_and_no_backward() -> None:
    model = tiny_model().train()
    for _, weight in model.backbone_parameters():
        weight.requires_grad_(False)
    pack = tiny_pack()
    output = model(pack)
    assert not output.hidden_AM.requires_grad, "the graph must not run through the backbone"
    routing_loss(output.doc_score_LQD, pack.positive_QD).mean().backward()
    assert all(weight.grad is None for _, weight in model.backbone_parameters())
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for _, weight in model.router_parameters())


def test_hard_selection_gives_routers_nothing_from_the_language_model_loss() -> None:
    model, pack = tiny_model().train(), tiny_pack()
    model.label_loss(model(pack), pack.contexts).backward()
    assert all(weight.grad is None or not weight.grad.any() for _, weight in model.router_parameters())


def test_a_pack_without_labels_or_positives_still_has_a_graph() -> None:
    """Every rank must run every collective: no branch may depend on the data."""
    pack = tiny_pack(contexts=((5, 0), (2, 0)))
    pack = replace(pack, positive_QD=torch.zeros_like(pack.positive_QD))
    model = tiny_model().train()
    loss = total_loss(model, pack)
    loss.backward()
    assert loss == 0
    assert all(weight.grad is not None for _, weight in model.named_parameters())
