"""The peak: live bytes of one GPU over a step, walked as the model runs.

Forward, every layer keeps something; backward it gives that back, leaves its gradients, and needs room for a while.
Each moment's live bytes are added up, and the largest is the peak. The walk is of a step that is not the first, so the
optimiser's moments are there, and so are the last step's gradients until the forward pass is over: Lightning frees them
just before the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msa_train.estimate.activations import FLOAT, LOGIT_ROWS, Activations
from msa_train.estimate.sizes import Model, Pack, Setup

SUB_GROUP = 1_000_000_000  # weights that ZeRO-3 steps at a time


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at a moment.

    Args:
        moment: Which.
        weights: Weights, and autocast's copies of them.
        gradients: Those that are there by then.
        optimiser: Moments, and ZeRO's float32 copy.
        kept: Activations that wait for the backward pass.
        temporary: What a layer, or the step, needs for a while.
        logits: Of the labelled rows, with their gradient.
        communication: Buckets.
    """

    moment: str
    weights: float
    gradients: float
    optimiser: float
    kept: float = 0
    temporary: float = 0
    logits: float = 0
    communication: float = 0

    @property
    def parts(self) -> dict[str, float]:
        """All bytes, by what they are."""
        return {name: value for name, value in vars(self).items() if name != "moment"}

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.parts.values())


def moments(model: Model, pack: Pack, setup: Setup) -> Iterator[Memory]:
    """Live bytes of one GPU, moment by moment, of a step that is not the first."""
    run = _Run(model, pack, setup)
    yield from run.forward()
    if setup.trains_backbone:
        yield from run.backward()
    yield from run.step()


def peak(model: Model, pack: Pack, setup: Setup) -> Memory:
    """The moment at which most is live."""
    return max(moments(model, pack, setup), key=lambda memory: memory.total)


