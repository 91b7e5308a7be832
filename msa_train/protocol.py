"""The text protocol: documents, question, retrieval steps and answer as token ids, labels and routing span.

It is the published one, so that weights can be exchanged with the published 4B model:

    document i     <|im_start|>[i]. {text}[i]<|im_end|>
    template head  <|im_start|>user\\n
    query          \\nPlease answer ... information\\n\\n{question}\\nPlease return ... question\\n
                   <|im_end|>\\n<|im_start|>
    retrieval      [4]<|object_ref_end|>                        (labelled)
    injection      [4]. {text}\\n<|object_ref_end|>              (the original text; context, not label)
    end            <End-of-Retrieve>                            (labelled)
    answer         <|im_start|>The user's question is: {question}\\n<|object_ref_end|>
                   The answer to the question is: {answer}<|im_end|>      (the last line labelled)

A chain of several retrieval steps is one context per step: the question and all that was retrieved before are given,
and both route; the step's numbers are labelled. An instruction is an ordinary chat turn behind the same head.

The invariant: control tokens and document numbers come from here alone. Text of documents, questions and answers is
encoded with special tokens split into plain characters, and what reads like a document's number or the end of
retrieval is broken by an invisible word joiner (`neutralise`; `restore` undoes it exactly).
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import AddedToken, PreTrainedTokenizerBase

from msa_train.errors import UserError
from msa_train.pack import Context

START, END, REF = "<|im_start|>", "<|im_end|>", "<|object_ref_end|>"
CONTROL = (START, END, REF)
ASK = "\nPlease answer the question based on the above historical document information\n\n"
RETURN = "\nPlease return all documents related to the question\n"
STOP = "<End-of-Retrieve>"
REPEAT = "The user's question is: "
ANSWER = "The answer to the question is: "
ASSISTANT = "assistant\n"
JOINER = "\u2060"  # WORD JOINER: no width, no break, left alone by NFC and NFKC
REMEMBERED = 1 << 17  # numbers of documents as tokens: more than a pack has, and 25 MB
RoutingWords = Literal["question", "prompt"]

# a joiner that is there already gets one more, so that undoing takes away exactly what was added
NEUTRALISED = 1  # raise it when `neutralise` changes: stores are then built again
_IMITATION = re.compile(rf"\[(?={JOINER}*[0-9]+\])|<(?={JOINER}*End-of-Retrieve>)")
_NEUTRALISED = re.compile(rf"(?<=\[){JOINER}(?={JOINER}*[0-9]+\])|(?<=<){JOINER}(?={JOINER}*End-of-Retrieve>)")


def neutralise(text: str) -> str:
    """Breaks what imitates a document's number or the end of retrieval, invisibly.

    >>> neutralise("see [12] and <End-of-Retrieve>") == "see [\u206012] and <\u2060End-of-Retrieve>"
    True
    """
    return _IMITATION.sub(rf"\g<0>{JOINER}", text)


def restore(text: str) -> str:
    """Undoes `neutralise` exactly.

    >>> restore(neutralise("a [\u206012] [3]")) == "a [\u206012] [3]"
    True
    """
    return _NEUTRALISED.sub("", text)


def add_control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Adds the protocol's control tokens that the tokenizer lacks, and returns them; marks those that it has special,
    for the text of a document could spell out others.

    The model's embeddings must grow with it; `MemorySparseModule` does so for a backbone with trained weights.
    """
    missing = [token for token in CONTROL if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    plain = [t for t in CONTROL if t not in missing and not _is_special(tokenizer, t)]
    if missing or plain:
        special = [AddedToken(token, special=True, normalized=False) for token in (*missing, *plain)]
        tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    return missing


def _is_special(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    return any(added.special and added.content == token for added in tokenizer.added_tokens_decoder.values())


@dataclass(frozen=True)
class Source:
    """A document as a context may cite it: its place in the pack (from 1) and the token ids of its text, if any."""

    number: int
    text: Sequence[int]


@dataclass
class _Draft:
    tokens: list[int] = field(default_factory=list)
    labelled: list[bool] = field(default_factory=list)

    def add(self, tokens: Sequence[int], label: bool = False) -> None:
        self.tokens.extend(tokens)
        self.labelled.extend([label] * len(tokens))


class Protocol:
    """Writes packs in one tokenizer's ids.

    Args:
        tokenizer: A fast tokenizer that has the control tokens (see `add_control_tokens`).
        routing_words: `question`: only the words of the user's question route. `prompt`: the words of the prompt
            around it as well, as published; a document that happens to hold those words may then outrank the rest for
            every query, since a score is a maximum over tokens.

    Raises:
        UserError: A control token is missing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, routing_words: RoutingWords = "question") -> None:
        ids: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in CONTROL]
        missing = [t for t, i in zip(CONTROL, ids, strict=True) if i is None or i == tokenizer.unk_token_id]
        if missing:
            raise UserError(
                f"the tokenizer lacks the protocol's tokens {', '.join(missing)}: "
                "add them with msa_train.protocol.add_control_tokens"
            )
        self.tokenizer = tokenizer
        self.routing_words = routing_words
        self.start, self.end, self.ref = ids
        unsplit = [t for t, i in zip(CONTROL, ids, strict=True) if i in self._ids([f" {t} "])[0]]
        if unsplit:
            raise UserError(
                f"the tokenizer reads {', '.join(unsplit)} in plain text as control tokens (added, but not marked "
                "special): open it with msa_train.protocol.add_control_tokens"
            )
        self._numbers: dict[str, tuple[int, ...]] = {}
        self._fixed = {
            words: tuple(self._ids([words])[0])
            for words in ("user\n", "\n", ASK, RETURN, STOP, REPEAT, ANSWER.rstrip(), ASSISTANT)
        }

    def _number(self, number: int) -> tuple[int, ...]:
        return self._remembered(f"[{number}]")

    def _dotted(self, number: int) -> tuple[int, ...]:
        return self._remembered(f"[{number}].")

    def _remembered(self, words: str) -> tuple[int, ...]:
        if words not in self._numbers:
            if len(self._numbers) == REMEMBERED:  # a bank may have any number of documents
                self._numbers.clear()
            self._numbers[words] = tuple(self._ids([words])[0])
        return self._numbers[words]

    def text(self, text: str) -> list[int]:
        """Token ids of plain text; what looks like a control token or a document's number in it stays text."""
        return self.texts([text])[0]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many plain texts, in parallel where the tokenizer can."""
        return self._ids([neutralise(text) for text in texts])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def token_starts(self, text: str) -> list[int]:
        """First character of every token of a plain text, as `text` writes it."""
        encoded = self.tokenizer(
            neutralise(text), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )
        joiners = [match.end() + number for number, match in enumerate(_IMITATION.finditer(text))]
        return [start - bisect_left(joiners, start) for start, _ in encoded["offset_mapping"]]

    def fingerprint(self) -> str:
        """Changes when the same text would become other ids."""
        state = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(f"{NEUTRALISED}{state}".encode()).hexdigest()[:16]

    def head(self) -> list[int]:
        """The template head."""
        return [self.start, *self._fixed["user\n"]]

    def document(self, source: Source) -> list[int]:
        """A document with its number in the pack. `source.text` is that of `" " + text`, so that words stay whole."""
        number = source.number
        return [self.start, *self._dotted(number), *source.text, *self._number(number), self.end]

    def wrapping(self, number: int) -> int:
        """Tokens that `document` adds to the text of the document with this number."""
        return 2 + len(self._dotted(number)) + len(self._number(number))

    def labels(self, numbers: Sequence[int] | None, answer: int | None) -> int:
        """Labelled tokens of a context.

        Args:
            numbers: Documents that it names; None where it was handed them.
            answer: Tokens of its answer, or None where it has none.
        """
        steps = 0 if numbers is None else sum(len(self._number(number)) for number in numbers) + 1
        return (
            steps if answer is None else steps + len(self._fixed[STOP]) + len(self._fixed[ANSWER.rstrip()]) + answer + 1
        )

    def context_tokens(self, question: int, steps: Sequence[Sequence[int]], answer: int, answer_share: float) -> float:
        """Length of a context on average, over the steps that may be drawn and whether the answer follows.

        Args:
            question: Tokens of the question.
            steps: Tokens of every document of every step; none for an instruction.
            answer: Tokens of the answer, 0 where there is none.
            answer_share: Share of the contexts that are answered.
        """
        if not steps:
            return question + answer + 5 + len(self._fixed[ASSISTANT])
        number, newline = len(self._number(10)), len(self._fixed["\n"])
        retrieved = [1 + number * len(step) for step in steps]
        injected = [sum(text + len(self._dotted(10)) + newline + 1 for text in step) for step in steps]
        start = len(self._fixed[ASK]) + question + len(self._fixed[RETURN]) + 2 + newline
        drawn = [start + sum(retrieved[: last + 1]) + sum(injected[:last]) for last in range(len(steps))]
        fixed = sum(len(self._fixed[words]) for words in (STOP, REPEAT, ANSWER.rstrip()))
        answered = drawn[-1] + injected[-1] + fixed + question + newline + 3 + answer
        share = answer_share if answer else 0.0
        return share * answered + (1 - share) * sum(drawn) / len(drawn)

    def context(
        self,
        question: Sequence[int],
        steps: Sequence[Sequence[Source]],
        answer: Sequence[int] | None = None,
        distractors: Sequence[Source] = (),
    ) -> Context:
        """One active context: a question and a retrieval step; after the last one, with an answer, that as well.

        Args:
            question: Token ids of the question.
            steps: Documents of every step up to the one to learn, each in the order in which it names them. Those
                before the last are given: their text stands in the context and routes like the question.
            answer: Token ids of `" " + answer`, or None to end after the retrieval step.
            distractors: Documents that a router handed over with those of the last step. The step is then read, not
                learnt: nobody shall write the numbers of documents that do not answer.
        """
        *given, wanted = steps
        draft, routing = self._ask(question, given)
        read = sorted([*wanted, *distractors], key=lambda source: source.number) if distractors else wanted
        draft.add(self.retrieval([source.number for source in read]), label=not distractors)
        if answer is not None:
            self._inject(draft, read)
            draft.add(self.stop, label=True)
            draft.add(self.repetition(question))
            draft.add([*self.lead, *answer, self.end], label=True)
        return Context(draft.tokens, draft.labelled, routing)

    def asking(self, question: Sequence[int], given: Sequence[Sequence[Source]] = ()) -> Context:
        """What stands before the next retrieval step when a question is asked, exactly as `context` writes it.

        Args:
            question: Token ids of the question.
            given: Documents of the steps so far; their text stands in the context and routes as well.
        """
        draft, routing = self._ask(question, given)
        return Context(draft.tokens, draft.labelled, routing)

    def retrieval(self, numbers: Sequence[int]) -> list[int]:
        """A retrieval step: the documents' numbers and the control token that ends them."""
        return [*(token for number in numbers for token in self._number(number)), self.ref]

    def injection(self, step: Sequence[Source]) -> list[int]:
        """The original text of a step's documents."""
        draft = _Draft()
        self._inject(draft, step)
        return draft.tokens

    def repetition(self, question: Sequence[int]) -> list[int]:
        """What is appended behind the end of retrieval, before the answer."""
        return [self.start, *self._fixed[REPEAT], *question, *self._fixed["\n"], self.ref]

    @property
    def stop(self) -> tuple[int, ...]:
        """The end of retrieval."""
        return self._fixed[STOP]

    @property
    def lead(self) -> tuple[int, ...]:
        """The words that lead an answer."""
        return self._fixed[ANSWER.rstrip()]

    def numbers(self, tokens: Sequence[int]) -> list[int]:
        """The documents that a written retrieval step names, in its order, each once.

        Numbers of more than nine digits are no document's and are left out; so is whatever else was written.
        """
        words: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return list(dict.fromkeys(int(digits) for digits in re.findall(r"\[([0-9]{1,9})\]", words)))

    def instruction(self, prompt: Sequence[int], response: Sequence[int]) -> Context:
        """One chat turn: no document, no number. Its routing span is there for the layout alone; nothing is selected.

        Args:
            prompt: Token ids of the instruction.
            response: Token ids of the response.
        """
        draft = _Draft()
        draft.add([*prompt, self.end, *self._fixed["\n"], self.start, *self._fixed[ASSISTANT]])
        draft.add([*response, self.end], label=True)
        return Context(draft.tokens, draft.labelled, [(0, 1)])

    def _ask(self, question: Sequence[int], given: Sequence[Sequence[Source]]) -> tuple[_Draft, list[tuple[int, int]]]:
        """The question and the steps so far, with the spans that route."""
        fixed, draft = self._fixed, _Draft()
        draft.add(fixed[ASK])
        first = 0 if self.routing_words == "prompt" else len(draft.tokens)
        draft.add(question)
        last = len(draft.tokens)
        draft.add(fixed[RETURN])
        routing = [(first, len(draft.tokens) if self.routing_words == "prompt" else last)]
        draft.add([self.end, *fixed["\n"], self.start])
        for step in given:
            draft.add(self.retrieval([source.number for source in step]))
            routing.extend(self._inject(draft, step))
        return draft, routing

    def _inject(self, draft: _Draft, step: Sequence[Source]) -> list[tuple[int, int]]:
        """Writes the original text of a step's documents; returns where their words are."""
        spans = []
        for source in step:
            draft.add(self._dotted(source.number))
            start = len(draft.tokens)
            draft.add(source.text)
            if source.text:
                spans.append((start, len(draft.tokens)))
            draft.add([*self._fixed["\n"], self.ref])
        return spans
