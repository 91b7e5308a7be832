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

The invariant: control tokens come from here alone. Text of documents, questions and answers is encoded with special
tokens split into plain characters, whatever it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from msa_train.errors import UserError
from msa_train.pack import Context

START, END, REF = "<|im_start|>", "<|im_end|>", "<|object_ref_end|>"
CONTROL = (START, END, REF)
ASK = "\nPlease answer the question based on the above historical document information\n\n"
RETURN = "\nPlease return all documents related to the question\n"
STOP = "<End-of-Retrieve>"
REPEAT = "The user's question is: "
ANSWER = "The answer to the question is: "
RoutingWords = Literal["question", "prompt"]


def add_control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Adds the protocol's control tokens that the tokenizer lacks, and returns them.

    The model's embeddings must grow with it; `MemorySparseModule` does so for a backbone with trained weights.
    """
    missing = [token for token in CONTROL if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    return missing


@dataclass(frozen=True)
class Source:
    """A document as a context may cite it: its place in the pack (from 1) and the token ids of its text."""

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
        self._numbers: dict[str, tuple[int, ...]] = {}
        self._fixed = {
            words: tuple(self.text(words)) for words in ("user\n", "\n", ASK, RETURN, STOP, REPEAT, ANSWER.rstrip())
        }

    def _number(self, number: int) -> tuple[int, ...]:
        return self._remembered(f"[{number}]")

    def _dotted(self, number: int) -> tuple[int, ...]:
        return self._remembered(f"[{number}].")

    def _remembered(self, words: str) -> tuple[int, ...]:
        if words not in self._numbers:
            self._numbers[words] = tuple(self.text(words))
        return self._numbers[words]

    def text(self, text: str) -> list[int]:
        """Token ids of plain text; what looks like a control token in it stays text."""
        return self.texts([text])[0]

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many plain texts, in parallel where the tokenizer can."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def head(self) -> list[int]:
        """The template head."""
        return [self.start, *self._fixed["user\n"]]

    def document(self, source: Source) -> list[int]:
        """A document with its number in the pack. `source.text` is that of `" " + text`, so that words stay whole."""
        number = source.number
        return [self.start, *self._dotted(number), *source.text, *self._number(number), self.end]

    def wrapping(self, documents: int) -> int:
        """Tokens that `document` adds to a text, at most, in a pack of this many documents."""
        return 2 + len(self._dotted(documents)) + len(self._number(documents))

    def labels(self, numbers: Sequence[int], answer: int | None) -> int:
        """Labelled tokens of a context that names these documents and has an answer of this many tokens."""
        steps = sum(len(self._number(number)) for number in numbers) + 1
        return (
            steps if answer is None else steps + len(self._fixed[STOP]) + len(self._fixed[ANSWER.rstrip()]) + answer + 1
        )

    def context(self, question: Sequence[int], gold: Sequence[Source], answer: Sequence[int] | None = None) -> Context:
        """One active context: the question, its documents' numbers and, with an answer, their text and the answer.

        Args:
            question: Token ids of the question.
            gold: Documents to retrieve, in the order in which they are named.
            answer: Token ids of `" " + answer`, or None to end after the retrieval step.
        """
        fixed, draft = self._fixed, _Draft()
        draft.add(fixed[ASK])
        first = 0 if self.routing_words == "prompt" else len(draft.tokens)
        draft.add(question)
        last = len(draft.tokens)
        draft.add(fixed[RETURN])
        routing = (first, len(draft.tokens) if self.routing_words == "prompt" else last)
        draft.add([self.end, *fixed["\n"], self.start])
        for source in gold:
            draft.add(self._number(source.number), label=True)
        draft.add([self.ref], label=True)
        if answer is not None:
            for source in gold:
                draft.add([*self._dotted(source.number), *source.text, *fixed["\n"], self.ref])
            draft.add(fixed[STOP], label=True)
            draft.add([self.start, *fixed[REPEAT], *question, *fixed["\n"], self.ref])
            draft.add([*fixed[ANSWER.rstrip()], *answer, self.end], label=True)
        return Context(draft.tokens, draft.labelled, routing)