class _Run:
    """One step, walked."""

    def __init__(self, model: Model, pack: Pack, setup: Setup) -> None:
        self.model, self.pack, self.setup = model, pack, setup
        self.act = Activations(model, pack, setup)
        self.routed, self.layers = set(model.sizes.routed), model.sizes.layers
        self.last = model.sizes.routed[-1]
        self.tokens, self.contexts = pack.sizes.documents, pack.sizes.contexts
        parts = setup.recompute == "documents" and setup.trains_backbone
        self.in_parts, self.tokens_by_layer = parts, 0 if parts else self.tokens
        self.recomputed = {"none": 0, "layers": self.layers - setup.kept_layers, "documents": self.layers}[
            setup.recompute
        ]
        self.keeps = [self._keeps(number) for number in range(self.layers)]
        self.trained = model.trained(setup.trains_backbone)
        self.fixed = self._fixed()

    def _fixed(self) -> dict[str, float]:
        setup, weights, ranks = self.setup, self.model.weights, self.setup.ranks
        size = setup.stream
        if not setup.steps:
            return {"weights": size * weights, "optimiser": 0, "gradients": 0, "communication": 0}
        if setup.strategy != "zero":
            buckets = setup.strategy == "ddp" and not setup.bucket_view
            return {
                "weights": size * weights,
                "optimiser": 2 * size * self.trained,
                "gradients": size * self.trained if setup.accumulated > 1 else 0,
                "communication": size * self.trained * buckets,
            }
        held = 0 if setup.offload_parameters else 2 * weights / ranks
        buffers = 2 * setup.reduce_bucket * (setup.gradient_bytes if setup.stage == 1 else 2)
        # stage 2 makes them as the backward pass goes and drops them after the step, as two GPUs showed; stage 3 has a
        # buffer for them, and stage 1, not measured, is taken to keep them
        resident = setup.stage != 2 or setup.accumulated > 1
        gradients = self._collected(self.trained) if resident else 0
        if setup.stage == 3:
            held += 2 * min(setup.live, weights)
            buffers = 2 * (setup.reduce_bucket + setup.prefetch)
        return {
            "weights": held if setup.stage == 3 else 2 * weights,
            "optimiser": 0 if setup.offload_optimizer else 12 * self.trained / ranks,
            "gradients": gradients,
            "communication": buffers,
        }

    def _collected(self, weights: float) -> float:
        """Gradients of so many weights as ZeRO adds them up on a GPU."""
        setup = self.setup
        if setup.offload_optimizer:
            return 0
        return setup.gradient_bytes * weights / (1 if setup.stage == 1 else setup.ranks)

    def forward(self) -> Iterator[Memory]:
        """Layer by layer, then the loss. Gradients of the step before are still there: they go when it ends."""
        kept = self.act.rotary(self.tokens_by_layer + self.contexts)
        left = 0 if self.setup.strategy == "zero" or not self.setup.steps else self.setup.stream * self.trained
        copies = 2 * (self.model.weights - (self.model.head if not self.model.tied else 0)) * self.setup.mixed
        if self.in_parts:
            kept += len(self.routed) * self.act.memory()
            needs = self.act.forward(self.pack.part)
            yield self._at("forward pass", kept=kept, temporary=needs, gradients=left, weights=copies)
        for number in range(self.layers):
            tokens = self._of_documents(number) + self.contexts
            needs = self.act.forward(tokens)
            if not self.setup.trains_backbone:
                needs += self.act.ends(tokens)
            kept += self.keeps[number]
            if number >= self.recomputed and self.setup.trains_backbone:  # kept already, but for what goes on
                needs = 2 * self.act.ends(tokens, whole=False)
            yield self._at("forward pass", kept=kept, temporary=needs, gradients=left, weights=copies)
        if self.setup.trains_backbone or self.setup.steps:
            yield self._at("loss", kept=kept, logits=2 * self.act.logits(), gradients=left, weights=copies)

    def backward(self) -> Iterator[Memory]:
        """The loss, the layers from the last to the first, then what the embeddings get."""
        kept = self.act.rotary(self.tokens_by_layer + self.contexts) + sum(self.keeps)
        got, few = float(self.model.head), self.pack.sizes.labels <= LOGIT_ROWS
        if self.in_parts:  # every layer's memory, and the gradient that gathers for it
            kept += 2 * len(self.routed) * self.act.memory()
        yield self._back("start of the backward pass", 0 if few else got, kept=kept, logits=3 * self.act.logits())
        for number in reversed(range(self.layers)):
            tokens, again = self._of_documents(number), number < self.recomputed
            copies = 2 * self.model.layer * (max(number + 1 - self.recomputed, 0) + again) * self.setup.mixed
            moment = "start of the backward pass" if number >= self.layers // 2 else "end of the backward pass"
            rows = tokens + self.contexts
            mlp = self.act.mlp_backward(rows) + (self._half(number) if again else 0)
            yield self._back(moment, got, kept=kept, temporary=mlp, weights=copies)
            attending = self.act.attention_backward(rows) + self._rows_backward(number)
            attending += self._attending(number) if again else 0
            # what the MLP kept is given back by now
            done = rows * self.act.hidden * self.act.p if again else self._half(number)
            yield self._back(moment, got, kept=kept - done, temporary=attending, weights=copies)
            kept -= self.keeps[number]
            got += self.model.layer
        if self.in_parts:
            yield self._part(kept)
        yield self._back("end of the backward pass", got, kept=kept, temporary=self.setup.stream * self.model.head)

    def step(self) -> Iterator[Memory]:
        """The optimiser."""
        setup = self.setup
        if not setup.steps:
            return
        if setup.strategy != "zero":
            yield self._at("optimiser step", gradients=setup.stream * self.trained)
            return
        stepped = self.trained / setup.ranks
        again = 0 if setup.offload_optimizer else FLOAT * min(stepped, SUB_GROUP if setup.stage == 3 else stepped)
        yield self._at("optimiser step", gradients=self._collected(self.trained), temporary=again)

    def _part(self, kept: float) -> Memory:
        """Documents part by part: all that a part keeps in all layers, when all gradients are there: autograd hands
        them over after the last part."""
        part = self.pack.part
        whole = sum(self.act.attention(part, number in self.routed) + self.act.mlp(part) for number in range(self.last))
        copies = 2 * self.model.layer * (self.last + 1) * self.setup.mixed
        return self._back(
            "backward pass through a part of the documents", self.model.weights, kept=kept,
            temporary=whole + self.act.mlp_backward(part) + self.act.rotary(part), weights=copies, held=True,
        )  # fmt: skip

    def _at(self, moment: str, **more: float) -> Memory:
        found = dict(self.fixed)
        for name, value in more.items():
            found[name] = max(found[name], value) if name == "gradients" else found.get(name, 0) + value
        return Memory(moment, **found)

    def _back(self, moment: str, got: float, held: bool = False, **more: float) -> Memory:
        """With the gradients of so many weights: on their way into buckets under ZeRO, unless autograd holds them."""
        setup = self.setup
        got *= self.trained / self.model.weights  # all of it, but where adapters alone are trained
        size = setup.stream * got
        if setup.strategy == "zero" and setup.steps:
            more["temporary"] = more.get("temporary", 0) + (size if held else min(size, 2 * setup.reduce_bucket))
            size = 0 if held else self._collected(got)
        return self._at(moment, gradients=size, **more)

    def _of_documents(self, number: int) -> float:
        """Document tokens that go through a layer's MLP, in step with the contexts."""
        return self.tokens_by_layer if number < self.last else 0

    def _attending(self, number: int) -> float:
        """What the attention of both streams keeps."""
        found = self.act.reading(number in self.routed)
        if number <= self.last and self.tokens_by_layer:
            found += self.act.attention(self.tokens_by_layer, number in self.routed, number < self.last)
        return found

    def _half(self, number: int) -> float:
        return self.act.mlp(self._of_documents(number) + self.contexts)

    def _rows_backward(self, number: int) -> float:
        """Gradients of the keys and values that contexts gathered, of every head first, and of where they came from."""
        act, rows = self.act, self.pack.routed_rows if number in self.routed else self.pack.own_rows
        there = self.contexts + act.read
        return act.p * (rows * (2 * act.query + 4 * act.key) + there * 2 * act.key)

    def _keeps(self, number: int) -> float:
        """What a layer keeps from the forward pass to its own backward pass."""
        act, routed = self.act, number in self.routed
        if not self.setup.trains_backbone:
            if not routed:
                return 0
            pack = self.pack.sizes
            tokens = self.tokens + self.contexts
            ends = act.ends(tokens, whole=False) if number < self.recomputed else 0
            scores = pack.routing * (act.hidden * act.p + FLOAT * (act.query + act.key + act.read))
            return ends + (scores + act._memory(self.tokens)) * (number >= self.recomputed)
        if number >= self.recomputed:
            return self._attending(number) + self._half(number)
        documents = act.ends(self.tokens_by_layer, number < self.last) if number <= self.last else 0
        return documents + act.ends(self.contexts)
