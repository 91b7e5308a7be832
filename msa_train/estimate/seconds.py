"""The time of a step: operations over the share of the card's peak that products reach, bytes over the share of its
bandwidth that passes reach.

The shares were measured on one H200, and are taken for any card's. The invariant: what is recomputed is counted here,
as it takes time, and not in msa_train/operations.py, as it is not useful.
"""

from __future__ import annotations

from dataclasses import dataclass

from msa_train.estimate.activations import FLOAT, LOGIT_ROWS, Activations
from msa_train.estimate.sizes import Card, Model, Pack, Setup
from msa_train.operations import forward_operations, training_operations

# measured on an H200, with Qwen3-4B's shape and packs of 65,571 tokens
PRODUCTS = 0.716  # share of the sheet's dense bfloat16 peak that matrix products reach
PASSES = 0.61  # share of the sheet's bandwidth that norms, rotations, activations and sums reach, all together
PLAIN_PASSES = 4.7  # time of plain PyTorch's norms, rotations and activation, over that of fused ones
ATTENTION = 8.9e-12  # seconds per element of the queries where documents have some hundred tokens, at this peak:
MEASURED_PEAK = 989e12
LAUNCH = 15e-6  # seconds that a kernel takes beside its work: its start, its tail and the gap before it
# counted in the model's own run
CONTEXT_KERNELS, DOCUMENT_KERNELS = 52, 14  # kernels of a layer forward; backward once, and three times, as many
# not measured
PAIRS = 0.5  # share of the peak that attention reaches where documents are long
HOST_STEP = 40e9  # bytes a second of an optimiser in the host's memory
HOST_LINK = 25e9  # bytes a second between host and card


@dataclass(frozen=True)
class Time:
    """Seconds of an optimiser step on one GPU.

    Args:
        products: Linear layers, forward, repeated and backward.
        attention: Of both streams.
        passes: Norms, rotations, activations, chunk means and sums: what memory bounds.
        launches: Starts and ends of kernels.
        optimiser: Its step.
        communication: What the backward pass does not hide.
    """

    products: float
    attention: float
    passes: float
    launches: float
    optimiser: float
    communication: float

    @property
    def parts(self) -> dict[str, float]:
        """All seconds, by what they go to."""
        return dict(vars(self))

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.parts.values())


def step_time(model: Model, pack: Pack, setup: Setup, card: Card) -> Time:
    """Seconds of a step of `accumulated` packs on every GPU."""
    spent = _Seconds(model, pack, setup, card)
    packs, compute = setup.accumulated, spent.compute()
    optimiser = spent.optimiser() if setup.steps else 0.0
    hidden = sum(compute.values()) / 2  # what overlaps: about the backward pass
    communication = spent.communication(hidden) if setup.steps and setup.ranks > 1 else 0.0
    return Time(**{part: packs * value for part, value in compute.items()}, optimiser=optimiser,
                communication=communication)  # fmt: skip


