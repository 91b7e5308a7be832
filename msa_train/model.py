"""MemorySparseModel: a Hugging Face decoder with router projectors attached, run over a MemoryPack.

The backbone stays Hugging Face's: its module and parameter names do not change, and the routers hang on its attention
modules under the published names (`model.layers.{i}.self_attn.router_q_proj.0.weight`).
The invariant: documents never look at contexts, so `forward` (both streams, layer by layer), `encode` (documents
alone) and `read` (contexts over an encoded memory) are the same two layer functions in three loops.

Shapes: T document tokens, A active-context tokens, Q queries, D documents, K selected documents, L routed layers,
N labelled tokens, M model width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from msa_train.attention import (
    Found,
    LayerCache,
    LayerMemory,
    LayerStep,
    MemorySparseAttention,
    PackMemory,
    Reading,
    Rope,
    RoutedMemory,
)
from msa_train.config import MSAConfig
from msa_train.errors import UserError
from msa_train.kernels.choice import Kernels
from msa_train.kernels.elementwise import gate, run, take_over
from msa_train.losses import label_cross_entropy
from msa_train.pack import ChunkLayout, Contexts, Documents, MemoryPack, TensorFields
from msa_train.routing import init_routers, router_projector
from msa_train.sharing import gather

# decoders whose layer is exactly norm, attention, residual, norm, MLP, residual: each is held equal to
# transformers' own forward by tests/test_model.py; another one could differ by a multiplier and train wrongly unseen
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
# a position turns alike whatever else is in the call: with dynamic and longrope it depends on the longest text there
ROPES = ("default", "linear", "yarn", "llama3")

Recompute = Literal["none", "layers", "documents"]
PART_TOKENS = 8192  # documents are recomputed so many tokens at a time: enough rows to keep a GPU's matrix units busy


@dataclass(frozen=True)
class DocumentMemory(TensorFields):
    """Documents as every routed layer remembers them.

    Args:
        chunks: Which chunks belong to which document.
        layers: One memory per routed layer, in order.
    """

    chunks: ChunkLayout
    layers: tuple[LayerMemory, ...]

    def _map(self, change: Callable[[Tensor], Tensor]) -> DocumentMemory:
        return DocumentMemory(self.chunks._map(change), tuple(layer._map(change) for layer in self.layers))

    @staticmethod
    def join(parts: list[DocumentMemory]) -> DocumentMemory:
        """One memory of several, in order: documents do not depend on their neighbours."""
        counts = torch.cat([part.chunks.offsets_D.diff() for part in parts])
        chunks = ChunkLayout.of_counts(counts.tolist()).to(counts.device)
        return DocumentMemory(chunks, DocumentMemory.joined([part.layers for part in parts]))

    @staticmethod
    def joined(parts: Sequence[Sequence[LayerMemory]]) -> tuple[LayerMemory, ...]:
        """Every layer's memory of several parts, in order."""
        return tuple(
            LayerMemory(
                torch.cat([part.key_CGW for part in layer]),
                torch.cat([part.value_CGW for part in layer]),
                torch.cat([part.router_key_CR for part in layer]),
            )
            for layer in zip(*parts, strict=True)
        )


@dataclass(frozen=True)
class Output:
    """What a pack's queries made of the memory.

    Args:
        hidden_AM: Last states of head and contexts, before the final norm.
        doc_score_LQD: Document scores of every routed layer, float32, with their gradient; -inf where excluded.
        selected_LQK: Selected documents of every routed layer, best first; -1 where none is left.
    """

    hidden_AM: Tensor
    doc_score_LQD: Tensor
    selected_LQK: Tensor


