"""Encoding: documents in a stream become segments of a bank.

Batches hold as many documents as their token budget takes, end to end, without padding. On a CPU a document is a batch
of its own: a matrix product's rows may round differently beside other rows there, and alone they cannot, so a bank that
was changed document by document is bitwise the bank that is encoded anew. The invariant: what a segment holds follows
from its documents and their numbers alone.

Shapes: as in segment.py.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from msa_train.errors import UserError
from msa_train.kernels.maxsim import Precision
from msa_train.memory.bank import MemoryBank
from msa_train.memory.blocks import Tiers
from msa_train.memory.segment import BankShape, Passage, Segment
from msa_train.model import MemorySparseModel
from msa_train.pack import Documents
from msa_train.protocol import Protocol, Source

SEGMENT_BYTES = 1 << 30  # of a segment, at most
SEGMENT_SECONDS = 60  # of encoding it: what is lost when encoding is broken off
TABLE_BYTES = 44  # of a document: its number, tokens, where its chunks, name and words begin, where its source's ends
SAMPLED = 1024  # values of each weight that tell one model from another


@dataclass(frozen=True)
class Size:
    """What documents take in a bank.

    Args:
        documents: How many they are.
        tokens: Their tokens, wrapping included.
        chunks: Their chunks.
        key_bytes: Bytes of their routing keys, over all layers.
        value_bytes: Bytes of their pooled keys and values, over all layers.
        text_bytes: Bytes of their words, names and tables.

    A file takes 24 bytes more (the ends of its tables), and its header.
    """

    documents: int
    tokens: int
    chunks: int
    key_bytes: int
    value_bytes: int
    text_bytes: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.key_bytes + self.value_bytes + self.text_bytes


class Encoder:
    """Encodes documents with one model.

    Args:
        model: The model, in evaluation mode.
        protocol: Writes documents.
        precision: Of the routing keys. `bfloat16` and `int8` are for large banks (docs/memory.md has what each costs
            in recall), `float32` is exactly what training scores with.
        batch_tokens: Tokens that are encoded at a time, at most; a longer document is a batch of its own. By default
            65,536, and on a CPU every document by itself.
    """

    def __init__(
        self,
        model: MemorySparseModel,
        protocol: Protocol,
        precision: Precision = "bfloat16",
        batch_tokens: int | None = None,
    ) -> None:
        self.advance: Callable[[int], object] = lambda tokens: None  # told of the tokens of every batch that is done
        weight = next(model.parameters())
        self.model, self.protocol, self.device = model, protocol, weight.device
        self.batch_tokens = batch_tokens or (1 if weight.device.type == "cpu" else 65_536)
        attention = model.attention[model.routed_layers[0]]
        self.shape = BankShape(
            model=fingerprint(model),
            text=protocol.fingerprint(),
            chunk_size=model.config.chunk_size,
            layers=model.routed_layers,
            groups=attention.groups,
            width=attention.width,
            dtype=str(weight.dtype).removeprefix("torch."),
            precision=precision,
        )
        self.positions = model.positions

    def bank(self, passages: Iterable[Passage], tiers: Tiers = Tiers()) -> MemoryBank:
        """A bank in memory, on the model's device.

        Raises:
            UserError: Two documents have one name, or one is longer than the model's positions.
        """
        bank = MemoryBank(self.shape, device=self.device, tiers=tiers)
        bank.add(self.segments(passages))
        return bank

    def add(self, bank: MemoryBank, passages: Iterable[Passage]) -> None:
        """Encodes documents and adds them to a bank, whose precision of routing keys they get.

        Raises:
            UserError: Another model made the bank, a name is taken, or a document is too long. Nothing is added then.
        """
        bank.add(self.added(bank, passages))

    def added(self, bank: MemoryBank, passages: Iterable[Passage]) -> Iterator[Segment]:
        """What `add` adds, a segment at a time."""
        self.check(bank)
        return self.encode(self.numbered(passages, bank.next_number), bank.shape.precision)

    def replace(self, bank: MemoryBank, passages: Iterable[Passage]) -> None:
        """Encodes documents anew, under the numbers that they have in a bank.

        Raises:
            UserError: Another model made the bank, a document is not in it or too long, or two have one name. Nothing
                is replaced then.
        """
        bank.replace(self.replaced(bank, passages))

    def replaced(self, bank: MemoryBank, passages: Iterable[Passage]) -> Iterator[Segment]:
        """What `replace` puts in the place of others, a segment at a time."""
        self.check(bank)
        numbered = sorted(((bank.number(passage.id), passage) for passage in passages), key=lambda pair: pair[0])
        return self.encode(self._checked(numbered), bank.shape.precision)

    def check(self, bank: MemoryBank) -> None:
        """Refuses a bank of another model.

        Raises:
            UserError: It was encoded by other weights, in other chunks or with another tokenizer.
        """
        check_shape(bank.shape, self.shape)

    def size(self, passages: Iterable[Passage], first: int = 1) -> Size:
        """What documents will take, without encoding them.

        Args:
            passages: The documents.
            first: Number of the first.
        """
        documents = tokens = chunks = words = 0
        for number, passage in self.numbered(passages, first):
            length = len(passage.tokens) + self.protocol.wrapping(number)
            documents, tokens = documents + 1, tokens + length
            chunks += -(-length // self.shape.chunk_size)
            words += len(passage.text.encode()) + len(passage.id.encode()) + TABLE_BYTES
        return Size(documents, tokens, chunks, self.shape.key_bytes(chunks), self.shape.value_bytes(chunks), words)

    def segments(self, passages: Iterable[Passage], first: int = 1) -> Iterator[Segment]:
        """Encodes documents, numbered from `first` on.

        Raises:
            UserError: Two documents have one name, or one is longer than the model's positions.
        """
        return self.encode(self.numbered(passages, first))

    def numbered(self, passages: Iterable[Passage], first: int = 1) -> Iterator[tuple[int, Passage]]:
        """Numbers documents from `first` on, and checks them as they go by.

        Raises:
            UserError: As in `segments`.
        """
        return self._checked(enumerate(passages, start=first))

    def _checked(self, numbered: Iterable[tuple[int, Passage]]) -> Iterator[tuple[int, Passage]]:
        seen: set[str] = set()
        for number, passage in numbered:
            if passage.id in seen:
                raise UserError(f"two documents are named '{passage.id}': give each a name of its own")
            seen.add(passage.id)
            self._check_length(passage, len(passage.tokens) + self.protocol.wrapping(number))
            yield number, passage

    def _check_length(self, passage: Passage, length: int) -> None:
        if length > self.positions:
            raise UserError(
                f"document '{passage.id}' has {length:,} tokens, the model has {self.positions:,} positions: "
                "split it (max_document_tokens)"
            )

    def encode(self, numbered: Iterable[tuple[int, Passage]], precision: Precision | None = None) -> Iterator[Segment]:
        """Encodes documents under given numbers, which ascend.

        Args:
            numbered: Numbers and documents.
            precision: Of the routing keys, where it is not the encoder's own.
        """
        shape = replace(self.shape, precision=precision or self.shape.precision)
        parts: list[Segment] = []
        size, started = 0, time.monotonic()
        for batch in self._batches(numbered):
            parts.append(self._encode(batch, shape))
            size += shape.key_bytes(parts[-1].chunks) + shape.value_bytes(parts[-1].chunks)
            if size >= SEGMENT_BYTES or time.monotonic() - started >= SEGMENT_SECONDS:
                yield Segment.join(parts)
                parts, size, started = [], 0, time.monotonic()
        if parts:
            yield Segment.join(parts)

    def apart(self, groups: Sequence[Sequence[tuple[int, Passage]]]) -> list[Segment]:
        """Encodes the documents of several banks together, as they would be alone.

        Args:
            groups: Numbers and documents of each, numbers ascending; none of them empty.

        Returns:
            A segment of each group.
        """
        parts: list[Segment] = []
        ends = [0, *accumulate(len(group) for group in groups)]
        for batch in self._batches(pair for group in groups for pair in group):
            parts.append(self._encode(batch, self.shape, range(1, len(batch) + 1)))  # their own numbers come below
        whole = Segment.join(parts)
        segments = []
        for group, first, last in zip(groups, ends, ends[1:], strict=False):
            numbers = [number for number, _ in group]
            assert numbers == sorted(set(numbers)) and numbers[0] > 0
            segments.append(replace(whole.slice(first, last), number_D=torch.tensor(numbers, dtype=torch.int64)))
        return segments

    def _batches(self, numbered: Iterable[tuple[int, Passage]]) -> Iterator[list[tuple[int, Passage, list[int]]]]:
        batch: list[tuple[int, Passage, list[int]]] = []
        total = 0
        for number, passage in numbered:
            tokens = self.protocol.document(Source(number, list(passage.tokens)))
            self._check_length(passage, len(tokens))
            if batch and total + len(tokens) > self.batch_tokens:
                yield batch
                batch, total = [], 0
            batch.append((number, passage, tokens))
            total += len(tokens)
        if batch:
            yield batch

    @torch.inference_mode()
    def _encode(
        self, batch: list[tuple[int, Passage, list[int]]], shape: BankShape, kept_as: Sequence[int] = ()
    ) -> Segment:
        numbers, passages, tokens = zip(*batch, strict=True)
        memory = self.model.encode(Documents.build(tokens, shape.chunk_size).to(self.device))
        lengths = [len(one) for one in tokens]
        segment = Segment.of(passages, kept_as or numbers, lengths, memory, shape)
        self.advance(sum(lengths))
        return segment


def check_shape(bank: BankShape, model: BankShape) -> None:
    """Refuses a bank of another model; the precision of its routing keys may be any.

    Raises:
        UserError: What differs is named.
    """
    for name, what in (
        ("chunk_size", "chunks of another size"), ("layers", "other routed layers"), ("groups", "other heads"),
        ("width", "heads of another width"), ("dtype", "another precision"), ("text", "another tokenizer"),
        ("model", "other weights"),
    ):  # fmt: skip
        theirs, ours = getattr(bank, name), getattr(model, name)
        if theirs != ours:
            raise UserError(
                f"the bank was encoded with {what} ({theirs}; the model has {ours}): encode it again with this model, "
                "or name the checkpoint that encoded it: --model RUN/step=N.ckpt"
            )


def fingerprint(model: MemorySparseModel) -> str:
    """Changes when the weights do: up to 1,024 evenly spaced values of each, as bfloat16, and all names and shapes.

    The rounding makes it the same for one model in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].to("cpu", torch.bfloat16)
        digest.update(repr((name, tuple(weight.shape))).encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
