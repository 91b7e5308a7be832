"""Generation: a question is routed, documents are retrieved step by step, and the answer is written.

Every step reads the question, and the texts of the steps before, over the memory (`decoding.begin`); the router or the
model itself then names documents, whose original text is appended. When the model ends retrieval, or at the limit, the
answer is written behind the last step's context, which is where training wrote it. Two modes, which differ in who names
the documents: `generative` (the model writes their numbers: the paper) and `router` (the best by the routers' scores).

A question is a coroutine that asks for readings and extensions; `Answerer` serves those of all questions of a batch
together. The invariant: what stands in a context is what the protocol writes, token for token; what a model wrote that
is no document of the bank never stays there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from msa_train.decoding import Decoding, begin, extend
from msa_train.errors import UserError
from msa_train.memory import BanksLayer, MemoryBank, ParallelBank
from msa_train.model import MemorySparseModel
from msa_train.pack import Context
from msa_train.protocol import JOINER, Protocol, Source, restore

STEP_TOKENS = 128  # of a written retrieval step: sixteen documents with numbers of six digits
Mode = Literal["router", "generative"]
Bank = MemoryBank | ParallelBank


@dataclass(frozen=True)
class AskConfig:
    """How questions are answered.

    Args:
        mode: `router`: the best documents by the routers' scores are retrieved. `generative`: the model writes the
            numbers of the documents that it wants (the paper's way).
        documents: Documents that the router retrieves per step, at most.
        margin: Those that score lower than the best by more than this are not retrieved. Scores are cosines, so 2
            leaves none out; documents that look like the right one, and are not, distract the reader.
        original_text: Whether the text of what is retrieved comes into the context. Without it an answer is written
            from the pooled memory alone: the paper's ablation of what the text is worth.
        max_steps: Retrieval steps at most; the model ends retrieval before that when it has what it needs.
        max_new_tokens: Length of an answer at most.
        temperature: 0 writes the likeliest token; above, tokens are drawn, the more evenly the higher.
        top_p: Draw from the likeliest tokens that have this probability together.
        seed: Of the draws; question i of a call draws from (seed, i).
    """

    mode: Mode = "router"
    documents: int = 1
    margin: float = 2.0
    original_text: bool = True
    max_steps: int = 4
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("documents", "max_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.margin < 0:
            raise UserError(f"margin is {self.margin}: give 0 or more")
        if self.mode not in get_args(Mode):
            raise UserError(f"mode is '{self.mode}': give one of {', '.join(get_args(Mode))}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature is {self.temperature}, top_p {self.top_p}: give 0 or more, and above 0 up to 1"
            )


@dataclass(frozen=True)
class Question:
    """A question with more than its words.

    Args:
        text: What is asked.
        lead: Words that its answer is begun with; they are no part of the answer.
        bank: The memory that it is asked of, where that is not the answerer's.
    """

    text: str
    lead: str = ""
    bank: Bank | None = None


@dataclass(frozen=True)
class Retrieved:
    """A document that came into a context.

    Args:
        number: Its number in the bank.
        id: Its name.
        text: Its words.
        score: Its routing score: the weighted mean over layers of a cosine, from -1 to 1.
        step: Retrieval step, from 1.
    """

    number: int
    id: str
    text: str
    score: float
    step: int


@dataclass(frozen=True)
class Written:
    """A piece of an answer, as it is written."""

    text: str


@dataclass(frozen=True)
class Answer:
    """An answer and where it comes from.

    Args:
        question: What was asked.
        text: The answer.
        documents: The documents whose text stood in the context, in the order of their retrieval.
        notes: What did not go as it should.
        tokens: Tokens written.
    """

    question: str
    text: str
    documents: tuple[Retrieved, ...]
    notes: tuple[str, ...]
    tokens: int


Event = Retrieved | Written | Answer


@dataclass(frozen=True)
class _Begin:
    bank: Bank
    context: Context
    excluded: list[int]


@dataclass(frozen=True)
class _Extend:
    decoding: Decoding
    tokens: list[int]


@dataclass(frozen=True)
class _Next:
    """What may stand next in a context: the logits of every token, and the likeliest where none is drawn."""

    logits_V: Tensor
    likeliest: int | None


@dataclass
class _State:
    """A context after its reading."""

    bank: Bank
    following: _Next
    decoding: Decoding
    query_LXR: list[Tensor]
    excluded: list[int]


_Turn = Generator[_Begin | _Extend | Event, Any, None]


class Answerer:
    """Answers questions over a bank.

    Args:
        model: The model that encoded the bank, in evaluation mode.
        protocol: Writes contexts.
        bank: The memory: a `MemoryBank`, or a `ParallelBank` over ranks.
        layer_weights: Weight of each routed layer where scores are ranked; equal by default.
        config: How to answer.
    """

    def __init__(
        self,
        model: MemorySparseModel,
        protocol: Protocol,
        bank: Bank,
        layer_weights: Sequence[float] | None = None,
        config: AskConfig = AskConfig(),
    ) -> None:
        self.model, self.protocol, self.bank, self.config = model, protocol, bank, config
        self.weights = tuple(layer_weights or [1.0] * len(model.routed_layers))
        self.heads = model.attention[model.routed_layers[0]].heads
        self.positions = model.positions
        self.vocabulary = len(protocol.tokenizer)
        self._start = len(protocol.head()) + model.config.top_k  # positions before a context
        self._warpers = LogitsProcessorList()
        if config.temperature > 0:
            self._warpers.append(TemperatureLogitsWarper(config.temperature))
            if config.top_p < 1:
                self._warpers.append(TopPLogitsWarper(config.top_p))

    def ask(self, questions: Sequence[str | Question], batch: int = 16) -> list[Answer]:
        """Answers questions, `batch` at a time."""
        found: dict[int, Answer] = {}
        for first in range(0, len(questions), batch):
            for place, event in self.stream(questions[first : first + batch], first):
                if isinstance(event, Answer):
                    found[place] = event
        return [found[place] for place in range(len(questions))]

    def rank(self, questions: Sequence[str | Question], k: int, batch: int = 16) -> list[list[tuple[int, float]]]:
        """The k best documents of each question by the routers' scores, which nothing is retrieved or answered for.

        Args:
            questions: The questions.
            k: Documents.
            batch: Questions read at a time.

        Returns:
            Numbers and scores of each question's documents, best first.

        Raises:
            UserError: As in `stream`.
        """
        ranked: list[list[tuple[int, float]]] = []
        for first in range(0, len(questions), batch):
            asked = [self._question(question) for question in questions[first : first + batch]]
            contexts = [self._context(self.protocol.text(text), ()) for text, _, _ in asked]
            states = self._begin(
                [_Begin(bank, context, []) for (_, _, bank), context in zip(asked, contexts, strict=True)]
            )
            ranked.extend(self._rank(state, k) for state in states)
        return ranked

    def stream(self, questions: Sequence[str | Question], first: int = 0) -> Iterator[tuple[int, Event]]:
        """Answers questions side by side, and tells what happens as it does.

        Args:
            questions: The questions.
            first: Number of the first one.

        Yields:
            A question's number, and a document that it retrieved, a piece of its answer, or the whole answer.

        Raises:
            UserError: A question is empty, its bank is, or a context outgrows the model's positions.
        """
        asked = [self._question(question) for question in questions]
        turns = {first + place: self._turn(*question, first + place) for place, question in enumerate(asked)}
        waiting: dict[int, _Begin | _Extend] = {}
        replies: dict[int, Any] = dict.fromkeys(turns)
        while replies:
            for place, reply in replies.items():
                for event in self._advance(turns[place], reply):
                    if isinstance(event, _Begin | _Extend):
                        waiting[place] = event
                    else:
                        yield place, event
            replies = self._serve(waiting)
            waiting = {}

    def _question(self, question: str | Question) -> tuple[str, str, Bank]:
        """Words, lead and bank of a question."""
        whole = Question(question) if isinstance(question, str) else question
        check_question(whole.text)
        bank = self.bank if whole.bank is None else whole.bank
        if not len(bank):
            raise UserError("the bank holds no document: encode some, or answer with the backbone alone")
        return whole.text, whole.lead, bank

    @staticmethod
    def _advance(turn: _Turn, reply: Any) -> Iterator[_Begin | _Extend | Event]:
        """What a question does until it needs the model again."""
        try:
            request = turn.send(reply)
            while not isinstance(request, _Begin | _Extend):
                yield request
                request = turn.send(None)
            yield request
        except StopIteration:
            return

    def _serve(self, waiting: dict[int, _Begin | _Extend]) -> dict[int, Any]:
        """Runs the model for all that wait: one reading, and one extension."""
        begins = {place: request for place, request in waiting.items() if isinstance(request, _Begin)}
        extends = {place: request for place, request in waiting.items() if isinstance(request, _Extend)}
        replies: dict[int, Any] = {}
        if begins:
            replies.update(zip(begins, self._begin(list(begins.values())), strict=True))
        if extends:
            logits_QV = extend(
                self.model,
                [request.decoding for request in extends.values()],
                [request.tokens for request in extends.values()],
            )
            replies.update(zip(extends, self._following(logits_QV), strict=True))
        return replies

    def _begin(self, requests: list[_Begin]) -> list[_State]:
        banks, excluded = [request.bank for request in requests], [request.excluded for request in requests]
        layers = [BanksLayer(banks, layer, excluded) for layer in range(len(self.weights))]
        contexts = [request.context for request in requests]
        logits_QV, decodings, recalled_L, offsets_Q = begin(self.model, self.protocol.head(), contexts, layers)
        bounds = offsets_Q.tolist()
        return [
            _State(
                request.bank,
                following,
                decodings[place],
                [recalled.query_XR[bounds[place] : bounds[place + 1]] for recalled in recalled_L],
                request.excluded,
            )
            for place, (request, following) in enumerate(zip(requests, self._following(logits_QV), strict=True))
        ]

    def _following(self, logits_QV: Tensor) -> list[_Next]:
        """What may follow in every context. The likeliest tokens of all come from the device at once."""
        logits_QV = logits_QV[:, : self.vocabulary]  # a model may have rows that are no token's
        greedy = self.config.temperature == 0
        likeliest_Q = logits_QV.argmax(1).tolist() if greedy else [None] * len(logits_QV)
        return [_Next(logits_V, likeliest) for logits_V, likeliest in zip(logits_QV, likeliest_Q, strict=True)]

    # --- one question -------------------------------------------------------------------------------------------

    def _turn(self, question: str, lead: str, bank: Bank, place: int) -> _Turn:
        draw = torch.Generator().manual_seed((self.config.seed * 1_000_003 + place) % 2**63)
        asked, notes = self.protocol.text(question), list[str]()
        retrieved: list[Retrieved] = []
        steps: list[list[Source]] = []

        begun = self.protocol.text(f" {lead}") if lead else []
        closing = [*self.protocol.stop, *self.protocol.repetition(asked), *self.protocol.lead, *begun]
        injected: list[int] = []

        def reading() -> Generator[_Begin, _State, _State]:
            context = self._context(asked, steps, len(closing) + 1)  # and an answer's first token
            return (yield _Begin(bank, context, [document.number for document in retrieved]))

        state = yield from reading()
        while True:
            last = self.positions - len(closing) - 1  # an answer's first token still has its place behind it
            found, written = yield from self._name(state, last, draw, notes)
            found = self._fitting(found, state.decoding.position - len(written), bank, len(closing), notes)
            retrieval = self.protocol.retrieval([number for number, _ in found]) if found else []
            if written and written != retrieval[:-1]:
                state, written = (yield from reading()), []  # what was written is not what shall stand there
            if not found:
                break
            yield from self._feed(state, retrieval[len(written) :])
            step = [
                Retrieved(number, bank.id(number), bank.text(number), score, len(steps) + 1) for number, score in found
            ]
            yield from step
            sources = [self._source(bank, one.number) for one in step]
            retrieved, injected = [*retrieved, *step], self.protocol.injection(sources)
            steps = [*steps, sources]
            if len(steps) == self.config.max_steps or len(retrieved) >= len(bank):
                break
            further = yield from reading()
            if self._ends(further.following):
                break
            state, injected = further, []
        following = yield from self._feed(state, [*injected, *closing])
        tokens = yield from self._write(state, following, draw, notes)
        words: Any = self.protocol.tokenizer.decode(tokens, skip_special_tokens=True)
        yield Answer(question, restore(words).strip(), tuple(retrieved), tuple(notes), len(tokens))

    def _context(self, asked: Sequence[int], steps: Sequence[Sequence[Source]], behind: int = 0) -> Context:
        """A question's context, with so many positions left behind it."""
        context = self.protocol.asking(asked, steps)
        needed = self._start + len(context.tokens) + behind
        if needed > self.positions:
            raise UserError(
                f"the question needs {needed:,} positions, the model has {self.positions:,}: ask a shorter one"
            )
        return context

    def _name(
        self, state: _State, last: int, draw: torch.Generator, notes: list[str]
    ) -> Generator[_Extend, _Next, tuple[list[tuple[int, float]], list[int]]]:
        """The documents of a step with their scores, in the order of their numbers as in training; and the tokens
        that the model wrote for it, up to position `last`."""
        if self.config.mode == "router":
            best = self._rank(state, self.config.documents)
            return sorted(pair for pair in best if pair[1] >= best[0][1] - self.config.margin), []
        control = (self.protocol.ref, self.protocol.start, self.protocol.end)
        written: list[int] = []
        token = self._pick(state.following, draw)
        while token not in control and len(written) < STEP_TOKENS and state.decoding.position < last:
            written.append(token)
            token = self._pick((yield from self._feed(state, [token])), draw)
        numbers = self.protocol.numbers(written)
        unknown = [number for number in numbers if number not in state.bank]
        again = [number for number in numbers if number in state.excluded]
        if unknown:
            notes.append(f"named {_brackets(unknown)}, which the bank does not have")
        if again:
            notes.append(f"named {_brackets(again)} again")
        if not numbers:
            notes.append("named no document")
        wanted = [number for number in numbers if number not in unknown and number not in again]
        scores = dict(self._rank(state, len(wanted), wanted)) if wanted else {}
        return sorted(scores.items()), written

    def _rank(self, state: _State, k: int, among: list[int] | None = None) -> list[tuple[int, float]]:
        offsets_Q = torch.tensor([0, len(state.query_LXR[0])], device=state.query_LXR[0].device)
        found = state.bank.rank(
            state.query_LXR, offsets_Q, self.weights, self.heads, k, [state.excluded if among is None else []], among
        )
        pairs = zip(found.number_QK[0].tolist(), found.score_QK[0].tolist(), strict=True)
        return [(number, score) for number, score in pairs if number >= 0]

    def _ends(self, following: _Next) -> bool:
        """Whether the model ends retrieval: where a step may begin, the protocol has but two ways to go on."""
        another = self.protocol.retrieval([1])[0]
        return bool(following.logits_V[self.protocol.stop[0]] >= following.logits_V[another])

    def _fitting(
        self, found: list[tuple[int, float]], position: int, bank: Bank, closing: int, notes: list[str]
    ) -> list[tuple[int, float]]:
        """The documents whose text fits behind the context, which ends at `position`, with a whole answer after it; the
        worst are left out first."""
        kept = list(found)
        room = self.positions - position - closing - self.config.max_new_tokens
        while kept:
            numbers = [number for number, _ in kept]
            sources = [self._source(bank, number) for number in numbers]
            needed = self.protocol.retrieval(numbers) + self.protocol.injection(sources)
            if len(needed) <= room:
                break
            worst = min(kept, key=lambda pair: pair[1])
            kept.remove(worst)
            notes.append(f"left out [{worst[0]}], whose text does not fit into the model's positions")
        return kept

    def _source(self, bank: Bank, number: int) -> Source:
        return Source(number, self.protocol.text(f" {bank.text(number)}") if self.config.original_text else [])

    def _feed(self, state: _State, tokens: list[int]) -> Generator[_Extend, _Next, _Next]:
        return (yield _Extend(state.decoding, tokens))

    def _write(
        self, state: _State, following: _Next, draw: torch.Generator, notes: list[str]
    ) -> Generator[_Extend | Written, Any, list[int]]:
        """The answer, token by token."""
        control = (self.protocol.end, self.protocol.start, self.protocol.ref)
        words, tokens = DecodeStream(skip_special_tokens=True), list[int]()
        while (token := self._pick(following, draw)) not in control:
            tokens.append(token)
            piece = words.step(self.protocol.tokenizer.backend_tokenizer, token)
            if piece:
                yield Written(piece.replace(JOINER, ""))  # invisible; `restore` takes out of the whole what was added
            if len(tokens) == self.config.max_new_tokens or state.decoding.position >= self.positions:
                notes.append(f"stopped after {len(tokens)} tokens")
                break
            following = yield from self._feed(state, [token])
        return tokens

    def _pick(self, following: _Next, draw: torch.Generator) -> int:
        if following.likeliest is not None:
            return following.likeliest
        none: Any = torch.zeros(1, 0, dtype=torch.int64)
        scores: Any = self._warpers(none, following.logits_V.float().cpu()[None])
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=draw))


def check_question(question: str) -> None:
    """Refuses what is no question.

    Raises:
        UserError: It is empty, or half a surrogate pair is in it.
    """
    if not question.strip():
        raise UserError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError("the question is not valid UTF-8") from error


def _brackets(numbers: Sequence[int]) -> str:
    return ", ".join(f"[{number}]" for number in numbers)