class MemorySparseModel(nn.Module):
    """A decoder that reads a memory.

    Args:
        backbone: A causal language model of one of the `SUPPORTED` types.
        config: The memory's sizes.
        kernels: Which implementations to run.
        recompute: What is computed again in the backward pass rather than kept (docs/performance.md). `layers`: what
            happens within attention and within the MLP of each layer. `documents`: all that is no context, 8,192
            tokens at a time, so that memory hardly grows with the documents; a third slower than `layers`. The first
            pass's selection is used again.
        kept_layers: With `layers`, how many of the last ones keep what they computed.

    Raises:
        UserError: The backbone is of another type, uses dropout or a sliding window in attention, another activation
            than SiLU, or rotary positions that depend on the rest of the call.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        config: MSAConfig,
        kernels: Kernels = Kernels(),
        recompute: Recompute = "none",
        kept_layers: int = 0,
    ) -> None:
        super().__init__()
        check_supported(backbone.config)
        self.backbone = backbone
        self.config = config
        self.recompute: Recompute = recompute
        self.kept_layers = kept_layers
        # nothing in a layer draws random numbers but the dropout of adapters
        self._draws = any(isinstance(part, nn.Dropout) and part.p > 0 for part in backbone.modules())
        self.routed_layers = config.layers_of(len(self._decoder.layers))
        for number in self.routed_layers:
            _attach_routers(self._decoder.layers[number].self_attn, config)
        self.attention = [
            MemorySparseAttention(layer.self_attn, config.top_k, kernels) for layer in self._decoder.layers
        ]
        self.use(kernels)

    def use(self, kernels: Kernels) -> None:
        """Changes which implementations run."""
        self.kernels = kernels
        for layer, attention in zip(self._decoder.layers, self.attention, strict=True):
            attention.use(kernels)
            take_over(layer.input_layernorm, kernels.elementwise)
            take_over(layer.post_attention_layernorm, kernels.elementwise)

    @property
    def _decoder(self) -> Any:
        return self.backbone.model

    @property
    def positions(self) -> int:
        """Positions that the backbone has; as good as endless where its config names none."""
        return getattr(self.backbone.config, "max_position_embeddings", 1 << 62)

    def router_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights of the router projectors."""
        return ((name, weight) for name, weight in self.named_parameters() if ".router_" in name)

    def backbone_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and weights of everything else."""
        return ((name, weight) for name, weight in self.named_parameters() if ".router_" not in name)

    def forward(self, pack: MemoryPack, top_k: int | None = None) -> Output:
        """Both streams of a pack, layer by layer. Ranks that share a pack must all run theirs.

        Args:
            pack: Documents and contexts.
            top_k: Documents to select, where it differs from the config's.
        """
        documents, contexts = pack.documents, pack.contexts
        memories = self._encode_in_parts(documents) if self._recomputes("documents") else None
        doc_hidden: Tensor | None = None
        if memories is None:
            doc_hidden, doc_rope = self._start_documents(documents)
        hidden, rope = self._start_contexts(contexts)
        readings: list[Reading] = []
        for number in range(len(self.attention)):
            kept: list[Tensor] = []  # the selection of the first pass, for a recomputation

            def attend(
                doc_hidden: Tensor | None, hidden: Tensor, number: int = number, kept: list[Tensor] = kept
            ) -> tuple[Tensor | None, Tensor, Reading | None]:
                layer, attention = self._decoder.layers[number], self.attention[number]
                memory = None if memories is None else memories.get(number)
                if doc_hidden is not None:
                    doc_normed = layer.input_layernorm(doc_hidden)
                    key, value, memory = attention.remember(doc_normed, doc_rope, documents)
                if memory is not None and pack.shares is not None:
                    memory = LayerMemory(*gather(pack.shares, memory.key_CGW, memory.value_CGW, memory.router_key_CR))
                chosen = kept[0] if kept else None
                view = None if memory is None else PackMemory(memory, pack.chunks, pack.excluded_QD, chosen)
                added, reading = attention.read(layer.input_layernorm(hidden), rope, contexts, view, top_k)
                if reading is not None and not kept:
                    kept.append(reading.selected_QK)
                # documents last: recomputation ends at the last tensor that is saved, and so spares what follows it
                if doc_hidden is None or number == self.routed_layers[-1]:
                    return None, added, reading
                return attention.attend(doc_normed, doc_rope, key, value, documents), added, reading

            def feed(
                doc_hidden: Tensor | None,
                doc_added: Tensor | None,
                hidden: Tensor,
                added: Tensor,
                number: int = number,
            ) -> tuple[Tensor | None, Tensor]:
                hidden = self._feed(number, hidden, added)
                if doc_hidden is None or doc_added is None:
                    return None, hidden
                return self._feed(number, doc_hidden, doc_added), hidden

            if number < self._recomputed_layers():
                again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=self._draws)
                doc_added, added, reading = again(attend, doc_hidden, hidden)
                doc_hidden, hidden = again(feed, doc_hidden, doc_added, hidden, added)
            else:
                doc_added, added, reading = attend(doc_hidden, hidden)
                doc_hidden, hidden = feed(doc_hidden, doc_added, hidden, added)
            if reading is not None:
                readings.append(reading)
        return _output(hidden, readings)

    def _recomputes(self, what: Recompute) -> bool:
        return self.recompute == what and self.training and torch.is_grad_enabled()

    def _recomputed_layers(self) -> int:
        if self._recomputes("layers"):
            return len(self.attention) - self.kept_layers
        return len(self.attention) if self._recomputes("documents") else 0

    def _encode_in_parts(self, documents: Documents) -> dict[int, LayerMemory]:
        """The memory of every routed layer, whose gradient goes through the documents part by part: nothing of a part
        but its tokens is kept until then."""
        parts = [
            checkpoint(self.encode, part, use_reentrant=False, preserve_rng_state=self._draws)
            for part in documents.parts(PART_TOKENS, self.config.chunk_size)
        ]
        layers = DocumentMemory.joined([part.layers for part in parts])
        return dict(zip(self.routed_layers, layers, strict=True))

    def encode(self, documents: Documents) -> DocumentMemory:
        """The memory of these documents."""
        hidden, rope = self._start_documents(documents)
        layers = []
        for number in range(self.routed_layers[-1] + 1):
            hidden, memory = self._encode_layer(number, hidden, rope, documents)
            if memory is not None:
                layers.append(memory)
        return DocumentMemory(documents.chunks, tuple(layers))

    def encode_all(self, documents: Iterable[Sequence[int]], chunk_size: int, budget: int) -> DocumentMemory:
        """The memory of any number of documents, encoded `budget` tokens at a time.

        Args:
            documents: Token ids of each; at least one.
            chunk_size: Tokens per chunk.
            budget: Tokens of a batch; a longer document is a batch of its own.
        """
        device = next(self.parameters()).device
        parts: list[DocumentMemory] = []
        batch: list[Sequence[int]] = []
        for document in documents:
            if batch and sum(map(len, batch)) + len(document) > budget:
                parts.append(self.encode(Documents.build(batch, chunk_size).to(device)))
                batch = []
            batch.append(document)
        return DocumentMemory.join([*parts, self.encode(Documents.build(batch, chunk_size).to(device))])

    def read(
        self, contexts: Contexts, memory: DocumentMemory, top_k: int | None = None, excluded_QD: Tensor | None = None
    ) -> Output:
        """Contexts over an encoded memory."""
        views = [PackMemory(layer, memory.chunks, excluded_QD) for layer in memory.layers]
        return _output(*self.consult(contexts, views, top_k))

    def consult(
        self,
        contexts: Contexts,
        memories: Sequence[RoutedMemory[Found]],
        top_k: int | None = None,
        caches: list[LayerCache] | None = None,
    ) -> tuple[Tensor, list[Found]]:
        """Contexts over any memory.

        Args:
            contexts: The contexts.
            memories: The documents of every routed layer, in order.
            top_k: Documents to select, where it differs from the config's.
            caches: Takes, for every decoder layer, what the contexts attended to: the start of `extend`.

        Returns:
            Last states of head and contexts [A, M], before the final norm, and what every routed layer found.
        """
        hidden, rope = self._start_contexts(contexts)
        remaining, found_L = iter(memories), []
        for number, attention in enumerate(self.attention):
            memory = next(remaining) if attention.routed else None
            hidden, found = self._read_layer(number, hidden, rope, contexts, memory, top_k, caches)
            if found is not None:
                found_L.append(found)
        return hidden, found_L

    def extend(self, tokens_A: Tensor, position_A: Tensor, steps: Sequence[LayerStep]) -> Tensor:
        """Further tokens of contexts that were read: what reading them again with these tokens would give.

        Args:
            tokens_A: New tokens, context after context, int64.
            position_A: Their global positions, the offset of top-k included, int64.
            steps: Where every decoder layer finds its keys and values, and keeps the new ones.

        Returns:
            Last states of the new tokens [A, M], before the final norm.
        """
        hidden = self._decoder.embed_tokens(tokens_A)
        rope = self._rope(hidden, position_A)
        for number, (layer, attention, step) in enumerate(
            zip(self._decoder.layers, self.attention, steps, strict=True)
        ):
            out = attention.extend(layer.input_layernorm(hidden), rope, step)
            hidden = self._feed(number, hidden, out)
        return hidden

    def logits(self, hidden_XM: Tensor) -> Tensor:
        """Next-token logits [X, V] of last states."""
        return self.backbone.lm_head(self._decoder.norm(hidden_XM))

    def label_loss(self, output: Output, contexts: Contexts) -> Tensor:
        """Summed cross entropy of the labelled tokens; the language-model head sees no other row."""
        hidden_NM = output.hidden_AM.index_select(0, contexts.label_index_N)
        shared_out = hasattr(self.backbone.lm_head.weight, "ds_id")  # by ZeRO's stage 3
        return label_cross_entropy(hidden_NM, contexts.label_target_N, self.logits, together=shared_out)

    def _start_documents(self, documents: Documents) -> tuple[Tensor, Rope]:
        hidden_TM = self._decoder.embed_tokens(documents.tokens_T)
        return hidden_TM, self._rope(hidden_TM, documents.position_T)

    def _start_contexts(self, contexts: Contexts) -> tuple[Tensor, Rope]:
        # the query starts behind the template head and k places left for the documents (paper, section 3.3)
        position_A = contexts.position_A.clone()
        position_A[contexts.head :] += self.config.top_k
        hidden_AM = self._decoder.embed_tokens(contexts.tokens_A)
        return hidden_AM, self._rope(hidden_AM, position_A)

    def _rope(self, hidden: Tensor, position: Tensor) -> Rope:
        cos, sin = self._decoder.rotary_emb(hidden, position[None])
        return Rope(cos[0], sin[0])

    def _encode_layer(
        self, number: int, hidden: Tensor, rope: Rope, documents: Documents
    ) -> tuple[Tensor, LayerMemory | None]:
        attention, normed = self.attention[number], self._decoder.layers[number].input_layernorm(hidden)
        key, value, memory = attention.remember(normed, rope, documents)
        if number < self.routed_layers[-1]:
            hidden = self._feed(number, hidden, attention.attend(normed, rope, key, value, documents))
        return hidden, memory

    def _read_layer(
        self,
        number: int,
        hidden: Tensor,
        rope: Rope,
        contexts: Contexts,
        memory: RoutedMemory[Found] | None,
        top_k: int | None,
        caches: list[LayerCache] | None = None,
    ) -> tuple[Tensor, Found | None]:
        normed = self._decoder.layers[number].input_layernorm(hidden)
        added, found = self.attention[number].read(normed, rope, contexts, memory, top_k, caches)
        return self._feed(number, hidden, added), found

    def _feed(self, number: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Both residuals of a layer, and the MLP between them."""
        layer = self._decoder.layers[number]
        hidden, normed = layer.post_attention_layernorm(hidden, added=attended)
        gated = run(self.kernels.elementwise, gate, layer.mlp.gate_proj(normed), layer.mlp.up_proj(normed))
        return hidden + layer.mlp.down_proj(gated)