class _Seconds:
    """What each part of a step takes."""

    def __init__(self, model: Model, pack: Pack, setup: Setup, card: Card) -> None:
        self.model, self.pack, self.setup, self.card = model, pack, setup, card
        self.act = Activations(model, pack, setup)
        self.peak = (card.single if setup.product == FLOAT else card.tflops) * 1e12
        self.moved = card.bandwidth * 1e12 * PASSES  # bytes a second
        trains, layers = setup.trains_backbone, model.sizes.layers
        again = {"none": 0.0, "layers": 1 - setup.kept_layers / layers, "documents": 1.0}[setup.recompute]
        self.again = again if trains else 0.0  # share of the layers that run forward twice
        self.parts = -(-pack.sizes.documents // pack.part) if setup.recompute == "documents" and trains else 1
        self.trained = model.trained(trains)

    def compute(self) -> dict[str, float]:
        """Forward and backward of one pack."""
        return {
            "products": self._products(),
            "attention": self._attention(),
            "passes": self._passes(),
            "launches": self._launches(),
        }

    def _products(self) -> float:
        parts = forward_operations(self.model.sizes, self.pack.sizes)
        pairs = parts["document_pairs"] + parts["context_pairs"]
        trains, act = self.setup.trains_backbone, self.act
        useful = training_operations(self.model.sizes, self.pack.sizes, trains) - pairs * (3 if trains else 1)
        # a layer's recomputation ends at the last tensor to be kept: before the output of each half
        ends, inner = act.query + act.wide, act.query + 2 * act.key + 2 * act.wide
        share = inner / (ends + inner)
        documents = parts["documents"] * (1 if self.setup.recompute == "documents" else share)
        repeated = self.again * (documents + parts["contexts"] * share)
        repeated += parts["head"] * (trains and self.pack.sizes.labels > LOGIT_ROWS)
        return (useful + repeated) / (PRODUCTS * self.peak)

    def _attention(self) -> float:
        sizes, pack, trains = self.model.sizes, self.pack.sizes, self.setup.trains_backbone
        tokens = pack.documents * sizes.routed[-1] + pack.contexts * sizes.layers
        parts = forward_operations(sizes, pack)
        pairs = parts["document_pairs"] + parts["context_pairs"]
        rows = ATTENTION * (MEASURED_PEAK / self.peak) * tokens * self.act.query
        forward, backward = 1 + self.again, 1.0 * trains
        return rows * (forward + backward) + pairs / (PAIRS * self.peak) * (forward + 2.5 * backward)

    def _passes(self) -> float:
        """Elements that are read and written, times their size."""
        act, pack, sizes = self.act, self.pack.sizes, self.model.sizes
        pooled = (act.hidden + 2 * act.key) * len(sizes.routed) / sizes.layers
        forward = 6 * act.hidden + 3 * act.wide + 2 * (act.query + act.key) + pooled
        once = 3 * act.hidden  # the second residual
        backward = 25 * act.hidden + 5 * act.wide + 3 * act.query + 9 * act.key + pooled
        elements = forward * (1 + self.again) + once + backward * self.setup.trains_backbone
        tokens = pack.documents * sizes.routed[-1] + pack.contexts * sizes.layers
        states = tokens * elements * (act.s + act.p) / 2 * (1 if self.setup.fused else PLAIN_PASSES)
        # weights' gradients are added up over streams and parts
        added = 3 * self.setup.stream * self.trained * self.parts if self.setup.trains_backbone else 0.0
        return (states + added) / self.moved

    def _launches(self) -> float:
        trains = self.setup.trains_backbone
        documents = DOCUMENT_KERNELS * self.parts * (1 + self.again + 3 * trains)
        return LAUNCH * self.model.sizes.layers * (documents + CONTEXT_KERNELS * (1 + self.again + trains))

    def optimiser(self) -> float:
        """Weight, gradient and two moments are read, all but the gradient written."""
        setup, own = self.setup, self.trained / self.setup.ranks
        if setup.strategy != "zero":
            return 7 * setup.stream * self.trained / self.moved
        if setup.offload_optimizer:
            return 28 * own / HOST_STEP + 2 * 2 * own / HOST_LINK
        return (28 + 2 * setup.gradient_bytes) * own / self.moved

    def communication(self, hidden: float) -> float:
        """A ring over the card's links; what overlaps with half of a pack's computing is not counted.

        Args:
            hidden: Seconds of that.
        """
        setup, away = self.setup, (self.setup.ranks - 1) / self.setup.ranks
        link = self.card.link * 1e9
        one = away * self.trained / link  # a byte of every trained weight, scattered or gathered
        if setup.strategy != "zero":
            return max(2 * setup.stream * one - hidden, 0.0)
        if setup.stage == 1:
            return 2 * setup.gradient_bytes * one + 2 * one
        if setup.stage == 2:
            return setup.accumulated * max(2 * one - hidden, 0.0) + 2 * one
        gathered = 2 * away * self.model.weights / link * (1 + self.again + setup.trains_backbone)
        return setup.accumulated * max(2 * one + gathered - 2 * hidden, 0.0)
