"""Operations: the floating-point operations that a pack's matrix products take, from numbers that the host knows.

Only what the model needs is counted, once: no padding, no masked half of a causal score, nothing that is recomputed to
save memory. Two operations are a multiplication and its addition, so a linear layer takes 2 x rows x inputs x outputs,
and one query token that looks at one key takes 4 x H x W (its score, and its share of the value). Norms, rotations,
pooling and softmax are no matrix products and are left out. Per part, as the model runs them:

    documents       linear layers of T tokens; in the last routed layer keys and values alone, and nothing above it
    document_pairs  every token of a document looks at itself and those before it
    router_keys     router projections of C pooled chunks
    contexts        linear layers of A active tokens
    context_pairs   they look at head, selected chunks and themselves
    router_queries  router projections of X query tokens
    scores          X query tokens against all chunks that they are routed over
    head            language-model head at N labelled tokens

Backward, a product takes as many operations again for each of its two operands that has a gradient. Where the backbone
is frozen, nothing runs backward through it: routers get the gradient of their weights, scores that of both sides.

The invariant: no tensor is read. What only the device knows enters as what is likely: see `PackSizes.of`.
"""

from __future__ import annotations

from dataclasses import dataclass

from msa_train.model import MemorySparseModel
from msa_train.pack import MemoryPack

ROUTERS = ("router_keys", "router_queries")


@dataclass(frozen=True)
class ModelSizes:
    """What of a model its operations depend on.

    Args:
        layers: Decoder layers.
        routed: Numbers of those that route, ascending.
        hidden: Width of the states M.
        feed_forward: Width between the MLP's matrices.
        heads: Query heads H.
        groups: Key/value heads G.
        width: Head width W.
        vocabulary: Rows of the language-model head V.
    """

    layers: int
    routed: tuple[int, ...]
    hidden: int
    feed_forward: int
    heads: int
    groups: int
    width: int
    vocabulary: int

    @staticmethod
    def of(model: MemorySparseModel) -> ModelSizes:
        """Those of a model; its weights may be anywhere."""
        config, attention = model.backbone.config, model.attention[0]
        return ModelSizes(
            layers=len(model.attention),
            routed=model.routed_layers,
            hidden=config.hidden_size,
            feed_forward=config.intermediate_size,
            heads=attention.heads,
            groups=attention.groups,
            width=attention.width,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class PackSizes:
    """What of a pack its operations depend on.

    Args:
        documents: Document tokens T.
        document_pairs: Pairs of a document token and one that it sees, itself included.
        chunks: Chunks C.
        contexts: Active-context tokens A, head included.
        context_pairs: Pairs of an active token and a token of head or context that it sees, itself included.
        chunk_pairs: Pairs of an active token and a chunk that was selected for it, in one routed layer.
        routing: Routing tokens X of all queries.
        labels: Labelled tokens N.
        others: Chunks of the ranks that share the pack, which queries are routed over as well.
    """

    documents: int
    document_pairs: float
    chunks: int
    contexts: int
    context_pairs: float
    chunk_pairs: float
    routing: int
    labels: int
    others: int = 0

    @staticmethod
    def of(pack: MemoryPack, chunk_size: int, top_k: int) -> PackSizes:
        """Those of a pack, or of a rank's share of one, on whatever device it is.

        All token and chunk counts are exact. Of a document's length the host knows the number of its chunks, so pairs
        are those of documents whose last chunks are equally full. Contexts count as equally long, and documents as
        selected whatever their length. Of packs of prose that leaves out 0.1% of a 4B model's operations at most, and
        1.5% of those of the quick start's 3M: what is said of the hardware is rather too little.

        Args:
            pack: The pack.
            chunk_size: Tokens per chunk that it was built with.
            top_k: Documents to select per query.
        """
        documents, contexts = pack.documents, pack.contexts
        tokens, sums = documents.tokens_T.numel(), documents.chunks.largest_sums
        chunks, number = sums[-1], documents.chunks.documents
        unfilled = (chunks * chunk_size - tokens) / number
        lengths = [(after - before) * chunk_size - unfilled for before, after in zip(sums, sums[1:], strict=False)]
        read, all_documents = pack.chunks.largest_sums[-1], pack.chunks.documents
        active, head = contexts.tokens_A.numel(), contexts.head
        own = active - head
        return PackSizes(
            documents=tokens,
            document_pairs=sum(length * (length + 1) / 2 for length in lengths),
            chunks=chunks,
            contexts=active,
            context_pairs=head * (head + 1) / 2 + own * head + own * (own / pack.queries + 1) / 2,
            chunk_pairs=own * (pack.asked / pack.queries) * min(top_k, all_documents) * read / all_documents,
            routing=contexts.routing_index_X.numel(),
            labels=contexts.label_index_N.numel(),
            others=read - chunks,
        )


def forward_operations(model: ModelSizes, pack: PackSizes) -> dict[str, float]:
    """Operations of one forward pass, part by part (see above).

    One layer, routed, of M = 2 with one head of W = 3, an MLP of 5 and 7 words: a token takes 2 x 2 x 3 = 12 for each
    of its four projections and 3 x 2 x 2 x 5 = 60 for the MLP. A pack with 4 document tokens, 2 chunks, 3 active
    tokens that see 6 tokens and 4 chunks, 1 routing token and 1 label:

    >>> sizes = ModelSizes(1, (0,), hidden=2, feed_forward=5, heads=1, groups=1, width=3, vocabulary=7)
    >>> forward_operations(sizes, PackSizes(4, 10, 2, 3, 6, 4, 1, 1))  # doctest: +NORMALIZE_WHITESPACE
    {'documents': 96, 'document_pairs': 0, 'router_keys': 24, 'contexts': 324, 'context_pairs': 120,
     'router_queries': 12, 'scores': 12, 'head': 28}
    """
    last, routed = model.routed[-1], len(model.routed)
    query, key = model.heads * model.width, model.groups * model.width
    ends, keys, mlp = 2 * model.hidden * query, 2 * model.hidden * key, 3 * model.hidden * model.feed_forward
    layer = 2 * (ends + keys + mlp)  # queries and output; keys and values; gate, up and down
    pair = 4 * query
    return {
        "documents": pack.documents * (last * layer + 2 * keys),
        "document_pairs": last * pack.document_pairs * pair,
        "router_keys": 2 * routed * pack.chunks * model.hidden * key,
        "contexts": model.layers * pack.contexts * layer,
        "context_pairs": (model.layers * pack.context_pairs + routed * pack.chunk_pairs) * pair,
        "router_queries": 2 * routed * pack.routing * model.hidden * query,
        "scores": 2 * routed * pack.routing * (pack.chunks + pack.others) * key,
        "head": 2 * pack.labels * model.hidden * model.vocabulary,
    }


def training_operations(model: ModelSizes, pack: PackSizes, trains_backbone: bool) -> float:
    """Operations of a forward and a backward pass.

    Args:
        model: The model.
        pack: The pack.
        trains_backbone: False where routers alone have a gradient.
    """
    forward = forward_operations(model, pack)
    if trains_backbone:
        return 3 * sum(forward.values())
    return sum(forward.values()) + sum(forward[part] for part in ROUTERS) + 2 * forward["scores"]