def _output(hidden: Tensor, readings: list[Reading]) -> Output:
    return Output(
        hidden_AM=hidden,
        doc_score_LQD=torch.stack([reading.doc_score_QD for reading in readings]),
        selected_LQK=torch.stack([reading.selected_QK for reading in readings]),
    )


def _attach_routers(attention: Any, config: MSAConfig) -> None:
    weight = attention.k_proj.weight
    outputs = attention.q_proj.out_features, attention.k_proj.out_features
    query, key = (router_projector(attention.k_proj.in_features, size) for size in outputs)
    query.to(device=weight.device, dtype=weight.dtype)
    key.to(device=weight.device, dtype=weight.dtype)
    init_routers(query, key, outputs[0] // attention.head_dim, outputs[1] // attention.head_dim, config.router_init)
    attention.router_q_proj, attention.router_k_proj = query, key


def check_supported(config: Any) -> None:
    """Refuses decoders that this library would not run as transformers does.

    Raises:
        UserError: Another type of model or activation, dropout or a sliding window in attention, or rotary positions
            that depend on the rest of the call.
    """
    if config.model_type not in SUPPORTED:
        raise UserError(f"model.backbone is of type '{config.model_type}'; supported: {', '.join(SUPPORTED)}")
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(
            f"model.backbone has attention_dropout {config.attention_dropout}: set it to 0 in its config.json"
        )
    if config.hidden_act != "silu":
        raise UserError(f"model.backbone has hidden_act '{config.hidden_act}': only 'silu' is supported")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise UserError(
            f"model.backbone has rope_type '{rope}', which turns a document's keys by what else is read with it; "
            f"supported: {', '.join(ROPES)}"
        )
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (config.model_type == "mistral" and config.sliding_window):
        raise UserError("model.backbone uses sliding-window attention, which a memory cannot; unset it in config.json")
