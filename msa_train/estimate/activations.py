"""Activations: bytes that each half of a layer keeps for the backward pass, and needs beside that.

With s the bytes of an element of the residual stream and p of a matrix product's (bf16-true: 2 and 2, bf16-mixed: 4 and
2), fused kernels keep of each token:

    attention   M s + 4 (norm), M p (its result), (H + G) W p (before the head norm), (2 H + 2 G) W p + 4 H (attention)
    MLP         M s + 4 (norm), M p (its result), 3 F p (gate, up, product)

and a recomputed layer M s + M p alone: what goes into its two halves. Contexts gather their keys and values, so that
there are rows of these instead of tokens. The invariant: every term is a tensor that autograd saves.

Shapes: A context tokens, C chunks, X routing tokens, M model width, F MLP width, H heads, G groups, W head width,
V vocabulary.
"""

from __future__ import annotations

from msa_train.estimate.sizes import Model, Pack, Setup

LOGIT_ROWS = 2048  # losses.label_cross_entropy has no more at a time
FLOAT = 4  # bytes of a float32, in which norms' factors, scores and losses are kept


class Activations:
    """Bytes that one layer's halves keep and need, of a model, a pack and a setup."""

    def __init__(self, model: Model, pack: Pack, setup: Setup) -> None:
        self.model, self.pack, self.setup = model, pack, setup
        sizes = model.sizes
        self.hidden, self.wide = sizes.hidden, sizes.feed_forward
        self.query, self.key = sizes.heads * sizes.width, sizes.groups * sizes.width
        self.s, self.p = setup.stream, setup.product
        self.read = pack.sizes.chunks + pack.sizes.others  # chunks that queries are routed over

    def attention(self, tokens: float, routed: bool, whole: bool = True) -> float:
        """What the attention of documents keeps.

        Args:
            tokens: Of documents.
            routed: Whether the layer leaves a memory behind.
            whole: False in the last routed layer, where documents have keys and values alone.
        """
        keys = self._norm() + self._normed() + self._turn(self.key)
        pooled = 0 if self.setup.fused or self.s == self.p == FLOAT else FLOAT * (self.hidden + 2 * self.key)
        queries = self._turn(self.query) + self._attended(self.query) + 2 * self.key * self.p if whole else 0
        return tokens * (keys + queries + pooled * routed) + self._memory(tokens) * routed

    def mlp(self, tokens: float) -> float:
        """What the MLP of tokens of either stream keeps."""
        activation = 3 if self.setup.fused else 4
        return tokens * (self._norm() + self._normed() + activation * self.wide * self.p)

    def reading(self, routed: bool) -> float:
        """What the attention of contexts keeps."""
        pack = self.pack.sizes
        tokens = self._norm() + self._normed() + self._turn(self.key) + self._turn(self.query)
        rows = (self.pack.routed_rows if routed else self.pack.own_rows) * (2 * self.key * self.p + 8)
        scores = pack.routing * (self.hidden * self.p + FLOAT * (self.query + self.key + self.read))
        return pack.contexts * (tokens + self._attended(self.query)) + rows + scores * routed

    def attention_backward(self, tokens: float) -> float:
        """What going back through attention needs beside what was kept: gradients of its output, queries, keys and
        values, and the fused kernel's float32 sums and keys and values of every head."""
        ends = self.hidden * self.s
        kernel = self.query * (2 * self.p + FLOAT + 2 * self.p) + 2 * self.key * self.p
        if self.setup.fused:
            return tokens * (ends + kernel)
        # through the plain head norm: five float32 of the queries, when what attention kept is gone
        return tokens * max(ends + kernel, ends + 5 * FLOAT * self.query - (2 * self.query + self.key) * self.p)

    def mlp_backward(self, tokens: float) -> float:
        """And through the MLP: gradients of its output, product, gate and up, when the product itself is gone."""
        return tokens * (self.hidden * (self.s + (self.p if self.setup.mixed else 0)) + 2 * self.wide * self.p)

    def forward(self, tokens: float) -> float:
        """What the larger half needs going forward where nothing is kept."""
        attention = self.hidden * (self.s + self.p) + 3 * (self.query + self.key) * self.p
        return tokens * max(attention, 2 * self.hidden * self.s + 3 * self.wide * self.p)

    def ends(self, tokens: float, whole: bool = True) -> float:
        """What a recomputed layer keeps: the inputs of its two halves."""
        return tokens * self.hidden * (self.s + (self.p if whole else 0))

    def memory(self) -> float:
        """A layer's memory of all documents: pooled keys and values, and routing keys."""
        return self.read * self.key * (2 * self.p + FLOAT)

    def logits(self) -> float:
        """One float32 of the logits that exist at a time. The loss takes two, themselves and their logarithms; its
        backward pass three: those logarithms, which few labelled rows keep until then, and two gradients."""
        return min(self.pack.sizes.labels, LOGIT_ROWS) * self.model.sizes.vocabulary * FLOAT

    def rotary(self, tokens: float) -> float:
        """Rotary factors, which all layers share."""
        return 2 * self.model.sizes.width * self.s * tokens

    def _norm(self) -> float:
        """The states, or plain PyTorch's float32 copy with the unit states, and the factor of each token."""
        return self.hidden * (self.s if self.setup.fused else FLOAT + self.s) + FLOAT

    def _normed(self) -> float:
        """Normed states: one tensor for all products."""
        return self.hidden * self.p

    def _turn(self, width: int) -> float:
        """What head norm and rotation keep of what was projected."""
        if self.setup.fused:
            return width * self.p
        return width * (FLOAT + self.p) + FLOAT * width / self.model.sizes.width if self.model.head_norms else 0

    def _attended(self, width: int) -> float:
        """Queries, output, and the logarithm of each softmax's sum."""
        return 2 * width * self.p + FLOAT * self.model.sizes.heads

    def _memory(self, tokens: float) -> float:
        """Pooled states, projected ones and routing keys of these tokens' chunks."""
        chunks = self.pack.sizes.chunks * tokens / self.pack.sizes.documents
        return chunks * (self.hidden * self.p + 2 * FLOAT * self.key)
