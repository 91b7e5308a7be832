"""The prompt of a reader that sees the whole memory: one chat turn, and the answer begun.

    {template} {preamble}\\n{document}{separator}{document} ... {document}\\n{question} {template} {lead}

It is token ids, not a string: the template's words are encoded with its control tokens, everything else as the
protocol's plain text, so no document can close the turn. The invariant: a prompt's pieces are encoded one by one, cut
where no tokenizer's words go on (after a line break or before a space); so a prompt has as many tokens as its pieces
have, and whoever counts documents has counted the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_train.errors import UserError
from msa_train.protocol import END, START, Protocol

CHATML = f"{START}user\n%s{END}\n{START}assistant\n"
WORDS = "\ue000"  # stands for the user's words in a template; Unicode gives it no meaning


def flat_prompt(
    protocol: Protocol, preamble: str, documents: Sequence[str], separator: str, question: str, lead: str
) -> list[int]:
    """Token ids of a whole memory and a question.

    Args:
        protocol: Encodes text; its tokenizer has the chat template. One that has none gets ChatML.
        preamble: What stands before the documents, if anything.
        documents: Their words, in order; with none, what is returned is the rest of the prompt.
        separator: White space between two documents.
        question: What is asked.
        lead: Words that the answer is begun with, without a space before them.

    Raises:
        UserError: The chat template does not write the user's words exactly once.
    """
    before, after = _template(protocol.tokenizer)
    last = len(documents) - 1
    pieces = [
        *([f"{preamble}\n"] if preamble else []),
        *(piece(text, separator, place == 0, place == last) for place, text in enumerate(documents)),
        question,
    ]
    begun = protocol.text(f" {lead}") if lead else []
    return [*before, *(token for ids in protocol.texts(pieces) for token in ids), *after, *begun]


def piece(text: str, separator: str, first: bool, last: bool) -> str:
    r"""A document with the white space that is encoded with it.

    Args:
        text: Its words.
        separator: What stands between two documents.
        first: Whether none is before it.
        last: Whether none is behind it.

    >>> [piece(text, " ", text == "a", text == "c") for text in "abc"]
    ['a', ' b', ' c\n']
    >>> [piece(text, "\n\n", text == "a", text == "c") for text in "abc"]
    ['a\n\n', 'b\n\n', 'c\n']
    """
    breaks = "\n" in separator
    before = "" if first or breaks else separator
    behind = "\n" if last else separator if breaks else ""
    return f"{before}{text}{behind}"


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of what the chat template writes before and behind the user's words."""
    if tokenizer.chat_template is None:
        written = CHATML % WORDS
    else:
        turn = [{"role": "user", "content": WORDS}]
        written = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if written.count(WORDS) != 1:
        raise UserError(
            f"the tokenizer's chat template writes the user's words {written.count(WORDS)} times: a flat prompt needs "
            "one that writes them once"
        )
    before, after = (
        tokenizer(part, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        for part in written.split(WORDS)
    )
    return before, after
