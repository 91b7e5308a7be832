"""What the estimate starts from: a card, a model, a pack and a setup, as numbers.

Shapes: T document tokens, M model width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msa_train.lora import ADAPTER
from msa_train.model import PART_TOKENS, MemorySparseModel, Recompute
from msa_train.operations import ModelSizes, PackSizes
from msa_train.pack import MemoryPack

GIB = 2**30

Precision = Literal["bf16-true", "bf16-mixed", "32-true"]
Strategy = Literal["single", "ddp", "zero"]


@dataclass(frozen=True)
class Card:
    """A GPU, from its vendor's data sheet.

    Args:
        gib: Memory that the driver shows, GiB.
        tflops: Dense bfloat16 peak, TFLOP/s.
        single: float32 peak without tensor cores, TFLOP/s: torch's default for float32 products.
        bandwidth: Of its memory, TB/s.
        link: To its neighbours in one direction, GB/s: NVLink, or PCIe where it has none.
    """

    gib: float
    tflops: float
    single: float
    bandwidth: float
    link: float


CARDS = {
    "H100": Card(79.1, 989, 67, 3.35, 450),
    "H100-PCIe": Card(79.1, 756, 51, 2.0, 64),
    "H100-NVL": Card(93.1, 835, 60, 3.9, 300),
    "H200": Card(139.8, 989, 67, 4.8, 450),
    "H800": Card(79.1, 989, 67, 3.35, 200),
    "H20": Card(95.0, 148, 44, 4.0, 450),
    "B200": Card(178.0, 2250, 75, 8.0, 900),
    "A100-40GB": Card(39.4, 312, 19.5, 1.555, 300),
    "A100-80GB": Card(79.1, 312, 19.5, 2.039, 300),
    "A800": Card(79.1, 312, 19.5, 2.039, 200),
    "L40S": Card(44.4, 362, 91.6, 0.864, 32),
    "RTX4090": Card(23.6, 165, 82.6, 1.008, 32),
}


@dataclass(frozen=True)
class Model:
    """A model's numbers.

    Args:
        sizes: Its widths.
        backbone: Weights of the backbone, tied ones once.
        routers: Weights of the routers.
        tied: Whether embeddings are the language-model head.
        head_norms: Whether queries and keys are normed per head.
        frozen: Weights of the backbone that stay as they are, since it has adapters.
    """

    sizes: ModelSizes
    backbone: int
    routers: int
    tied: bool
    head_norms: bool
    frozen: int = 0

    @staticmethod
    def of(model: MemorySparseModel) -> Model:
        """Those of a model; its weights may be anywhere."""
        backbone = dict(model.backbone_parameters())
        own = {name: weight.numel() for name, weight in backbone.items() if ADAPTER not in name}
        return Model(
            sizes=ModelSizes.of(model),
            backbone=sum(weight.numel() for weight in backbone.values()),
            routers=sum(weight.numel() for _, weight in model.router_parameters()),
            tied=not any("lm_head" in name for name in backbone),
            head_norms=any(".k_norm." in name for name in backbone),
            frozen=sum(own.values()) if len(own) < len(backbone) else 0,
        )

    @property
    def weights(self) -> int:
        """All weights."""
        return self.backbone + self.routers

    def trained(self, backbone: bool) -> int:
        """Weights that are trained, where the backbone is and where routers alone are."""
        return self.weights - self.frozen if backbone else self.routers

    @property
    def head(self) -> int:
        """Weights of the language-model head."""
        return self.sizes.vocabulary * self.sizes.hidden

    @property
    def layer(self) -> float:
        """Weights of a layer, its share of the routers included."""
        return (self.weights - self.head * (1 if self.tied else 2)) / self.sizes.layers


@dataclass(frozen=True)
class Pack:
    """A pack's numbers.

    Args:
        sizes: Tokens, pairs and chunks.
        queries: Contexts.
        documents: Documents.
        own_rows: Keys that contexts attend to in a layer that does not route.
        routed_rows: And in one that does, at most.
        part: Tokens of the largest part that `recompute: documents` computes at a time.
    """

    sizes: PackSizes
    queries: int
    documents: int
    own_rows: int
    routed_rows: int
    part: int

    @staticmethod
    def of(pack: MemoryPack, chunk_size: int, top_k: int) -> Pack:
        """Those of a pack, on whatever device it is.

        Args:
            pack: The pack.
            chunk_size: Tokens per chunk.
            top_k: Documents to select per query.
        """
        documents, contexts = pack.documents, pack.contexts
        sums = documents.chunks.largest_sums
        own = contexts.tokens_A.numel() + contexts.queries * contexts.head
        return Pack(
            sizes=PackSizes.of(pack, chunk_size, top_k),
            queries=contexts.queries,
            documents=documents.chunks.documents,
            own_rows=own,
            routed_rows=own + contexts.queries * sums[min(top_k, len(sums) - 1)],
            part=max(sum(part.lengths) for part in documents.parts(PART_TOKENS, chunk_size)),
        )

    @staticmethod
    def likely(
        document_tokens: int, document: int, queries: float, context: int, routing: int, labels: int,
        chunk_size: int, top_k: int, sharers: int = 1, head: int = 3,
    ) -> Pack:  # fmt: skip
        """Those of a pack of equally long documents and contexts, or of a rank's share of one, before there is any.

        Args:
            document_tokens: T.
            document: Tokens of a document.
            queries: Contexts; below 1 the share of the document tokens that they take.
            context: Tokens of a context.
            routing: Those of them that route.
            labels: Those of them that are labelled.
            chunk_size: Tokens per chunk.
            top_k: Documents to select per query.
            sharers: Ranks that share the pack.
            head: Tokens of the template head.
        """
        document = min(document, document_tokens)
        number = max(document_tokens // document, 1)
        asked = int(queries) if queries >= 1 else max(int(queries * document_tokens / context), 1)
        asked, document_tokens, every = -(-asked // sharers), document_tokens // sharers, -(-document // chunk_size)
        chunks, read = -(-number // sharers) * every, min(top_k, number) * every
        own = head + asked * context
        return Pack(
            PackSizes(
                documents=document_tokens,
                document_pairs=document_tokens * (document + 1) / 2,
                chunks=chunks,
                contexts=own,
                context_pairs=head * (head + 1) / 2 + asked * context * (head + (context + 1) / 2),
                chunk_pairs=asked * context * read,
                routing=asked * routing,
                labels=asked * labels,
                others=chunks * (sharers - 1),
            ),
            queries=asked,
            documents=number,
            own_rows=own + asked * head,
            routed_rows=own + asked * (head + read),
            part=min(max(PART_TOKENS, document), document_tokens),
        )


@dataclass(frozen=True)
class Setup:
    """How a run computes.

    Args:
        precision: Of products and weights.
        recompute: As the model has it.
        kept_layers: Likewise.
        fused: Whether norms, activation, rotations and chunk means are fused (kernels `auto` on a GPU).
        trains_backbone: False where routers alone are trained.
        freezes: Whether phases freeze the backbone for a while, which ZeRO cannot.
        steps: Whether an optimiser follows; without one a pass forward and backward is all there is.
        ranks: GPUs.
        accumulated: Packs of a step and GPU.
        strategy: What ranks share: nothing, gradients' averages, or ZeRO's parts.
        bucket_view: Whether DDP's gradients live in its buckets.
        stage: ZeRO's.
        offload_optimizer: ZeRO's.
        offload_parameters: ZeRO's.
        gradient_bytes: ZeRO's bytes of a gradient that adds up.
        reduce_bucket: ZeRO's reduce_bucket_size.
        prefetch: ZeRO's prefetch_bucket_size.
        live: ZeRO's max_live_parameters.
    """

    precision: Precision = "bf16-true"
    recompute: Recompute = "none"
    kept_layers: int = 0
    fused: bool = True
    trains_backbone: bool = True
    freezes: bool = False
    steps: bool = True
    ranks: int = 1
    accumulated: int = 1
    strategy: Strategy = "single"
    bucket_view: bool = False
    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gradient_bytes: int = 4
    reduce_bucket: int = 200_000_000
    prefetch: int = 50_000_000
    live: int = 1_000_000_000

    @property
    def mixed(self) -> bool:
        """Whether autocast copies weights to bfloat16; ZeRO's weights are that already."""
        return self.precision == "bf16-mixed" and self.strategy != "zero"

    @property
    def stream(self) -> int:
        """Bytes of the residual stream's elements and of a weight."""
        return 4 if self.mixed or self.precision == "32-true" else 2

    @property
    def product(self) -> int:
        """Bytes of what a matrix product takes and gives."""
        return 4 if self.precision == "32-true" else 2
